"""The functions that training and sampling run, as StableHLO of one replica, and as SavedModels that need no package.

A program is a pure function of named arrays. Scalars are int32, as TPUs have no integers of 64 bits.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import safetensors.numpy
import tensorflow as tf

from diffusion_tf.diffusion_utils import GaussianDiffusion
from diffusion_tf.presets import Preset
from diffusion_tf.rng import CounterRng
from diffusion_tf.samplers import draw, sample_noise
from diffusion_tf.storage.files import check_writable, write_file, write_json
from diffusion_tf.training.optimizer import StateTensors
from diffusion_tf.training.step import train_step
from diffusion_tf.unet import UNet

PROGRAMS = ("train_step", "sample_step", "sampler", "denoiser")
WITH_SAVED_MODEL = ("sampler", "denoiser")


@dataclasses.dataclass(frozen=True)
class Array:
    """An argument or a result.

    Attributes:
      name: what it is.
      shape: static.
      dtype: as NumPy calls it.
      initial: of an argument, the name of the weights that it starts as, or `zeros`; None: the caller's data.
      feeds: of a result, the argument of the next call that it becomes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    initial: str | None = None
    feeds: str | None = None


@dataclasses.dataclass(frozen=True)
class Program:
    """A pure function of tensors in the order of `arguments`, to a list of those in the order of `results`."""

    function: Callable[..., list[tf.Tensor]]
    arguments: list[Array]
    results: list[Array]

    def stablehlo(self) -> str:
        """The function as StableHLO text."""
        specs = [tf.TensorSpec(array.shape, array.dtype) for array in self.arguments]
        compiled = tf.function(self.function, jit_compile=True, autograph=False)
        return compiled.experimental_get_compiler_ir(*specs)(stage="stablehlo")


def build(what: str, preset: Preset, model: UNet | None = None) -> Program:
    """One of PROGRAMS for a replica that computes `preset.batch_size` images, alone.

    Args:
      what: the program.
      preset: the recipe.
      model: its network, whose weights do not matter here; default: a new one.

    Raises:
      InputError: the preset's network cannot be built.
    """
    model = model or UNet.from_preset(preset)
    return {"train_step": _train_step, "sample_step": _sample_step, "sampler": _sampler, "denoiser": _denoiser}[what](
        preset, model
    )


def _weights(model: UNet, dtypes: Sequence[str], prefix: str = "params/", initial: str | None = None) -> list[Array]:
    return [
        Array(prefix + name, tuple(v.shape), dtype, initial or f"params/{name}")
        for name, v, dtype in zip(model.weight_names, model.trainable_variables, dtypes, strict=True)
    ]


def _train_step(preset: Preset, model: UNet) -> Program:
    """`training.train_step`: the state, the step and images to the next state, loss and gradient norm."""
    float32 = ["float32"] * len(model.weight_names)
    state = [
        *_weights(model, float32),
        *_weights(model, float32, "ema/"),
        *_weights(model, float32, "adam_m/", "zeros"),
        *_weights(model, float32, "adam_v/", "zeros"),
        Array("step", (), "int32", "zeros"),
    ]
    count = len(float32)

    def function(*tensors):
        *groups, step, images = tensors
        lists = [list(groups[i : i + count]) for i in range(0, 4 * count, count)]
        before = StateTensors(*lists, tf.cast(step, tf.int64))
        rng = CounterRng(preset.seed, before.step, tf.constant(0, tf.int64))
        after, loss, grad_norm = train_step(model, preset, before, images, rng, lambda x: x)
        return [*tf.nest.flatten(after[:4]), tf.cast(after.step, tf.int32), loss, grad_norm]

    images = Array("images", (preset.batch_size, *preset.image_shape), "uint8")
    results = [dataclasses.replace(array, initial=None, feeds=array.name) for array in state]
    return Program(
        function, [*state, images], [*results, Array("loss", (), "float32"), Array("grad_norm", (), "float32")]
    )


def _sample_step(preset: Preset, model: UNet) -> Program:
    """One step of Algorithm 2, as the sampling loop takes it, at index t = T - 1 ... 0; its x_T is standard normal."""
    diffusion = GaussianDiffusion.from_preset(preset)
    shape = (preset.batch_size, *preset.image_shape)

    def function(*tensors):
        *params, x_t, t, first_image = tensors
        noise = sample_noise(preset.seed, first_image, shape)(t)
        ts = tf.fill([shape[0]], t)
        x_prev, _ = diffusion.p_sample(model.denoise_fn(params), x_t, ts, noise, clip_denoised=True)
        return [x_prev, t - 1]

    x_t, t = Array("x_t", shape, "float32"), Array("t", (), "int32")
    arguments = [*_weights(model, model.compute_dtypes), x_t, t, Array("first_image", (), "int32")]
    return Program(function, arguments, [dataclasses.replace(array, feeds=array.name) for array in (x_t, t)])


def _sampler(preset: Preset, model: UNet) -> Program:
    """All of Algorithm 2: the images `first_image ...` of the preset's seed, float32 in [-1, 1]."""
    diffusion = GaussianDiffusion.from_preset(preset)
    shape = (preset.batch_size, *preset.image_shape)

    def function(*tensors):
        *params, first_image = tensors
        return [draw(diffusion, model.denoise_fn(params), sample_noise(preset.seed, first_image, shape))]

    weights = _weights(model, ["float32"] * len(model.weight_names))
    return Program(function, [*weights, Array("first_image", (), "int32")], [Array("samples", shape, "float32")])


def _denoiser(preset: Preset, model: UNet) -> Program:
    """The network: x_t and t to its output."""
    shape = (preset.batch_size, *preset.image_shape)

    def function(*tensors):
        *params, x_t, t = tensors
        return [model.denoise_fn(params)(x_t, t)]

    out_channels = preset.channels * (2 if preset.model_var_type == "learned" else 1)
    return Program(
        function,
        [
            *_weights(model, ["float32"] * len(model.weight_names)),
            Array("x_t", shape, "float32"),
            Array("t", shape[:1], "int32"),
        ],
        [Array("model_output", (*shape[:3], out_channels), "float32")],
    )


def write(folder: str, what: str, preset: Preset, model: UNet) -> list[str]:
    """Writes a program with the model's weights into `folder`, the manifest last; returns the paths.

    `WHAT.stablehlo.mlir`, `weights.safetensors`, `manifest.json`, and for WITH_SAVED_MODEL the folder `saved_model`.

    Raises:
      InputError: a file cannot be written.
    """
    program = build(what, preset, model)
    weights = {f"params/{n}": v.numpy() for n, v in zip(model.weight_names, model.trainable_variables, strict=True)}
    text_path, weights_path, manifest_path, saved_model = (
        os.path.join(folder, name)
        for name in (f"{what}.stablehlo.mlir", "weights.safetensors", "manifest.json", "saved_model")
    )
    check_writable(manifest_path)
    write_file(text_path, program.stablehlo().encode())
    write_file(weights_path, safetensors.numpy.save(weights))
    paths = [text_path, weights_path]
    if what in WITH_SAVED_MODEL:
        _write_saved_model(saved_model, what, preset, model, program)
        paths.append(saved_model)
    manifest = {
        "what": what,
        "program": os.path.basename(text_path),
        "weights": os.path.basename(weights_path),
        "preset": dataclasses.asdict(preset),
        "arguments": [_describe(array) for array in program.arguments],
        "results": [_describe(array) for array in program.results],
    }
    write_json(manifest_path, manifest)
    return [*paths, manifest_path]


def _describe(array: Array) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(array).items() if value is not None}


def _write_saved_model(path: str, what: str, preset: Preset, model: UNet, program: Program) -> None:
    """A SavedModel with one signature; the denoiser takes any number of images, the sampler draws `batch_size`."""
    module = tf.Module()
    module.params = [tf.Variable(v.value) for v in model.trainable_variables]
    data = program.arguments[len(module.params) :]
    batch = None if what == "denoiser" else preset.batch_size
    specs = [tf.TensorSpec((batch, *array.shape[1:]) if array.shape else (), array.dtype, array.name) for array in data]

    @tf.function(input_signature=specs, autograph=False)
    def serving_default(*tensors):
        return {program.results[0].name: program.function(*module.params, *tensors)[0]}

    module.serving_default = serving_default
    tf.saved_model.save(module, path, signatures=serving_default)
