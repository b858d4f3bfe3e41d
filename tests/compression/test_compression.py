"""Compression: the channel sends samples of q, the bits are those of theory, and damaged files are refused."""

import math
import pathlib
import statistics

import hypothesis
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies as st
from support import gaussian_data, golden

from diffusion_tf.compression import bitstream, channel
from diffusion_tf.compression.archive import pack_archive, unpack_archive
from diffusion_tf.compression.bitstream import HEADER_BYTES, StepModel
from diffusion_tf.compression.channel import SharedRandomness
from diffusion_tf.compression.coarse_schedule import cheapest_path
from diffusion_tf.compression.codec import Codec
from diffusion_tf.compression.image_files import RateDistortion, Targets, decode_images, encode_images, open_files
from diffusion_tf.compression.measurement import Measurement, equal_rmse
from diffusion_tf.compression.other_formats import other_formats
from diffusion_tf.compression.tables import Table, TableStore, make_table, predictor
from diffusion_tf.diffusion_utils import GaussianDiffusion, images_to_x
from diffusion_tf.errors import ConfigError, InputError, NotFiniteError
from diffusion_tf.presets import get_preset
from diffusion_tf.runtime.strategies import make_strategy

# --- The channel -------------------------------------------------------------------------------------------


def philox4x64(counter, key):
    """One block of Philox4x64-10 as its paper has it (Salmon et al. 2011): four words of 64 bits."""
    counter, key = list(counter), list(key)
    for _ in range(10):
        low, high = 0xD2E7470EE14C6C93 * counter[0], 0xCA5A826395121157 * counter[2]
        counter = [(high >> 64) ^ counter[1] ^ key[0], high % 2**64, (low >> 64) ^ counter[3] ^ key[1], low % 2**64]
        key = [(key[0] + 0x9E3779B97F4A7C15) % 2**64, (key[1] + 0xBB67AE8584CAA73B) % 2**64]
    return counter


def test_shared_normals_are_philox_words_through_a_table():
    row = SharedRandomness(7, stride=16).row(step=3, chunk=2, segment=1, row=10, width=20)
    np.testing.assert_array_equal(row, SharedRandomness(7).row(step=3, chunk=2, segment=1, row=160, width=20))
    # Two blocks of 64 bits x 4, from number 160 on; NumPy's counter is incremented before use.
    words = [word for block in (10, 11) for word in philox4x64([block + 1, 1, 0, 0], [7, (3 << 32) | 2])]
    pieces = [(word >> shift) & 0xFFFF for word in words for shift in (0, 16, 32, 48)][:20]
    expected = [statistics.NormalDist().inv_cdf((piece + 0.5) / 2**16) for piece in pieces]
    np.testing.assert_allclose(row, expected, rtol=3e-4)  # the table is scaled to variance 1
    golden = [-0.3524105, -0.5813332, -0.07801037, 0.9452656, -0.1056665, -0.2341568]
    np.testing.assert_allclose(row[:6], golden, rtol=1e-6)


def test_shared_normals_are_standard_and_do_not_depend_on_what_is_drawn_with_them():
    shared = SharedRandomness(1)
    numbers = shared.numbers(0, 0, 0, 0, 64000)
    assert abs(numbers.mean()) < 4 / math.sqrt(64000) and abs(numbers.var() - 1) < 4 * math.sqrt(2 / 64000)
    np.testing.assert_array_equal(shared.numbers(0, 0, 0, 1237, 70), numbers[1237:1307])
    np.testing.assert_array_equal(shared.row(0, 0, 0, 5, 40), numbers[5:45])
    assert not np.array_equal(shared.row(0, 0, 1, 0, 16), numbers[:16])
    assert not np.array_equal(SharedRandomness(2).row(0, 0, 0, 0, 16), numbers[:16])


def test_projections_are_products_with_rows():
    for shared, width in ((SharedRandomness(3), 5), (SharedRandomness(3), 50), (SharedRandomness(3, stride=16), 20)):
        mu = np.random.default_rng(0).standard_normal(width).astype(np.float32)
        projections = channel._project(shared, 1, 2, 0, mu, 1 << 16)
        for row in (0, 1, 31, 32, 4095, 32767, 32768, (1 << 16) - 1):
            np.testing.assert_allclose(projections[row], shared.row(1, 2, 0, row, width) @ mu, atol=1e-4)


def test_the_rotation_is_orthogonal_and_spreads_what_is_concentrated():
    shared, x = SharedRandomness(4), np.zeros(100)
    x[17] = 3.0
    rotated = shared.rotate(5, x)
    assert np.linalg.norm(rotated) == pytest.approx(3.0) and np.abs(rotated).max() < 0.43
    np.testing.assert_allclose(shared.rotate_back(5, rotated), x, atol=1e-12)


def test_a_candidate_has_one_place():
    rng = np.random.default_rng(0)
    for num_rows in (1 << 16, 1 << 20):
        last = num_rows**3 - 1
        for index in (0, 1, 65535, 65536, 1 << 32, last, *rng.integers(last, size=100)):
            rows = channel._rows(int(index), num_rows)
            assert channel._index(*map(np.int64, rows), num_rows) == index


def test_the_search_finds_the_best_of_all_candidates():
    rows, index = 64, np.arange(64**3)
    places = np.array([channel._rows(int(i), rows) for i in index]).T
    for seed in range(40):
        rng = np.random.default_rng(seed)
        u, v, w = (rng.standard_normal((3, rows)) * rng.uniform(0.5, 3.0, (3, 1))).astype(np.float32)
        times = index.astype(float)
        times[:64] = np.cumsum(np.random.default_rng(seed).standard_exponential(64))
        expected = u[places[0]] + v[places[1]] + w[places[2]] - np.log(times)
        found = channel.search(u, v, w, np.random.default_rng(seed))
        assert expected[found] == pytest.approx(expected.max(), abs=1e-5)


def test_pairs_above_a_threshold():
    rng = np.random.default_rng(0)
    u, v = rng.standard_normal((2, 300))
    i, j = channel._pairs_above(u, v, 3.0, 1 << 22)
    expected = np.argwhere(u[:, None] + v > 3.0)
    assert {*zip(i, j, strict=True)} == {tuple(pair) for pair in expected} and len(i) == len(expected)
    i, j = channel._pairs_above(*rng.standard_normal((2, 1 << 14)), -10.0, 1 << 22)  # all 2^28
    assert 1 << 18 < len(i) <= 1 << 22


def test_rows_are_enough_for_the_chunks():
    """Rows by their weights are as q has them: with 2^16 for 20 bits, their variance in place of 1 would be 0.82."""
    bits, width = 20, 8
    rng = np.random.default_rng(0)
    variances = []
    for stream in range(60):
        mu = rng.standard_normal(width).astype(np.float32)
        mu *= math.sqrt(2.0 * math.log(2.0) * bits / 3.0) / np.linalg.norm(mu)  # a third of the chunk's
        projections = channel._project(SharedRandomness(stream), 0, 0, 0, mu, channel.rows_for(bits)).astype(float)
        weights = np.exp(projections - projections.max())
        mean = np.average(projections, weights=weights)
        variances.append(np.average((projections - mean) ** 2, weights=weights) / np.sum(mu.astype(float) ** 2))
    assert np.mean(variances) > 0.88


def test_samples_are_of_q_and_cost_what_theory_says():
    bits, num_dims, count, rows = 12.0, 48, 150, channel.rows_for(12)
    length = math.sqrt(2.0 * math.log(2.0) * bits)
    rng = np.random.default_rng(0)
    along, across, indices = [], [], []
    for stream in range(count):
        mu, other = rng.standard_normal((2, num_dims))
        mu *= length / np.linalg.norm(mu)
        other -= mu * (other @ mu) / length**2
        index = channel.select(SharedRandomness(stream), 2, 0, mu, rows, rng)
        z = channel.candidate(SharedRandomness(stream), 2, 0, num_dims, index, rows)
        along.append(z @ mu / length - length)
        across.append(z @ other / np.linalg.norm(other))
        indices.append(index)
    for projection in (along, across):  # N(0, 1): with too few candidates the first one's mean and variance are short
        assert abs(np.mean(projection)) < 3.5 / math.sqrt(count)
        assert abs(np.var(projection) - 1.0) < 3.5 * math.sqrt(2.0 / count)
    lengths = np.log2(np.array(indices) + 1.0)
    law = np.log2(channel.sample_indices(np.full(20000, bits), rng) + 1.0)
    assert abs(lengths.mean() - law.mean()) < 3.5 * law.std() / math.sqrt(count)


# --- The bytes ---------------------------------------------------------------------------------------------

MEANS = (256, 512, 128, 256, 256, 512)
MODELS = [
    StepModel([1, 2, 40, 9, 2], [30 + 3 * i for i in range(20)], 10, MEANS[: step + 1]) for step in range(len(MEANS))
]
STEPS = [[5], [0, 1023], [], [70000], [123456789], [3, 2]]
DIGEST = b"abcdefgh"


def a_file(body=b"", stream=7):
    return bitstream.pack(DIGEST, 12, stream, body or bitstream.encode_steps(MODELS, STEPS))


def test_the_bytes_of_this_version():
    assert a_file().hex() == "df4c000700000f1726d2eed0" + "17211b44ebf570b3421bf82559350b"
    archive = pack_archive([a_file(), a_file(b"x" * 200, stream=8)], DIGEST).hex()
    assert archive == "da4c0000020007e3b7da7e85" + "0f1726" + "c801261c" + a_file().hex()[24:] + "78" * 200


def test_chunks_are_predicted_from_those_of_recent_steps():
    assert bitstream.predicted_chunks(MEANS[:1], []) == 1
    assert bitstream.predicted_chunks(MEANS[:2], [1]) == 2
    assert bitstream.predicted_chunks(MEANS[:2], [5]) == 5  # 2 (5 + 2) / (1 + 2), rounded
    assert bitstream.predicted_chunks((256,) * 20, [0] * 11 + [3] * 8) == 3  # the first steps no longer count


@hypothesis.given(
    st.lists(st.lists(st.integers(0, 2**60 - 1) | st.integers(0, 5000), max_size=5), min_size=6, max_size=6)
)
@hypothesis.settings(deadline=None, max_examples=50)
def test_every_prefix_says_its_whole_steps(steps):
    data = bitstream.encode_steps(MODELS, steps)
    bits = bitstream.prefix_bits(MODELS, data, len(steps))
    assert len(data) == -(-bits[-1] // 8)
    for size in range(8 * len(data) + 1):
        said = bitstream.decode_steps(MODELS, data, size)
        assert said == steps[: len(said)] and bits[len(said)] <= size
        assert len(said) == len(steps) or bits[len(said) + 1] > size
        assert size % 8 or said == bitstream.decode_steps(MODELS, data[: size // 8])


@hypothesis.given(st.binary(max_size=200))
@hypothesis.settings(deadline=None)
def test_random_bytes_are_read_to_their_end_or_refused(data):
    steps = bitstream.decode_steps(MODELS, data)
    assert all(0 <= index < 2**61 for step in steps for index in step)
    assert bitstream.decode_residual([1] * 256, data, (8, 8, 1)).shape == (8, 8, 1)
    with pytest.raises(InputError, match="x is not a compressed image|x is cut off|x is damaged"):
        bitstream.unpack(data, "x")


def test_a_file_cut_anywhere_is_shorter_or_refused():
    data = a_file()
    header, body = bitstream.unpack(data, "x")
    assert body == data[HEADER_BYTES:] and header.fits(DIGEST) and (header.chunk_bits, header.stream) == (12, 7)
    for size in range(len(data)):
        if size < HEADER_BYTES:
            with pytest.raises(InputError, match="is cut off inside its header" if size else "not a compressed image"):
                bitstream.unpack(data[:size], "x")
        else:
            assert bitstream.unpack(data[:size], "x") == (header, data[HEADER_BYTES:size])
    with pytest.raises(InputError, match="x is damaged"):
        bitstream.unpack(data + b"\0", "x")


def test_every_flipped_bit_is_refused():
    data = a_file()
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            header, _ = bitstream.unpack(bytes(flipped), "x")
        except InputError:
            continue
        assert bit < 8 * HEADER_BYTES and not header.fits(DIGEST)  # as decoders check


def test_another_version_is_named():
    data = a_file()
    later = bytes([data[0], 3 << 5 | 12]) + data[2:]
    with pytest.raises(InputError, match="x is damaged, or has version 3, but this program reads 1 and 2"):
        bitstream.unpack(later, "x")


def test_an_archive_holds_its_files():
    bodies = [bytes([i]) * size for i, size in enumerate((0, 3, 127, 128, 20000))]
    files = [a_file(body or b"z", stream=(65534 + i) % 65536) for i, body in enumerate(bodies)]
    data = pack_archive(files, DIGEST)
    assert len(data) == HEADER_BYTES + sum(len(file) - HEADER_BYTES for file in files) + 3 * 3 + 4 + 5
    images = unpack_archive(data, "x")
    for (header, body), file in zip(images, files, strict=True):
        alone, same_body = bitstream.unpack(file, "x")
        assert body == same_body and header.fits(DIGEST) and not header.fits(b"another!")
        assert (header.stream, header.chunk_bits) == (alone.stream, alone.chunk_bits)


def test_an_archive_cut_anywhere_holds_the_images_before_the_cut_or_is_refused():
    files = [a_file(bytes([i + 1]) * 20, stream=i) for i in range(3)]
    data = pack_archive(files, DIGEST)
    first = HEADER_BYTES + 3 * 3
    for size in range(len(data)):
        if size < first:
            with pytest.raises(InputError, match="x is cut off|not a compressed image"):
                unpack_archive(data[:size], "x")
        else:
            bodies = [body for _, body in unpack_archive(data[:size], "x")]
            assert b"".join(bodies) == data[first:size] and [len(body) for body in bodies] == [
                min(20, max(0, size - first - 20 * i)) for i in range(3)
            ]


def test_damage_to_an_archive_is_refused():
    data = pack_archive([a_file(bytes([i + 1]) * 20, stream=i) for i in range(3)], DIGEST)
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            images = unpack_archive(bytes(flipped), "x")
        except InputError:
            continue
        assert bit < 8 * HEADER_BYTES and not any(header.fits(DIGEST) for header, _ in images)
    with pytest.raises(InputError, match="image 1 of x is damaged"):
        unpack_archive(data[:50] + b"?" + data[51:], "x")


def test_a_residual_comes_back():
    residual = np.random.default_rng(0).integers(0, 256, (5, 4, 3)).astype(np.uint8)
    law = [1 + 256 // (1 + i) for i in range(256)]
    data = bitstream.encode_residual(law, residual)
    np.testing.assert_array_equal(bitstream.decode_residual(law, data, residual.shape), residual)


# --- The codec ---------------------------------------------------------------------------------------------


def test_cheapest_path():
    costs = {(0, 1): 10, (0, 2): 50, (0, 3): 90, (1, 2): 10, (1, 3): 30, (2, 3): 15}
    costs_into = lambda j: (np.full(j, 0.9 * 10 * j), np.array([costs[i, j] for i in range(j)], float))
    assert cheapest_path(4, costs_into, max_overhead=9.0) == [0, 1, 2, 3]
    few = lambda j: (np.array([0.1, 30.0, 60.0, 90.0][:j])[::-1] * (j > 1) + 2.0, costs_into(j)[1])
    assert cheapest_path(4, few, max_overhead=0.6) == [0, 3]


STD = 0.2


@pytest.fixture(scope="module")
def gaussian_codec():
    """A codec of the best possible network for pixels that are N(MEAN, STD^2), its table, and such images."""
    preset = get_preset("digits", num_timesteps=60, beta_start=0.01, beta_end=0.2, model_var_type="fixedlarge")
    diffusion = GaussianDiffusion.from_preset(preset)
    denoise_fn = gaussian_data.denoise_fn(diffusion, STD)
    strategy = tf.distribute.OneDeviceStrategy("/cpu:0")
    trained = golden.KnownModel(preset, strategy, diffusion, denoise_fn)
    pixels = np.random.default_rng(0).normal(gaussian_data.MEAN, STD, (40, 8, 8, 1))
    images = np.clip(np.round((pixels + 1) * 127.5), 0, 255).astype(np.uint8)
    table = make_table(trained, "digest", images[:32], num_predicted=32, chunk_bits=12, batch_size=8, seed=0)
    codec = Codec(trained, table)
    encoded = codec.encode(images[32:], range(8))
    return trained, codec, table, images[32:], encoded


def test_rate_and_distortion_are_those_of_theory(gaussian_codec):
    trained, _, table, images, encoded = gaussian_codec
    abar = trained.diffusion.schedule.alphas_cumprod[list(table.timesteps)]
    # What is left of the pixels' variance when x_t is known.
    expected = STD**2 * (1 - abar) / (abar * STD**2 + 1 - abar)
    mse = np.square(encoded.pred_xstart - images_to_x(images)).mean(axis=(1, 2, 3, 4))
    assert np.abs(mse / expected - 1).max() < 4 * math.sqrt(2.0 / images.size)
    snr = abar / (1 - abar)
    expected_bits = 64 * np.cumsum(np.diff(snr) * expected[:-1]) / (2.0 * math.log(2.0))
    kl_bits = np.cumsum(encoded.kl_bits.mean(axis=0))
    assert np.abs(kl_bits / expected_bits - 1).max() < 0.1
    models = table.step_models()
    bits = np.mean([8 * len(bitstream.encode_steps(models, steps)) for steps in encoded.steps])
    assert kl_bits[-1] < bits < 1.5 * kl_bits[-1]


def test_decoding_is_what_the_encoder_saw(gaussian_codec, tmp_path):
    _, codec, table, _, encoded = gaussian_codec
    (tmp_path / "t.json").write_bytes(table.to_json())
    assert Table.read(str(tmp_path / "t.json")) == table
    models = table.step_models()
    lengths = [len(models), 0, 1, 2, 3, 2, 1, len(models)]
    prefixes = []
    for steps, length in zip(encoded.steps, lengths, strict=True):
        data = bitstream.encode_steps(models, steps)
        said = bitstream.decode_steps(models, data, bitstream.prefix_bits(models, data, length)[-1])
        assert len(said) >= length  # a step without chunks may come for nothing
        prefixes.append(said[:length])
    decoded = codec.decode(prefixes, range(8))
    np.testing.assert_allclose(decoded, encoded.pred_xstart[lengths, range(8)], atol=1e-5)
    (tmp_path / "t.json").write_bytes(b'{"chunk_bits": 3}')
    with pytest.raises(InputError, match="t.json is not a compression table of this version"):
        Table.read(str(tmp_path / "t.json"))


def test_targets_choose_the_number_of_steps():
    bits, mse = np.array([0, 20, 41, 200]), np.array([100.0, 64.0, 36.0, 1.0]) ** 2
    curve = RateDistortion(bits, bits / 1.3, mse)
    header = 8 * HEADER_BYTES
    for targets, steps in (
        (Targets(), 3),
        (Targets(rmse=64.0), 1),
        (Targets(rmse=40.0), 2),
        (Targets(rmse=0.5), 3),
        (Targets(bits_per_dim=(header + 24) / 64), 1),
        (Targets(bits_per_dim=(header + 47) / 64), 1),  # 41 bits are 6 bytes
        (Targets(bits_per_dim=(header + 48) / 64), 2),
        (Targets(rmse=40.0, bits_per_dim=header / 64), 0),
    ):
        assert targets.num_steps(curve, 64) == steps, targets
    Targets(bits_per_dim=1.5).check(64)
    with pytest.raises(InputError, match="target_bits_per_dim=1.4 is less than a file's header .*: 1.5 at least"):
        Targets(bits_per_dim=1.4).check(64)
    for targets in (Targets(rmse=math.nan), Targets(rmse=-1.0), Targets(bits_per_dim=math.nan)):
        with pytest.raises(ConfigError, match="must be 0 or more, and finite"):
            targets.check(64)
    with pytest.raises(InputError, match="lossless needs all steps: leave `target_rmse`"):
        Targets(rmse=1.0, lossless=True).check(64)


def test_files_decode_to_their_images(gaussian_codec, tmp_path):
    trained, codec, table, images, _ = gaussian_codec
    tables = TableStore(str(tmp_path), trained, table.checkpoint, 5, open_train=pytest.fail)
    (tmp_path / "step_00000005_bits_12_v2.json").write_bytes(table.to_json())
    assert tables.get(12) == table
    elsewhere = TableStore(
        str(tmp_path), trained, table.checkpoint, 5, open_train=pytest.fail, new_folder=str(tmp_path / "elsewhere")
    )
    assert elsewhere.get(12) == table and elsewhere.path(11) == f"{tmp_path}/elsewhere/step_00000005_bits_11_v2.json"
    measurement = Measurement(table.timesteps)
    encoded = list(encode_images(codec, images, targets=Targets(lossless=True)))
    for image in encoded:
        measurement.add(image)
    files = {f"{i}.dtfc": image.data for i, image in enumerate(encoded)}
    np.testing.assert_array_equal(np.stack(list(decode_images(tables, open_files(files)))), images)
    pictures = open_files({"x": pack_archive(list(files.values()), table.digest)})
    np.testing.assert_array_equal(np.stack(list(decode_images(tables, pictures[3:5]))), images[3:5])
    for bits in (0, int(encoded[6].curve.bits[2]), 10_000):
        step = np.flatnonzero(encoded[6].curve.bits <= bits)[-1]
        (decoded,) = decode_images(tables, pictures[6:7], max_bits=bits)
        np.testing.assert_array_equal(decoded, images[6] if bits == 10_000 else encoded[6].shown[step])
    assert measurement.rmse == 0.0 and measurement.mean_bytes == np.mean([len(data) for data in files.values()])
    rows = measurement.record(images)["table"]
    assert rows[-1]["kl_bits_per_dim"] < rows[-1]["steps_bits_per_dim"] < rows[-1]["file_bits_per_dim"]
    assert equal_rmse(rows, rows[1]["distortion_rmse"]) == {
        "our_bits_per_dim": rows[1]["file_bits_per_dim"], "our_payload_bits_per_dim": rows[1]["steps_bits_per_dim"],
    }  # fmt: skip
    assert equal_rmse(rows, 0.01) == equal_rmse(rows, 200.0) == {}
    for targets in (Targets(rmse=40.0), Targets(bits_per_dim=2.6)):
        (few,) = encode_images(codec, images[:1], targets=targets)
        (decoded,) = decode_images(tables, open_files({"few": few.data}))
        np.testing.assert_array_equal(decoded, few.shown[few.num_steps])
        assert few.num_steps < len(table.timesteps) - 1


def test_files_of_version_1_decode_with_their_table(gaussian_codec, tmp_path):
    trained, _, _, images, _ = gaussian_codec
    old = pathlib.Path(__file__).parent.parent / "fixtures" / "compressed_v1"
    tables = TableStore(str(old), trained, "digest", 5, open_train=pytest.fail)
    pictures = open_files({"old": (old / "image.dtfc").read_bytes()})
    np.testing.assert_array_equal(list(decode_images(tables, pictures)), images[:1])  # it is lossless
    (coarse,) = decode_images(tables, pictures, max_bits=100)
    assert 0 < np.square(coarse.astype(float) - images[0]).mean() < 0.8 * images.var()
    missing = TableStore(str(tmp_path), trained, "digest", 5, open_train=pytest.fail)
    with pytest.raises(InputError, match="files of version 1 need the table that they were made with: .* is missing"):
        list(decode_images(missing, pictures))
    damaged = bytearray((old / "image.dtfc").read_bytes())
    damaged[30] ^= 1
    with pytest.raises(InputError, match="old is damaged"):
        open_files({"old": bytes(damaged)})


def test_other_formats_are_smaller_the_more_they_lose():
    ramp = np.add.outer(np.arange(32), 3 * np.arange(32))
    images = np.stack([ramp, 2 * ramp, 255 - ramp], axis=-1).clip(0, 255).astype(np.uint8)[None]
    rows = other_formats(images)
    assert {"JPEG", "WEBP", "AVIF", "PNG"} <= {row["format"] for row in rows}
    lossless = [row for row in rows if row["format"] == "PNG" or row.get("lossless")]
    assert len(lossless) >= 2 and all(row["rmse"] == 0.0 for row in lossless)
    for name in ("JPEG", "WEBP", "AVIF"):
        (low,) = [row for row in rows if row["format"] == name and row.get("quality") == 10]
        (high,) = [row for row in rows if row["format"] == name and row.get("quality") == 90]
        assert high["rmse"] < low["rmse"] and low["payload_bits_per_dim"] < high["payload_bits_per_dim"]
        assert 0 < low["payload_bits_per_dim"] < low["bits_per_dim"]


def test_tables_are_those_of_their_checkpoint(gaussian_codec, tmp_path):
    trained, _, table, _, _ = gaussian_codec
    (tmp_path / "step_00000005_bits_12_v2.json").write_bytes(table.to_json())
    with pytest.raises(InputError, match="was made for other weights or another `precision`"):
        TableStore(str(tmp_path), trained, "other", 5, open_train=pytest.fail).get(12)
    with pytest.raises(InputError, match="batch_size=3: .* was made for 8: leave `batch_size` out"):
        TableStore(str(tmp_path), trained, table.checkpoint, 5, open_train=pytest.fail, batch_size=3).get(12)
    with pytest.raises(InputError, match="chunk_bits=25 must be from 4 to 24"):
        TableStore(str(tmp_path), trained, table.checkpoint, 5, open_train=pytest.fail).get(25)


def test_a_prediction_that_overflows_is_not_coded():
    trained = golden.overflowing_model(make_strategy("one_device"), np.inf, below=4)
    x_t = np.stack([np.ones([8, 8, 1], np.float32), -np.ones([8, 8, 1], np.float32)])
    predict = predictor(trained, 4)
    assert np.isfinite(predict(x_t, 4)).all()
    with pytest.raises(NotFiniteError, match="x_t of the batch's images 1 hold NaN or infinity at t = 3"):
        predict(x_t, 3)
