"""Reading any bytes returns values or raises InputError, and allocates no more memory than the file justifies."""

import json
import pathlib
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.small_tables import TABLE

from diffusion_tf.compression import bitstream
from diffusion_tf.compression.archive import pack_archive
from diffusion_tf.compression.image_files import open_files, read_image_file
from diffusion_tf.compression.tables import Table
from diffusion_tf.data import open_source
from diffusion_tf.data.source import ImageReader
from diffusion_tf.data_settings import DataSettings
from diffusion_tf.errors import InputError
from diffusion_tf.presets import get_preset
from diffusion_tf.storage import checkpoints
from diffusion_tf.storage.json_files import read_json
from diffusion_tf.storage.npz_files import read_npz
from diffusion_tf.storage.workdir import Workdir
from diffusion_tf.training.progress import Progress

RECORDS = (pathlib.Path(__file__).parent.parent / "fixtures/stylegan2_4x4.tfrecords").read_bytes()
PICTURES = get_preset("lsun_cat", image_size=4, ch=32, ch_mult=(1,), attn_resolutions=())
BOUND = 2**22  # bytes that reading a file of a few kilobytes may allocate
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def damaged(draw, sound: bytes):
    """A valid file with a few bytes changed, or slices removed, doubled or inserted."""
    content = bytearray(sound)
    for _ in range(draw(st.integers(1, 4))):
        begin = draw(st.integers(0, len(content)))
        end = draw(st.integers(begin, min(len(content), begin + 64)))
        content[begin:end] = draw(st.one_of(st.binary(max_size=12), st.just(bytes(content[begin:end]) * 2)))
    return bytes(content)


def sound_checkpoint(folder):
    arrays = {"params/a": np.arange(6, dtype=np.float32).reshape(2, 3), "step": np.asarray(7, np.int64)}
    path = checkpoints.save(str(folder), 7, arrays, {"progress": {"data_order": 0, "sums": {}}})
    with open(path, "rb") as file:
        return file.read()


def header(value) -> bytes:
    text = json.dumps(value).encode()
    return len(text).to_bytes(8, "little") + text


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "I64", "BF16", "F8_E4M3", "BOOL", "X"]),
        "shape": st.lists(st.integers(-1, 2**62), max_size=3),
        "data_offsets": st.lists(st.integers(-1, 2**62), max_size=3),
    }
)
headers = st.dictionaries(st.text(max_size=5), entries | json_values, max_size=3).map(header)


def reads_or_refuses(read, path, content):
    path.write_bytes(content)
    message = ""
    tracemalloc.start()
    try:
        read(str(path))
    except InputError as error:
        message = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < BOUND and "\n" not in message


def read_checkpoint(path):
    checkpoints.load_digest(path)
    checkpoints.load(path)
    Progress.of_checkpoint(path)


@QUICK
@given(data=st.data())
def test_checkpoints_are_read_or_refused(tmp_path, data):
    sound = sound_checkpoint(tmp_path / "sound")
    manifest = json_values.map(lambda value: header({"__metadata__": {"manifest": json.dumps(value)}}))
    content = data.draw(st.one_of(st.binary(max_size=64), damaged(sound), headers, manifest))
    reads_or_refuses(read_checkpoint, tmp_path / "step_00000007.safetensors", content)


@QUICK
@given(data=st.data(), samples=st.booleans())
def test_npz_files_are_read_or_refused(tmp_path, data, samples):
    np.savez_compressed(tmp_path / "sound.npz", samples=np.zeros((4, 8, 8, 1), np.uint8), scores=np.arange(3.0))
    np.savez(tmp_path / "stored.npz", samples=np.zeros((4, 8, 8, 1), np.uint8), scores=np.arange(3.0))
    sound = (tmp_path / ("sound.npz" if samples else "stored.npz")).read_bytes()
    content = data.draw(st.one_of(st.binary(max_size=64), damaged(sound)))
    reads_or_refuses(read_npz, tmp_path / "x.npz", content)


def test_an_npz_larger_than_its_limit_is_refused(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", samples=np.zeros(2**24, np.uint8))  # a file of 16 kB
    tracemalloc.start()
    with pytest.raises(InputError, match="its arrays take 16,777,216 bytes, and may take 1,048,576 at most"):
        read_npz(str(tmp_path / "x.npz"), 2**20)
    assert tracemalloc.get_traced_memory()[1] < BOUND
    tracemalloc.stop()


@QUICK
@given(content=st.one_of(st.binary(max_size=64), json_values.map(lambda value: json.dumps(value).encode())))
def test_json_files_are_read_or_refused(tmp_path, content):
    reads_or_refuses(read_json, tmp_path / "x.json", content)
    workdir = Workdir(str(tmp_path))
    reads_or_refuses(lambda _: workdir.read_preset(), tmp_path / "config.json", content)
    reads_or_refuses(lambda _: workdir.read_metrics(), tmp_path / "metrics.jsonl", content + b"\n")
    reads_or_refuses(lambda _: workdir.read_evaluations(), tmp_path / "evaluations.jsonl", content + b"\n")
    reads_or_refuses(lambda _: workdir.rewind_metrics(3), tmp_path / "metrics.jsonl", content + b"\n")


def read_pictures(path):
    source = open_source(PICTURES, "train", DataSettings(tfrecord=path, skip_bad_records=2))
    images = ImageReader(source)(0, source.num_examples)
    assert images.shape == (source.num_examples, 4, 4, 3)


@settings(QUICK, max_examples=10)
@given(content=st.one_of(st.binary(min_size=1, max_size=64), damaged(RECORDS[: 6 * 98])))
def test_tfrecords_are_read_or_refused(tmp_path, content):
    reads_or_refuses(read_pictures, tmp_path / "x.tfrecords", content)


def test_a_record_that_claims_too_much_memory_is_refused(tmp_path):
    pywrap = pytest.importorskip("tensorboard.compat.tensorflow_stub.pywrap_tensorflow")
    length = (2**62).to_bytes(8, "little")
    crc = pywrap.masked_crc32c(length).to_bytes(4, "little")
    (tmp_path / "x.tfrecords").write_bytes(length + crc + RECORDS)
    with pytest.raises(InputError, match="x.tfrecords is not a StyleGAN TFRecord"):
        read_pictures(str(tmp_path / "x.tfrecords"))


def read_compressed(path):
    for picture in open_files({path: read_image_file(path, TABLE.image_shape, max_images=2)}):
        steps = bitstream.decode_steps(TABLE.step_models(), picture.body)
        assert all(len(step) <= 10 for step in steps)
        bitstream.decode_residual(TABLE.residual_law, picture.body, TABLE.image_shape)


@QUICK
@given(data=st.data(), stream=st.integers(0, 2**16 - 1), body=st.binary(max_size=64), many=st.booleans())
def test_compressed_images_are_read_or_refused(tmp_path, data, stream, body, many):
    sealed = bitstream.pack(TABLE.digest, 12, stream, body)
    sealed = pack_archive([sealed, sealed], TABLE.digest) if many else sealed
    content = data.draw(st.one_of(st.binary(max_size=64), st.just(sealed), damaged(sealed)))
    reads_or_refuses(read_compressed, tmp_path / "x.dtfc", content)


def test_a_compressed_image_beyond_the_largest_size_is_refused(tmp_path):
    (tmp_path / "x.dtfc").write_bytes(b"DTFC" * 2**13)
    with pytest.raises(InputError, match="holds 32,768 bytes, and may hold 16,396 at most"):
        read_image_file(str(tmp_path / "x.dtfc"), TABLE.image_shape)


@QUICK
@given(data=st.data())
def test_compression_tables_are_read_or_refused(tmp_path, data):
    fields = json.loads(TABLE.to_json())
    changed = st.sampled_from(sorted(fields)).flatmap(
        lambda name: json_values.map(lambda value: json.dumps({**fields, name: value}).encode())
    )
    content = data.draw(st.one_of(changed, damaged(TABLE.to_json()), json_values.map(lambda v: json.dumps(v).encode())))
    reads_or_refuses(Table.read, tmp_path / "x.json", content)
