"""Exports training and sampling for one replica, as StableHLO and as SavedModels that do not need this package.

A program is a pure function of named arrays. Integer scalars are int32, since TPUs have no 64-bit integers. Several
replicas run the same train_loop on their shares of the batch, and sum their gradients in it.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import safetensors.numpy
import tensorflow as tf
from tensorflow.compiler.tf2xla.ops import gen_xla_ops  # TensorFlow has no public name for XLA's collectives

from diffusion_tf.diffusion_utils import DenoiseFn, GaussianDiffusion
from diffusion_tf.errors import ConfigError
from diffusion_tf.interop import ANY_DEVICE, STEPS_PER_CALL, TPU_DEVICE
from diffusion_tf.presets import Preset
from diffusion_tf.rng import CounterRng
from diffusion_tf.runtime.replicas import computed_for_tpu
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

    def stablehlo(self, *, for_tpu: bool = False) -> str:
        """Returns the function as StableHLO text; `for_tpu`: with the operations as a TPU computes them."""
        function = computed_for_tpu(self.function) if for_tpu else self.function
        specs = [tf.TensorSpec(array.shape, array.dtype) for array in self.arguments]
        compiled = tf.function(function, jit_compile=True, autograph=False)
        return compiled.experimental_get_compiler_ir(*specs)(stage="stablehlo")


def build(
    what: str, preset: Preset, model: UNet | None = None, steps_per_call: int = STEPS_PER_CALL, replicas: int = 1
) -> Program:
    """Returns one of PROGRAMS for one replica, which computes `preset.batch_size` / `replicas` images.

    Args:
      what: the program.
      preset: the recipe.
      model: its network, whose weights do not matter here; default: a new one.
      steps_per_call: the most steps that train_loop takes in a call.
      replicas: the number of devices that run a train_loop together.

    Raises:
      ConfigError: the batch size is not divisible by the replicas.
      InputError: the preset's network cannot be built.
    """
    if preset.batch_size % replicas:
        raise ConfigError(
            "replicas", f"={replicas} do not divide the batch of {preset.batch_size} images: give `per_replica_batch`"
        )
    model = model or UNet.from_preset(preset)
    if what == "train_loop":
        return _train_loop(preset, model, steps_per_call, replicas)
    builders = {"train_step": _train_step, "sample_step": _sample_step, "sampler": _sampler, "denoiser": _denoiser}
    return builders[what](preset, model)


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


def _labels(preset: Preset, *shape: int) -> list[Array]:
    """Returns the argument `labels`, the label of each image or -1, if the preset has classes."""
    return [Array("labels", shape or (preset.batch_size,), "int32")] if preset.num_classes else []


def _denoise_fn(model: UNet, params: Sequence[tf.Tensor], labels: Sequence[tf.Tensor]) -> DenoiseFn:
    """Returns the network with these weights for `labels`, none or those of the images."""
    network = model.denoise_fn(params)
    return lambda x_t, t: network(x_t, t, *labels)


def _state(model: UNet) -> list[Array]:
    """Returns the arguments that hold the state of training, in the order of `StateTensors`."""
    float32 = ["float32"] * len(model.weight_names)
    return [
        *_weights(model, float32),
        *_weights(model, float32, "ema"),
        *_weights(model, float32, "adam_m", "zeros"),
        *_weights(model, float32, "adam_v", "zeros"),
        Array("step", (), "int32", "zeros"),
    ]


def _fed_back(arrays: Sequence[Array]) -> list[Array]:
    """Returns the results that become these arguments in the next call."""
    return [dataclasses.replace(array, initial=None, feeds=array.name) for array in arrays]


def _step(
    preset: Preset, model: UNet, state: Sequence[tf.Tensor], examples: Sequence[tf.Tensor], replicas: int = 1
) -> list[tf.Tensor]:
    """Returns the tensors of `_state` after a step on images and, with classes, labels; its loss and gradient norm.

    Args:
      preset: the recipe.
      model: its network.
      state: the tensors of `_state`.
      examples: the replica's share of the batch.
      replicas: the number of replicas.
    """
    *weights, step = state
    count = len(model.weight_names)
    params, ema, adam_m, adam_v = (list(weights[i : i + count]) for i in range(0, 4 * count, count))
    before = StateTensors(params, ema, adam_m, adam_v, tf.cast(step, tf.int64))
    images, *labels = examples
    first_example = tf.constant(0, tf.int64)
    if replicas > 1:
        first_example = tf.cast(gen_xla_ops.xla_replica_id(), tf.int64) * images.shape[0]
    rng = CounterRng(preset.seed, before.step, first_example)
    after, loss, grad_norm = train_step(model, preset, before, images, rng, _all_reduce(replicas), *labels)
    return [*tf.nest.flatten(after[:4]), tf.cast(after.step, tf.int32), loss, grad_norm]


def _all_reduce(replicas: int) -> Callable[[Any], Any]:
    """Returns the function that sums a structure of tensors over the replicas."""
    if replicas == 1:
        return lambda structure: structure
    groups = [list(range(replicas))]  # one, of all replicas
    return lambda structure: tf.nest.map_structure(
        lambda x: gen_xla_ops.xla_all_reduce(x, groups, reduce_op="Add", mode="CrossReplica"), structure
    )


def _train_step(preset: Preset, model: UNet) -> Program:
    """Returns `training.step.train_step`: (state, images, labels if any) to (next state, loss, gradient norm)."""
    state = _state(model)

    def function(*tensors: tf.Tensor) -> list[tf.Tensor]:
        return _step(preset, model, tensors[: len(state)], tensors[len(state) :])

    images = Array("images", (preset.batch_size, *preset.image_shape), "uint8")
    return Program(
        function,
        [*state, images, *_labels(preset)],
        [*_fed_back(state), Array("loss", (), "float32"), Array("grad_norm", (), "float32")],
    )


def _train_loop(preset: Preset, model: UNet, steps_per_call: int, replicas: int) -> Program:
    """Returns a loop of training steps: (state, num_steps, images, labels if any) to the state after `num_steps` steps.

    Step i of a call takes images[i], of which each replica has its share. Further results are the loss and gradient
    norm of each step, [steps_per_call] with zeros from `num_steps` on, and the global norm of the weights after the
    last one. All results are equal on all replicas.

    Args:
      preset: the recipe.
      model: its network.
      steps_per_call: the most steps of a call.
      replicas: the number of replicas.
    """
    state, count, share = _state(model), len(model.weight_names), preset.batch_size // replicas

    def function(*tensors: tf.Tensor) -> list[tf.Tensor]:
        num_steps, *examples = tensors[len(state) :]
        zeros = tf.zeros([steps_per_call])

        def step(i: tf.Tensor, before: list, losses: tf.Tensor, norms: tf.Tensor) -> tuple:
            *after, loss, norm = _step(preset, model, before, [array[i] for array in examples], replicas)
            is_now = tf.range(steps_per_call) == i
            return i + 1, after, tf.where(is_now, loss, losses), tf.where(is_now, norm, norms)

        _, after, losses, norms = tf.while_loop(
            lambda i, *_: i < num_steps,
            step,
            (tf.constant(0), list(tensors[: len(state)]), zeros, zeros),
            maximum_iterations=steps_per_call,
        )
        return [*after, losses, norms, tf.linalg.global_norm(after[:count])]

    images = Array("images", (steps_per_call, share, *preset.image_shape), "uint8")
    of_steps = [Array(name, (steps_per_call,), "float32") for name in ("loss", "grad_norm")]
    return Program(
        function,
        [*state, Array("num_steps", (), "int32"), images, *_labels(preset, steps_per_call, share)],
        [*_fed_back(state), *of_steps, Array("param_norm", (), "float32")],
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


def write(
    folder: str,
    what: str,
    preset: Preset,
    model: UNet,
    *,
    steps_per_call: int = STEPS_PER_CALL,
    replicas: int = 1,
    device: str = ANY_DEVICE,
    init_from: dict[str, str] | None = None,
) -> list[str]:
    """Writes `WHAT.stablehlo.mlir`, `weights.safetensors`, `saved_model/` (for WITH_SAVED_MODEL) and `manifest.json`.

    Args:
      folder: the folder to write to.
      what: one of PROGRAMS.
      preset: the recipe.
      model: the network, with the weights to write.
      steps_per_call: as for `build`.
      replicas: as for `build`.
      device: one of DEVICES; the StableHLO for `tpu` takes fewer cycles there, with other rounding.
      init_from: `path` and `sha256` of the checkpoint that holds the weights; None: they are initial ones.

    Returns:
      The paths, the manifest last.

    Raises:
      ConfigError: the batch size is not divisible by the replicas.
      InputError: a file cannot be written.
    """
    program = build(what, preset, model, steps_per_call, replicas)
    weights = {f"params/{n}": v.numpy() for n, v in zip(model.weight_names, model.trainable_variables, strict=True)}
    names = (f"{what}.stablehlo.mlir", "weights.safetensors", "saved_model", "manifest.json")
    program_path, weights_path, saved_model_path, manifest_path = (os.path.join(folder, name) for name in names)
    check_writable(manifest_path)  # before the work
    write_file(program_path, program.stablehlo(for_tpu=device == TPU_DEVICE).encode())
    write_file(weights_path, safetensors.numpy.save(weights))
    paths = [program_path, weights_path]
    if what in WITH_SAVED_MODEL:
        _write_saved_model(saved_model_path, program, model, any_batch=what == "denoiser")
        paths.append(saved_model_path)
    manifest: dict[str, Any] = {
        "what": what,
        "device": device,
        "program": os.path.basename(program_path),
        "weights": os.path.basename(weights_path),
        "preset": dataclasses.asdict(preset),
        "arguments": [_describe(array) for array in program.arguments],
        "results": [_describe(array) for array in program.results],
    }
    if what == "train_loop":
        manifest |= {"steps_per_call": steps_per_call, "replicas": replicas, "init_from": init_from}
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
