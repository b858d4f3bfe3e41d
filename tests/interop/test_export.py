"""Exported programs, run by JAX from their files alone, compute the same as training and sampling."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
import tensorflow as tf
from support import golden
from support.forked_programs import run_fork

from diffusion_tf.data import open_source
from diffusion_tf.interop import export
from diffusion_tf.interop.stablehlo import compile_for
from diffusion_tf.presets import get_preset
from diffusion_tf.runtime.strategies import make_strategy
from diffusion_tf.samplers import Sampler, sample_noise
from diffusion_tf.storage import checkpoints
from diffusion_tf.storage.workdir import Workdir
from diffusion_tf.trained_model import TrainedModel
from diffusion_tf.training.state import TrainState
from diffusion_tf.training.trainer import Trainer
from diffusion_tf.unet import UNet

os.environ["JAX_PLATFORMS"] = "cpu"
PRESET = get_preset(
    "digits", batch_size=8, num_timesteps=6, dropout=0.1, random_flip=True, ch_mult=(1,), attn_resolutions=(8,),
    warmup_steps=4,
)  # fmt: skip


class Exported:
    """An exported program; calling it returns the results by name, and feeds them into the next call."""

    def __init__(self, folder):
        import jax

        self.manifest = json.loads((folder / "manifest.json").read_text())
        weights = safetensors.numpy.load_file(folder / self.manifest["weights"])
        device = jax.devices("cpu")[0]
        self.executable = compile_for([device], (folder / self.manifest["program"]).read_text(), {})
        self.put = lambda array: jax.device_put(array, device)
        self.arrays = {}
        for argument in self.manifest["arguments"]:
            initial = argument.get("initial")
            if initial:
                value = np.zeros(argument["shape"]) if initial == "zeros" else weights[initial]
                self.arrays[argument["name"]] = self.put(value.astype(jax.numpy.dtype(argument["dtype"])))

    def __call__(self, **data):
        arguments = self.manifest["arguments"]
        dtypes = {argument["name"]: argument["dtype"] for argument in arguments}
        self.arrays |= {name: self.put(np.asarray(value, dtypes[name])) for name, value in data.items()}
        outputs = self.executable.execute([self.arrays[argument["name"]] for argument in arguments])
        results = {}
        for result, output in zip(self.manifest["results"], outputs, strict=True):
            assert (list(output.shape), str(output.dtype)) == (result["shape"], result["dtype"]), result["name"]
            results[result["name"]] = np.asarray(output)
            if "feeds" in result:
                self.arrays[result["feeds"]] = output
        return results


def random_model(preset):
    model = UNet.from_preset(preset)
    golden.assign_random_weights(model, np.random.RandomState(5))
    return model


@pytest.mark.slow  # test_exported_training.py compares the same step within a loop
def test_ten_exported_steps_equal_the_training_loop(tmp_path):
    trainer = Trainer(PRESET, make_strategy("one_device"))
    export.write(str(tmp_path), "train_step", PRESET, trainer.state.model)
    exported = Exported(tmp_path)
    source = open_source(PRESET)
    images = iter(trainer.batches(source))
    seen = [next(images).numpy() for _ in range(10)]
    batches = trainer.batches(source)
    for step in range(10):
        expected = trainer.run_steps(batches, tf.constant(1))
        results = exported(images=seen[step])
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(results[name], expected[name], rtol=1e-5, err_msg=f"{name} of step {step}")
    state = trainer.state.to_arrays()
    off = np.concatenate([np.abs(results[name] - array).ravel() for name, array in state.items()])
    # Where the gradient is zero, as for biases before normalisation, Adam turns rounding errors into full steps.
    assert np.mean(off < 1e-5) > 0.99
    assert results["step"] == 10


@pytest.mark.slow
def test_a_call_of_the_loop_is_that_many_steps(tmp_path):
    model = UNet.from_preset(PRESET)
    export.write(str(tmp_path / "step"), "train_step", PRESET, model)
    export.write(str(tmp_path / "loop"), "train_loop", PRESET, model, steps_per_call=4)
    step, loop = Exported(tmp_path / "step"), Exported(tmp_path / "loop")
    images = np.random.RandomState(0).randint(0, 256, (4, 8, 8, 8, 1))
    for _ in range(2):
        found = loop(num_steps=3, images=images)
        for i in range(3):
            expected = step(images=images[i])
            np.testing.assert_allclose(found["loss"][i], expected["loss"], rtol=1e-5)
            np.testing.assert_allclose(found["grad_norm"][i], expected["grad_norm"], rtol=1e-5)
    assert found["step"] == expected["step"] == 6 and found["loss"][3] == 0
    off = np.concatenate([np.abs(found[name] - array).ravel() for name, array in expected.items() if "/" in name])
    # Where the gradient is zero, as for biases before normalisation, Adam turns rounding errors into full steps.
    assert np.mean(off < 1e-6) > 0.99
    params = [array for name, array in found.items() if name.startswith("params/")]
    norm = np.sqrt(sum(np.sum(np.square(array, dtype=np.float64)) for array in params))
    np.testing.assert_allclose(found["param_norm"], norm, rtol=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_exported_sampling_equals_the_sampler(tmp_path, precision):
    preset = get_preset("digits", batch_size=3, num_timesteps=6, ch_mult=(1,), precision=precision, seed=4)
    model = random_model(preset)
    expected = Sampler(TrainedModel(preset, make_strategy("one_device"), model), batch_size=3, seed=4)(7)
    tolerance = 1e-4 if precision == "float32" else 0.05

    export.write(str(tmp_path / "sampler"), "sampler", preset, model)
    samples = Exported(tmp_path / "sampler")(first_image=7)["samples"]
    np.testing.assert_allclose(samples, expected, atol=tolerance)
    loaded = tf.saved_model.load(str(tmp_path / "sampler/saved_model"))
    samples = loaded.signatures["serving_default"](first_image=tf.constant(7))["samples"]
    np.testing.assert_allclose(samples, expected, atol=tolerance)

    export.write(str(tmp_path / "step"), "sample_step", preset, model)
    step = Exported(tmp_path / "step")
    assert {a["dtype"] for a in step.manifest["arguments"] if a.get("initial")} == {"float32", precision}
    noise = sample_noise(4, tf.constant(7), (3, *preset.image_shape))(tf.constant(6))
    results = step(x_t=noise, t=5, first_image=7)
    for t in range(4, -1, -1):
        assert results["t"] == t
        results = step()
    np.testing.assert_allclose(np.clip(results["x_t"], -1, 1), expected, atol=tolerance)


def test_the_denoisers_saved_model_does_not_need_the_package(tmp_path):
    model = random_model(PRESET)
    export.write(str(tmp_path), "denoiser", PRESET, model)
    x_t, t = np.random.RandomState(0).standard_normal((8, 8, 8, 1)).astype(np.float32), np.arange(8) % 6
    expected = model(x_t, t)
    np.testing.assert_allclose(Exported(tmp_path)(x_t=x_t, t=t)["model_output"], expected, atol=1e-5)
    np.savez(tmp_path / "inputs.npz", x_t=x_t[:5], t=t[:5].astype(np.int32))
    program = """
import sys, numpy as np, tensorflow as tf
inputs = np.load("inputs.npz")
serve = tf.saved_model.load("saved_model").signatures["serving_default"]
np.save("output.npy", serve(x_t=tf.constant(inputs["x_t"]), t=tf.constant(inputs["t"]))["model_output"])
assert "diffusion_tf" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, capture_output=True)
    np.testing.assert_allclose(np.load(tmp_path / "output.npy"), expected[:5], atol=1e-5)


def test_the_program_exports_the_ema_weights_of_a_run(tmp_path):
    state = TrainState(PRESET, make_strategy("one_device"))
    for ema in state.ema:
        ema.assign(ema + 0.5)
    workdir = Workdir(str(tmp_path / "run"))
    workdir.write_config(PRESET, 1618, "")
    checkpoints.save(workdir.checkpoints, 1, state.to_arrays())
    result = run_fork(
        "export",
        f"--workdir={tmp_path}/run",
        "--what=denoiser",
        "--per_replica_batch=2",
        "--checkpoint=1",
        f"--out={tmp_path}/x",
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [
        f"{tmp_path}/x/{name}"
        for name in ("denoiser.stablehlo.mlir", "weights.safetensors", "saved_model", "manifest.json")
    ]
    exported = safetensors.numpy.load_file(tmp_path / "x/weights.safetensors")
    checkpoint = safetensors.numpy.load_file(tmp_path / "run/checkpoints/step_00000001.safetensors")
    assert len(exported) == sum(name.startswith("ema/") for name in checkpoint)
    for name, array in exported.items():
        np.testing.assert_array_equal(array, checkpoint[name.replace("params/", "ema/")])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--out=x"], "--what is required"),
        (["--what=sampler", "--out=x", "--batch_size=4"], "--batch_size is for all replicas"),
        (["--what=sampler", "--out=x", "--workdir=w", "--dataset=cifar10"], "--dataset does not go with --workdir"),
        (["--what=sampler", "--out=x", "--checkpoint=4"], "--checkpoint goes with --workdir"),
        (["--what=sampler", "--out=x", "--steps_per_call=4"], "--steps_per_call goes with --what=train_loop"),
        (["--what=sampler", "--out=/proc/x"], "cannot write /proc/x/manifest.json"),
    ],
)
def test_bad_flags_give_one_line(args, message):
    result = run_fork("export", *args)
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 1 and len(lines) == 1, result.stderr
    assert lines[0].startswith("export: ") and message in lines[0]


@pytest.mark.parametrize(
    "what",
    [
        "denoiser",
        "sample_step",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("sampler", "train_step", "train_loop")),
    ],
)
def test_programs_of_a_network_with_classes_take_labels(what):
    """Against the same program of the network without classes that holds the row of one label."""
    preset = dataclasses.replace(PRESET, num_classes=3, label_dropout=0.0, ch_mult=(2,))
    plain = random_model(dataclasses.replace(preset, num_classes=0))
    model = random_model(preset)
    by_name = dict(zip(plain.weight_names, plain.trainable_variables, strict=True))
    for name, variable in zip(model.weight_names, model.trainable_variables, strict=True):
        if name in by_name:
            variable.assign(by_name[name])
    plain.temb_dense1.bias.assign(plain.temb_dense1.bias + model.class_embedding.kernel[2])
    random = np.random.RandomState(0)
    data = {
        "x_t": random.standard_normal((8, 8, 8, 1)), "t": np.arange(8) % 6 if what == "denoiser" else 5,
        "images": random.randint(0, 256, (8, 8, 8, 1)), "first_image": 7, "labels": np.full(8, 2), "step": 0,
        "num_steps": 1,
    }  # fmt: skip

    def results(preset, model):
        program = export.build(what, preset, model, steps_per_call=1)
        weights = {f"params/{n}": v.value for n, v in zip(model.weight_names, model.trainable_variables, strict=True)}
        zeros = {a.name: tf.zeros(a.shape) for a in program.arguments if a.name.startswith("adam_")}
        values = {**data, **weights, **zeros, **{k.replace("params", "ema"): v for k, v in weights.items()}}
        arguments = [tf.reshape(tf.cast(values[array.name], array.dtype), array.shape) for array in program.arguments]
        outputs = tf.function(program.function, autograph=False)(*arguments)
        found = dict(zip([array.name for array in program.results], outputs, strict=True))
        return {name: value for name, value in found.items() if name in ("samples", "model_output", "x_t", "loss")}

    given, expected = results(preset, model), results(dataclasses.replace(preset, num_classes=0), plain)
    assert given.keys() == expected.keys()
    for name, value in given.items():
        np.testing.assert_allclose(value, expected[name], atol=1e-4, err_msg=name)
