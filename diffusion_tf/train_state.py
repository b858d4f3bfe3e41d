"""What a run is made of: weights, EMA, Adam's moments and the step; how they move, and how they are saved."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from diffusion_tf import checkpoints
from diffusion_tf.errors import InputError
from diffusion_tf.presets import Preset
from diffusion_tf.unet import UNet

ADAM_BETA1, ADAM_BETA2, ADAM_EPSILON = 0.9, 0.999, 1e-8


def warmed_up_learning_rate(learning_rate: float, warmup_steps: int, step: tf.Tensor) -> tf.Tensor:
    """The learning rate of the step that has `step` steps before it: the first one's is 0 (Appendix B)."""
    if warmup_steps == 0:
        return tf.constant(learning_rate, tf.float32)
    return learning_rate * tf.minimum(tf.cast(step, tf.float32) / warmup_steps, 1.0)


class StateTensors(NamedTuple):
    """What a training step maps to its next value: lists in the order of the model's variables, and the step, int64."""

    params: list[tf.Tensor]
    ema: list[tf.Tensor]
    adam_m: list[tf.Tensor]
    adam_v: list[tf.Tensor]
    step: tf.Tensor


def apply_gradients(
    state: StateTensors, grads: Sequence[tf.Tensor], clip: tf.Tensor, usable: tf.Tensor, preset: Preset
) -> StateTensors:
    """Adam and EMA in float32, by the gradients times `clip`; unless `usable`, a boolean, only the step moves."""
    learning_rate = warmed_up_learning_rate(preset.learning_rate, preset.warmup_steps, state.step)
    k = tf.cast(state.step + 1, tf.float32)
    step_size = learning_rate * tf.sqrt(1.0 - ADAM_BETA2**k) / (1.0 - ADAM_BETA1**k)

    updated = [
        _update_one(before, grad * clip, step_size, usable, preset.ema_decay)
        for *before, grad in zip(*state[:4], grads, strict=True)
    ]
    params, ema, adam_m, adam_v = (list(group) for group in zip(*updated, strict=True))
    return StateTensors(params, ema, adam_m, adam_v, state.step + 1)


def _update_one(before, grad, step_size, usable, ema_decay: float) -> list[tf.Tensor]:
    """A variable, its EMA and its moments after the step."""
    w, ema, m, v = before
    m = ADAM_BETA1 * m + (1.0 - ADAM_BETA1) * grad
    v = ADAM_BETA2 * v + (1.0 - ADAM_BETA2) * tf.square(grad)
    w = w - step_size * m / (tf.sqrt(v) + ADAM_EPSILON)
    # In float32 even the constant, as the authors' graph has it: 1 - 0.9999 is 1.00017e-4.
    ema = ema - (ema - w) * (1.0 - tf.constant(ema_decay, tf.float32))
    return [tf.where(usable, new, old) for new, old in zip((w, ema, m, v), before, strict=True)]


class TrainState:
    """What a run is made of: the model, its EMA, Adam's moments and the step, as variables of one strategy."""

    def __init__(self, preset: Preset, strategy: tf.distribute.Strategy):
        with strategy.scope():
            self.model = UNet.from_preset(preset)
            self.params = [v.value for v in self.model.trainable_variables]
            # The shadow weights start as the weights (Appendix B: decay 0.9999, no correction for the start).
            self.ema = [tf.Variable(w.numpy(), trainable=False, name="ema") for w in self.params]
            self.adam_m = [tf.Variable(tf.zeros(w.shape), trainable=False, name="adam_m") for w in self.params]
            self.adam_v = [tf.Variable(tf.zeros(w.shape), trainable=False, name="adam_v") for w in self.params]
            self.step = tf.Variable(0, trainable=False, dtype=tf.int64, name="step")

    def _named_variables(self) -> dict[str, tf.Variable]:
        groups = {"params": self.params, "ema": self.ema, "adam_m": self.adam_m, "adam_v": self.adam_v}
        names = self.model.weight_names
        named = {f"{group}/{name}": v for group, vs in groups.items() for name, v in zip(names, vs, strict=True)}
        return {**named, "step": self.step}

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Every variable by name, as a checkpoint holds it."""
        return {name: np.asarray(variable.numpy()) for name, variable in self._named_variables().items()}

    def restore(self, path: str) -> None:
        """Takes every variable from the checkpoint at `path`; nothing changes where it does not fit.

        Raises:
          InputError: the file is damaged, or its names, shapes or dtypes are not this state's.
        """
        variables = self._named_variables()
        size = sum(v.shape.num_elements() * v.dtype.size for v in variables.values())
        _assign(variables, checkpoints.load(path, size), path)

    def apply_in_place(
        self, before: StateTensors, grads: Sequence[tf.Tensor], clip: tf.Tensor, usable: tf.Tensor, preset: Preset
    ) -> None:
        """`apply_gradients` to the state itself, on one CPU, by TensorFlow's operations that change variables.

        XLA's fusions take two to three times as long: each writes one new array, and works out anew what others did.
        """
        k = tf.cast(before.step + 1, tf.float32)
        learning_rate = warmed_up_learning_rate(preset.learning_rate, preset.warmup_steps, before.step)
        # Of what is not usable 0 is taken, which even infinity times 0 is here, and nothing decays.
        if_usable = lambda value, otherwise: tf.where(usable, tf.cast(value, tf.float32), otherwise)
        adam = {
            "lr": if_usable(learning_rate, 0.0),
            "beta1_power": ADAM_BETA1**k,
            "beta2_power": ADAM_BETA2**k,
            "beta1": if_usable(ADAM_BETA1, 1.0),
            "beta2": if_usable(ADAM_BETA2, 1.0),
            "epsilon": ADAM_EPSILON,
        }
        clip, ema_step = if_usable(clip, 0.0), if_usable(1.0 - np.float32(preset.ema_decay), 0.0)
        for w, ema, m, v, grad in zip(self.params, self.ema, self.adam_m, self.adam_v, grads, strict=True):
            clipped = tf.math.multiply_no_nan(grad, clip)
            tf.raw_ops.ResourceApplyAdam(var=w.handle, m=m.handle, v=v.handle, grad=clipped, **adam)
            tf.raw_ops.ResourceApplyGradientDescent(var=ema.handle, alpha=ema_step, delta=ema - w)
        self.step.assign(before.step + 1)

    def tensors(self) -> StateTensors:
        """The state as a step in replica context reads it."""
        variables = StateTensors(self.params, self.ema, self.adam_m, self.adam_v, self.step)
        return tf.nest.map_structure(tf.convert_to_tensor, variables)

    def assign(self, tensors: StateTensors) -> None:
        """Takes over the state after a step, in replica context; it is equal on all replicas."""
        variables = [*self.params, *self.ema, *self.adam_m, *self.adam_v, self.step]

        def assign_all(strategy, values):
            for variable, value in zip(variables, values, strict=True):
                strategy.extended.update(variable, lambda v, new: v.assign(new), args=(value,))

        tf.distribute.get_replica_context().merge_call(assign_all, args=(tf.nest.flatten(tensors),))


def load_ema(model: UNet, path: str) -> None:
    """Puts the EMA weights of the checkpoint at `path` into `model`.

    Raises:
      InputError: the file is damaged, or is of another network.
    """
    variables = {f"ema/{n}": v.value for n, v in zip(model.weight_names, model.trainable_variables, strict=True)}
    # A checkpoint holds three more of the kind, and the step.
    size = 4 * sum(4 * v.shape.num_elements() for v in variables.values()) + 8
    arrays = {name: array for name, array in checkpoints.load(path, size).items() if name.startswith("ema/")}
    _assign(variables, arrays, path)


def _assign(variables: dict[str, tf.Variable], arrays: dict[str, np.ndarray], path: str) -> None:
    if mismatched := sorted(variables.keys() ^ arrays.keys()):
        what = "missing" if mismatched[0] in variables else "unknown"
        raise InputError(f"{path} is of another network: {mismatched[0]} is {what}")
    for name, variable in variables.items():
        found, shape = arrays[name], tuple(variable.shape)
        dtype = "float32" if variable.dtype.is_floating else variable.dtype.name
        if found.shape != shape or found.dtype != dtype:
            raise InputError(
                f"{path} is of another network: {name} is {found.dtype} {found.shape}, not {dtype} {shape}"
            )
    for name, variable in variables.items():
        variable.assign(tf.cast(arrays[name], variable.dtype))
