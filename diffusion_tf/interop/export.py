"""Exports training and sampling for one replica, as StableHLO and as SavedModels that do not need this package.

A program is a pure function of named arrays. Integer scalars are int32, since TPUs have no 64-bit integers.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import safetensors.numpy
import tensorflow as tf

from diffusion_tf.diffusion_utils import DenoiseFn, GaussianDiffusion
from diffusion_tf.presets import Preset
from diffusion_tf.rng import CounterRng
from diffusion_tf.samplers import p_sample_loop, sample_noise
from diffusion_tf.storage.files import check_writable, remove, replacing, write_file
from diffusion_tf.storage.json_files import write_json
from diffusion_tf.training.optimizer import StateTensors
from diffusion_tf.training.step import train_step
from diffusion_tf.unet import UNet

WITH_SAVED_MODEL = ("sampler", "denoiser")


@dataclasses.dataclass(frozen=True)
class Array:
    """An argument or a result of a program.

    Attributes:
      name: the name in the manifest.
      shape: the static shape.
      dtype: the NumPy name of the dtype.
      initial: for an argument, the weights that it holds in the first call, or `zeros`; None: data from the caller.
      feeds: for a result, the argument that it becomes in the next call.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    initial: str | None = None
    feeds: str | None = None


@dataclasses.dataclass(frozen=True)
class Program:
    """A pure function of tensors in the order of `arguments`; it returns a list in the order of `results`."""

    function: Callable[..., list[tf.Tensor]]
    arguments: list[Array]
    results: list[Array]

    def stablehlo(self) -> str:
        """Returns the function as StableHLO text."""
        specs = [tf.TensorSpec(array.shape, array.dtype) for array in self.arguments]
        compiled = tf.function(self.function, jit_compile=True, autograph=False)
        return compiled.experimental_get_compiler_ir(*specs)(stage="stablehlo")


def build(what: str, preset: Preset, model: UNet | None = None) -> Program:
    """Returns one of PROGRAMS for one replica, which computes `preset.batch_size` images.

    Args:
      what: the program.
      preset: the recipe.
      model: its network, whose weights do not matter here; default: a new one.

    Raises:
      InputError: the preset's network cannot be built.
    """
    builders = {"train_step": _train_step, "sample_step": _sample_step, "sampler": _sampler, "denoiser": _denoiser}
    return builders[what](preset, model or UNet.from_preset(preset))


def _weights(model: UNet, dtypes: Sequence[str], group: str = "params", initial: str | None = None) -> list[Array]:
    """Returns one argument for each weight of the network.

    Args:
      model: the network.
      dtypes: the dtype of each argument.
      group: the first component of the names.
      initial: what the arguments hold in the first call; default: the weights.
    """
    return [
        Array(f"{group}/{name}", tuple(v.shape), dtype, initial or f"params/{name}")
        for name, v, dtype in zip(model.weight_names, model.trainable_variables, dtypes, strict=True)
    ]


def _labels(preset: Preset) -> list[Array]:
    """Returns the argument `labels`, the label of each image or -1, if the preset has classes."""
    return [Array("labels", (preset.batch_size,), "int32")] if preset.num_classes else []


def _denoise_fn(model: UNet, params: Sequence[tf.Tensor], labels: Sequence[tf.Tensor]) -> DenoiseFn:
    """Returns the network with these weights for `labels`, none or those of the images."""
    network = model.denoise_fn(params)
    return lambda x_t, t: network(x_t, t, *labels)


def _train_step(preset: Preset, model: UNet) -> Program:
    """Returns `training.step.train_step`: (state, images, labels if any) to (next state, loss, gradient norm)."""
    float32 = ["float32"] * len(model.weight_names)
    state = [
        *_weights(model, float32),
        *_weights(model, float32, "ema"),
        *_weights(model, float32, "adam_m", "zeros"),
        *_weights(model, float32, "adam_v", "zeros"),
        Array("step", (), "int32", "zeros"),
    ]
    count = len(float32)

    def function(*tensors: tf.Tensor) -> list[tf.Tensor]:
        *groups, step, images = tensors[: 4 * count + 2]
        params, ema, adam_m, adam_v = (list(groups[i : i + count]) for i in range(0, 4 * count, count))
        before = StateTensors(params, ema, adam_m, adam_v, tf.cast(step, tf.int64))
        rng = CounterRng(preset.seed, before.step, tf.constant(0, tf.int64))
        after, loss, grad_norm = train_step(model, preset, before, images, rng, lambda x: x, *tensors[4 * count + 2 :])
        return [*tf.nest.flatten(after[:4]), tf.cast(after.step, tf.int32), loss, grad_norm]

    images = Array("images", (preset.batch_size, *preset.image_shape), "uint8")
    results = [dataclasses.replace(array, initial=None, feeds=array.name) for array in state]
    return Program(
        function,
        [*state, images, *_labels(preset)],
        [*results, Array("loss", (), "float32"), Array("grad_norm", (), "float32")],
    )


def _sample_step(preset: Preset, model: UNet) -> Program:
    """Returns one iteration of Algorithm 2: x_t to x_{t-1}, t = T - 1, ..., 0; the caller draws x_T from N(0, I)."""
    diffusion = GaussianDiffusion.from_preset(preset)
    shape, count = (preset.batch_size, *preset.image_shape), len(model.weight_names)

    def function(*tensors: tf.Tensor) -> list[tf.Tensor]:
        params, (x_t, t, first_image, *labels) = tensors[:count], tensors[count:]
        noise = sample_noise(preset.seed, first_image, shape)(t)
        ts = tf.fill([shape[0]], t)
        x_prev, _ = diffusion.p_sample(_denoise_fn(model, params, labels), x_t, ts, noise, clip_denoised=True)
        return [x_prev, t - 1]

    x_t, t = Array("x_t", shape, "float32"), Array("t", (), "int32")
    weights = _weights(model, model.compute_dtypes)
    arguments = [*weights, x_t, t, Array("first_image", (), "int32"), *_labels(preset)]
    return Program(function, arguments, [dataclasses.replace(array, feeds=array.name) for array in (x_t, t)])


def _sampler(preset: Preset, model: UNet) -> Program:
    """Returns all of Algorithm 2: images `first_image`, ... of the preset's seed, float32 in [-1, 1]."""
    diffusion = GaussianDiffusion.from_preset(preset)
    shape, count = (preset.batch_size, *preset.image_shape), len(model.weight_names)

    def function(*tensors: tf.Tensor) -> list[tf.Tensor]:
        params, (first_image, *labels) = tensors[:count], tensors[count:]
        noise_fn = sample_noise(preset.seed, first_image, shape)
        x_start = p_sample_loop(diffusion, _denoise_fn(model, params, labels), noise_fn)
        return [tf.clip_by_value(x_start, -1.0, 1.0)]

    arguments = [*_weights(model, ["float32"] * count), Array("first_image", (), "int32"), *_labels(preset)]
    return Program(function, arguments, [Array("samples", shape, "float32")])


def _denoiser(preset: Preset, model: UNet) -> Program:
    """Returns the network: x_t, t and, with classes, labels to its output."""
    shape, count = (preset.batch_size, *preset.image_shape), len(model.weight_names)

    def function(*tensors: tf.Tensor) -> list[tf.Tensor]:
        params, inputs = tensors[:count], tensors[count:]
        return [model.denoise_fn(params)(*inputs)]

    out_channels = preset.channels * (2 if preset.model_var_type == "learned" else 1)
    inputs = [Array("x_t", shape, "float32"), Array("t", shape[:1], "int32"), *_labels(preset)]
    arguments = [*_weights(model, ["float32"] * count), *inputs]
    return Program(function, arguments, [Array("model_output", (*shape[:3], out_channels), "float32")])


def write(folder: str, what: str, preset: Preset, model: UNet) -> list[str]:
    """Writes `WHAT.stablehlo.mlir`, `weights.safetensors`, `saved_model/` (for WITH_SAVED_MODEL) and `manifest.json`.

    Args:
      folder: the folder to write to.
      what: one of PROGRAMS.
      preset: the recipe.
      model: the network, with the weights to write.

    Returns:
      The paths, the manifest last.

    Raises:
      InputError: a file cannot be written.
    """
    program = build(what, preset, model)
    weights = {f"params/{n}": v.numpy() for n, v in zip(model.weight_names, model.trainable_variables, strict=True)}
    names = (f"{what}.stablehlo.mlir", "weights.safetensors", "saved_model", "manifest.json")
    program_path, weights_path, saved_model_path, manifest_path = (os.path.join(folder, name) for name in names)
    check_writable(manifest_path)  # before the work
    write_file(program_path, program.stablehlo().encode())
    write_file(weights_path, safetensors.numpy.save(weights))
    paths = [program_path, weights_path]
    if what in WITH_SAVED_MODEL:
        _write_saved_model(saved_model_path, program, model, any_batch=what == "denoiser")
        paths.append(saved_model_path)
    manifest = {
        "what": what,
        "program": os.path.basename(program_path),
        "weights": os.path.basename(weights_path),
        "preset": dataclasses.asdict(preset),
        "arguments": [_describe(array) for array in program.arguments],
        "results": [_describe(array) for array in program.results],
    }
    write_json(manifest_path, manifest)
    return [*paths, manifest_path]


def _describe(array: Array) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(array).items() if value is not None}


def _write_saved_model(path: str, program: Program, model: UNet, *, any_batch: bool) -> None:
    """Writes a SavedModel whose signature `serving_default` is the program with the model's weights.

    Args:
      path: the folder to write.
      program: the program; its first arguments are the weights, and it has one result.
      model: the network.
      any_batch: whether the first dimension of the other arguments may have any size.
    """
    module = tf.Module()
    module.params = [tf.Variable(v.value) for v in model.trainable_variables]
    data = program.arguments[len(module.params) :]
    shapes = [(None, *array.shape[1:]) if any_batch else array.shape for array in data]
    specs = [tf.TensorSpec(shape, array.dtype, array.name) for shape, array in zip(shapes, data, strict=True)]

    @tf.function(input_signature=specs, autograph=False)
    def serving_default(*tensors: tf.Tensor) -> dict[str, tf.Tensor]:
        return {program.results[0].name: program.function(*module.params, *tensors)[0]}

    module.serving_default = serving_default
    with replacing(path) as temporary:
        tf.saved_model.save(module, temporary, signatures=serving_default)
        remove(path)  # of an earlier export
