"""The public API, through `import diffusion_tf` alone."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import zlib

import numpy as np
import pytest
import safetensors.numpy
import tensorflow as tf
from sklearn.datasets import load_digits

import diffusion_tf as dtf

FIXTURES = pathlib.Path(__file__).parent / "fixtures"

# A network and a process small enough for a full bound and a full encoding.
TINY = dtf.get_preset(
    "digits", num_timesteps=8, beta_start=0.05, beta_end=0.6, ch_mult=(1,), batch_size=8, num_steps=6, warmup_steps=2,
    steps_per_loop=2, checkpoint_every=2, sample_every=0, ema_decay=0.5,
)  # fmt: skip
HEADER_BYTES = 12  # of a compressed image
DIGITS = np.round(load_digits().images * (255 / 16)).astype(np.uint8)[..., None]
TRAINING = DIGITS[np.arange(len(DIGITS)) % 10 != 9]  # of the preset


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="module")
def calls():
    return []


@pytest.fixture(scope="module")
def run(workdir, calls):
    return dtf.train(TINY, workdir, TRAINING, callbacks=[lambda step, metrics: calls.append((step, metrics))])


def test_import_leaves_tensorflow_alone_until_a_name_needs_it():
    program = """
import os, sys
import diffusion_tf as dtf
assert "tensorflow" not in sys.modules and "keras" not in sys.modules
assert os.environ["TF_CPU_ALLOCATOR_USE_BFC"] == "1"
assert set(dtf.__all__) <= set(dir(dtf))
assert dtf.get_preset("cifar10").ch == 128 and issubclass(dtf.ConfigError, dtf.InputError)
assert "tensorflow" not in sys.modules
from diffusion_tf import *
assert load is dtf.load and "tensorflow" in sys.modules
"""
    # Without the allocator's variables, as a shell starts it.
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(filter(None, sys.path)), "TF_CPP_MIN_LOG_LEVEL": "3"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="'diffusion_tf' has no attribute 'lode'"):
        _ = dtf.lode


def test_training_writes_a_run_and_calls_back(run, workdir, calls):
    assert run.step == 6 and run.preset == TINY
    assert [step for step, _ in calls] == [2, 4, 6]
    lines = [json.loads(line) for line in pathlib.Path(workdir, "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [metrics["loss"] for _, metrics in calls]


@pytest.mark.slow
def test_a_resumed_run_on_the_presets_own_images_has_the_bits_of_one_on_their_array(run, tmp_path):
    workdir = str(tmp_path / "run")
    assert dtf.train(dataclasses.replace(TINY, num_steps=2), workdir).step == 2
    resumed = dtf.train(TINY, workdir)
    assert resumed.step == 6
    for ours, expected in zip(resumed.unet.trainable_variables, run.unet.trainable_variables, strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_training_refuses_other_images(run):
    for preset, images, arguments, message in (
        (TINY, TRAINING[:65], {}, "num_examples: 65 != 1618"),
        (TINY, TRAINING[:, :4], {}, r"images must be uint8 \[N, 8, 8, 1\] with N > 0, not uint8 \[1618, 4, 8, 1\]"),
        (TINY, TRAINING, {"tfrecord": "x"}, "images: leave out"),
        ("mnist", TRAINING, {}, "dataset=mnist: choose one of"),
        (dataclasses.replace(TINY, seed=1), TRAINING, {}, "seed: 1 != 0"),
    ):
        with pytest.raises(dtf.ConfigError, match=message):
            dtf.train(preset, run.path, images, **arguments)


def test_denoise_is_the_network(run):
    x_t = np.random.RandomState(0).standard_normal((3, 8, 8, 1)).astype(np.float32)
    t = np.array([0, 3, 7])
    ours = run.denoise(x_t, t)
    assert ours.shape == (3, 8, 8, 1) and ours.dtype == np.float32
    np.testing.assert_allclose(ours, run.unet(tf.constant(x_t), tf.constant(t, tf.int32)), rtol=0, atol=1e-5)
    np.testing.assert_allclose(run.denoise(x_t[1:2], 3), ours[1:2], rtol=0, atol=1e-5)
    for arguments, message in (
        ((x_t[..., 0], t), r"x_t must be \[N, 8, 8, 1\], not \[3, 8, 8\]"),
        ((x_t, t[:2]), r"t must be an int or int \[3\]"),
        ((x_t, 0.5), "t must be an int"),
        ((x_t, 8), r"t must be in \[0, 8\)"),
    ):
        with pytest.raises(dtf.ConfigError, match=message):
            run.denoise(*arguments)


def test_samples_depend_on_seed_and_index_alone(run):
    samples = run.sample(5, seed=3)
    assert samples.shape == (5, 8, 8, 1) and samples.dtype == np.uint8
    in_batches = run.sample(5, seed=3, batch_size=2).astype(int)
    assert np.abs(in_batches - samples).max() <= 1  # float rounding
    assert np.abs(run.sample(5, seed=4).astype(int) - samples).max() > 1
    np.testing.assert_array_equal(run.sample(5, seed=3), samples)


def test_ddim_in_one_step_is_the_predicted_image(run):
    """One step of DDIM from x_T shows the clipped pred_xstart there."""
    samples = run.sample(2, seed=1, sampler="ddim", steps=1)
    # The same x_T: one step of another deterministic sampler from it shows the same image.
    np.testing.assert_array_equal(run.sample(2, seed=1, sampler="dpm_solver++", steps=1), samples)
    settings = dtf.SamplerSettings("ddim", steps=4, spacing="leading")
    np.testing.assert_array_equal(
        run.sample(2, seed=1, sampler=dataclasses.replace(settings, spacing="trailing"), steps=1), samples
    )
    assert (run.sample(2, seed=1, sampler=settings, steps=1) != samples).any()  # it starts at t = 0
    for arguments, message in (
        ({"sampler": "euler"}, "sampler=euler: choose one of"),
        ({"steps": 9}, "steps=9 must be from 1 to"),
        ({"seed": -1}, "seed=-1 must be in"),
        ({"batch_size": 0}, "batch_size=0"),
    ):
        with pytest.raises(dtf.ConfigError, match=message):
            run.sample(2, **arguments)


def test_pictures_are_varied_and_painted(run):
    mask = np.zeros((8, 8), bool)
    mask[:, 4:] = True
    for method, arguments, message in (
        (run.vary, {"strength": 0.0}, r"strength=0.0 must be in \(0, 1\]"),
        (run.inpaint, {"masks": mask.astype(np.uint8)}, r"masks must be bool \[8, 8\] or \[3, 8, 8\], not uint8"),
        (run.inpaint, {"masks": mask[:4]}, r"masks must be bool .* not bool \[4, 8\]"),
        (run.inpaint, {"masks": np.zeros_like(mask)}, "masks: a mask must select at least one pixel"),
        (run.inpaint, {"masks": mask, "sampler": "dpm_solver++"}, "sampler=dpm_solver.. uses the step before"),
        (run.inpaint, {"masks": mask, "jump_length": 0}, "jump_length=0 must be greater than 0"),
    ):
        with pytest.raises(dtf.ConfigError, match=message):
            method(DIGITS[:3], **arguments)
    with pytest.raises(dtf.ConfigError, match="images must be uint8"):
        run.vary(DIGITS[:3, :4])
    painted = run.inpaint(DIGITS[:3], mask, seed=1, resamplings=2, jump_length=2, batch_size=2)
    np.testing.assert_array_equal(painted[:, ~mask], DIGITS[:3][:, ~mask])
    assert (painted[:, mask] != DIGITS[:3][:, mask]).mean() > 0.5
    # One of eight steps leaves little noise; a whole process leaves nothing of the digit.
    near, far = (run.vary(DIGITS[:3], seed=1, strength=strength).astype(int) for strength in (0.1, 1.0))
    errors = [np.sqrt(np.square(varied - DIGITS[:3]).mean()) for varied in (near, far)]
    assert errors[0] < errors[1] / 2, errors


def bound_by_numpy(run, image, num_draws):
    """Eq. 5 of one image in float64, with noise of its own: bits/dim [num_draws], from `run.denoise`."""
    noise = np.random.RandomState(5)
    betas = np.linspace(TINY.beta_start, TINY.beta_end, TINY.num_timesteps)
    abar = np.cumprod(1 - betas)
    abar_prev = np.append(1.0, abar[:-1])
    variance = betas * (1 - abar_prev) / (1 - abar)  # Eq. 7
    x_start = np.repeat(image[None] / 127.5 - 1, num_draws, axis=0)
    mean = lambda values: values.mean(axis=(1, 2, 3)) / np.log(2)
    total = mean(0.5 * (abar[-1] * x_start**2 - abar[-1] - np.log(1 - abar[-1])))  # L_T
    for t in range(TINY.num_timesteps):
        x_t = np.sqrt(abar[t]) * x_start + np.sqrt(1 - abar[t]) * noise.standard_normal(x_start.shape)
        pred_xstart = np.clip((x_t - np.sqrt(1 - abar[t]) * run.denoise(x_t, t)) / np.sqrt(abar[t]), -1, 1)
        error = np.sqrt(abar_prev[t]) * betas[t] / (1 - abar[t]) * (x_start - pred_xstart)  # of the mean (Eq. 7)
        if t:
            total += mean(error**2 / (2 * variance[t]))
        else:  # the discrete decoder (Eq. 13), its variance that of t = 1
            u, half = error / np.sqrt(variance[1]), 1 / 255 / np.sqrt(variance[1])
            upper = np.where(x_start > 0.999, 1.0, normal_cdf(u + half))
            lower = np.where(x_start < -0.999, 0.0, normal_cdf(u - half))
            total -= mean(np.log(np.maximum(upper - lower, 1e-12)))
    return total


def normal_cdf(x):
    """The authors' approximation."""
    return 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def test_bits_per_dim_is_the_variational_bound(run):
    """Also the estimate from two of the seven middle terms; each of the 400 equal images has noise of its own."""
    images = np.repeat(TRAINING[:1], 400, axis=0)
    expected = bound_by_numpy(run, TRAINING[0], 400)
    for num_timesteps_estimate in (None, 2):
        measured = run.bits_per_dim(images, batch_size=200, num_timesteps_estimate=num_timesteps_estimate)
        assert measured.shape == (400,) and measured.dtype == np.float64
        error = np.hypot(measured.std(), expected.std()) / 20
        assert error < 0.05 * expected.mean() and abs(measured.mean() - expected.mean()) < 4 * error
    with pytest.raises(dtf.ConfigError, match="num_timesteps_estimate=0"):
        run.bits_per_dim(images, num_timesteps_estimate=0)


def test_files_decode_to_their_images_and_prefixes_to_rougher_ones(run):
    images = TRAINING[:3]
    errors = lambda decoded: np.sqrt(np.mean((decoded.astype(float) - images) ** 2, axis=(1, 2, 3)))
    files = run.encode(images, chunk_bits=10, table_images=TRAINING[:64])
    halves = [file[: (HEADER_BYTES + len(file)) // 2] for file in files]
    decoded = run.decode([*files, *halves])
    assert decoded.shape == (6, 8, 8, 1) and decoded.dtype == np.uint8
    whole, half = errors(decoded[:3]).mean(), errors(decoded[3:]).mean()
    nothing = errors(np.round(TRAINING[:64].mean(axis=0))).mean()
    assert whole < half < nothing
    # Another process needs no table_images: the table is in the run's folder. And it may stop early, or add the rest.
    again = dtf.load(run.path)
    lossless = again.encode(images, chunk_bits=10, lossless=True)
    rough = again.encode(images, chunk_bits=10, target_rmse=half)
    (archive,) = again.encode(images, chunk_bits=10, target_rmse=half, archive=True)
    assert len(archive) < len(b"".join(rough))
    np.testing.assert_array_equal(again.decode([archive]), again.decode(rough))
    decoded = again.decode([*files, *lossless, *rough])
    np.testing.assert_allclose(errors(decoded[:3]).mean(), whole)
    np.testing.assert_array_equal(decoded[3:6], images)
    assert errors(decoded[6:]).max() < half + 0.5  # rounded to uint8
    assert len(b"".join(rough)) < len(b"".join(files)) < len(b"".join(lossless))


def test_what_is_no_file_is_refused(run):
    (file,) = run.encode(TRAINING[:1], chunk_bits=10, table_images=TRAINING[:64])
    damaged = file[:-1] + bytes([file[-1] ^ 1])
    for files, message in (
        ([file, damaged], r"files\[1\]"),
        ([b"PNG"], r"files\[0\] is not a compressed image"),
        ([], "files is empty"),
    ):
        with pytest.raises(dtf.InputError, match=message):
            run.decode(files)


@pytest.mark.parametrize("method", ["bits_per_dim", "encode"])
def test_images_of_another_kind_are_refused(run, method):
    for images, found in (
        (TRAINING[0], r"uint8 \[8, 8, 1\]"),
        (TRAINING[:2].astype(np.float32), r"float32 \[2, 8, 8, 1\]"),
        (TRAINING[:0], r"uint8 \[0, 8, 8, 1\]"),
        (TRAINING[:2, :4], r"uint8 \[2, 4, 8, 1\]"),
    ):
        with pytest.raises(dtf.ConfigError, match=rf"images must be uint8 \[N, 8, 8, 1\] with N > 0, not {found}"):
            getattr(run, method)(images)


def test_load_says_what_is_missing(run, tmp_path):
    workdir = run.path
    with pytest.raises(dtf.InputError, match="nothing holds no run"):
        dtf.load(str(tmp_path / "nothing"))
    with pytest.raises(dtf.InputError, match="holds no checkpoint of step 5; there are: "):
        dtf.load(workdir, checkpoint=5)
    with pytest.raises(dtf.ConfigError, match="precision=float16: choose one of"):
        dtf.load(workdir, precision="float16")
    with pytest.raises(dtf.ConfigError, match="strategy=multi_worker trains by"):
        dtf.load(workdir, strategy="multi_worker")
    shutil.copytree(workdir, tmp_path / "damaged")
    (tmp_path / "damaged/config.json").write_text("{")
    with pytest.raises(dtf.InputError, match="config.json"):
        dtf.load(str(tmp_path / "damaged"))


# --- Folders of diffusers ------------------------------------------------------------------------------------------


def diffusers_folder(folder, kind="diffusers_small", **changes):
    """A folder that diffusers 0.42 would load, with weights as the fixture's description draws them."""
    described = json.loads((FIXTURES / "diffusers_small.json").read_text())
    weights = {}
    for key, shape in described["shapes"].items():
        w = np.float32(0.02) * np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)
        weights[key] = w + np.float32(1) if "norm" in key and key.endswith("weight") else w
    if kind == "diffusers_small_hub":
        weights = {described["old_names"].get(key, key): w for key, w in weights.items()}
    for name, config in described[kind].items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        config = {**config, **{field: changes[field] for field in changes.keys() & config.keys()}}
        path.write_text(json.dumps({field: value for field, value in config.items() if value != "absent"}))
        if "block_out_channels" in config:
            safetensors.numpy.save_file(weights, path.with_name("diffusion_pytorch_model.safetensors"))
    return str(folder)


@pytest.mark.parametrize("kind", ["diffusers_small", "diffusers_small_hub"])
def test_load_derives_the_preset_of_a_diffusers_folder(kind, tmp_path):
    run = dtf.load(diffusers_folder(tmp_path, kind))
    found = {field: getattr(run.preset, field) for field in ("image_size", "ch", "ch_mult", "attn_resolutions")}
    assert found == {"image_size": 16, "ch": 32, "ch_mult": (1, 2), "attn_resolutions": (8,)}
    assert (run.preset.num_res_blocks, run.preset.model_var_type, run.step) == (1, "fixedlarge", 0)
    with np.load(FIXTURES / "diffusers_small.npz") as fixture:  # what diffusers itself computes
        ours, expected = run.denoise(fixture["x"], fixture["t"]), fixture["y"]
    assert np.abs(ours - expected).max() < 5e-5 * np.abs(expected).max()
    assert run.sample(2, sampler="ddim", steps=2).shape == (2, 16, 16, 3)
    with pytest.raises(dtf.ConfigError, match="table_images is required: dataset=diffusers"):
        run.encode(np.zeros((1, 16, 16, 3), np.uint8))
    with pytest.raises(dtf.ConfigError, match="checkpoint=3: .* is a diffusers folder"):
        dtf.load(run.path, checkpoint=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_head_dim": 48}, "attention_head_dim=48 does not divide the channels with attention: .64, 64."),
        ({"act_fn": "gelu"}, 'act_fn="gelu"'),
        ({"sample_size": None}, "image_size is required: .* has sample_size=null"),
        ({"block_out_channels": []}, "no preset describes"),
        ({"block_out_channels": [32, 48]}, "block_out_channels"),
        ({"block_out_channels": [0, 0]}, "no preset describes"),
        ({"down_block_types": ["DownBlock2D", "SkipDownBlock2D"]}, "down_block_types"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule"),
        ({"prediction_type": "v_prediction"}, "'v_prediction' is not one of epsilon, sample"),
        ({"beta_end": 2.0}, "no preset describes .*beta_end"),
        ({"layers_per_block": 2}, "holds another network"),
    ],
)
def test_other_diffusers_networks_are_refused(changes, message, tmp_path):
    with pytest.raises(dtf.InputError, match=message) as error:
        dtf.load(diffusers_folder(tmp_path, **changes))
    assert "\n" not in str(error.value)


def test_replicas_and_precision_are_arguments(run, workdir):
    x_t = np.random.RandomState(1).standard_normal((3, 8, 8, 1)).astype(np.float32)
    expected = run.denoise(x_t, 5)
    mirrored = dtf.load(workdir, strategy=tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]))
    np.testing.assert_allclose(mirrored.denoise(x_t, 5), expected, rtol=0, atol=1e-5)
    rounded = dtf.load(workdir, precision="bfloat16").denoise(x_t, 5)
    assert 0 < np.abs(rounded - expected).max() < 0.05 * np.abs(expected).max() + 1e-3


def test_the_network_is_a_keras_model_that_another_process_loads(run, tmp_path):
    x_t, t = np.random.RandomState(0).standard_normal((2, 8, 8, 1)).astype(np.float32), np.array([1, 6], np.int32)
    np.save(tmp_path / "x.npy", x_t)
    run.unet.save(tmp_path / "unet.keras")
    program = """
import keras, numpy as np
import diffusion_tf as dtf
dtf.UNet
unet = keras.saving.load_model("unet.keras")
np.save("y.npy", unet(np.load("x.npy"), np.array([1, 6])))
"""
    environment = {**os.environ, "PYTHONPATH": ":".join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True, capture_output=True)
    expected = run.unet(x_t, t)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(run.denoise(x_t, t), expected, rtol=0, atol=1e-5)
    with pytest.raises(RuntimeError, match="frozen"):
        run.unet.trainable_variables[0].assign(tf.zeros_like(run.unet.trainable_variables[0]))


def test_a_conditional_run_of_an_array_samples_and_measures_by_label(tmp_path):
    images, labels = DIGITS[:60], load_digits().target[:60]
    preset = dataclasses.replace(TINY, num_steps=2, ch_mult=(2,))
    run = dtf.train(preset, str(tmp_path / "run"), images, labels=labels, conditional=True)
    assert run.preset.num_classes == 10 and run.classes == tuple("0123456789")
    assert json.loads((tmp_path / "run/config.json").read_text())["classes"] == list(run.classes)
    for arguments, message in (
        ({"labels": labels}, "labels go with `conditional=True` and `images` that are an array"),
        ({"conditional": True}, "conditional: images of an array has no labels"),
        ({}, r"another recipe \(num_classes: 0 != 10"),
    ):
        with pytest.raises(dtf.ConfigError, match=message):
            dtf.train(preset, run.path, images, **arguments)
    x_t, t = np.ones((2, 8, 8, 1), np.float32), np.array([3, 7])
    for given in ([3, -1], [5, 5]):
        expected = run.unet(tf.constant(x_t), tf.constant(t, tf.int32), tf.constant(given))
        np.testing.assert_allclose(run.denoise(x_t, t, labels=given), expected, rtol=0, atol=1e-5)
    for arguments, message in (
        ({"labels": [3, 10]}, "label=10: the run has classes 0 to 9"),
        ({"labels": [3]}, r"labels must be an int or int \[2\]"),
        ({"labels": [0.5, 1]}, "not float64"),
    ):
        with pytest.raises(dtf.ConfigError, match=message):
            run.denoise(x_t, t, **arguments)
    with pytest.raises(dtf.ConfigError, match="guidance=2 needs samples with a label"):
        run.sample(2, labels=[-1], guidance=2.0)
