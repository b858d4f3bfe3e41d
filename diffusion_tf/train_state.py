"""What a run is made of: weights, EMA, Adam's moments and the step; how they move, and how they are saved."""

from collections.abc import Sequence

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
        self._names = [v.path.removeprefix("unet/") for v in self.model.trainable_variables]

    def _named_variables(self) -> dict[str, tf.Variable]:
        groups = {"params": self.params, "ema": self.ema, "adam_m": self.adam_m, "adam_v": self.adam_v}
        named = {f"{group}/{name}": v for group, vs in groups.items() for name, v in zip(self._names, vs, strict=True)}
        return {**named, "step": self.step}

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Every variable by name, as a checkpoint holds it."""
        return {name: np.asarray(variable.numpy()) for name, variable in self._named_variables().items()}

    def restore(self, path: str) -> None:
        """Takes every variable from the checkpoint at `path`; nothing changes where it does not fit.

        Raises:
          InputError: the file is damaged, or its names, shapes or dtypes are not this state's.
        """
        _assign(self._named_variables(), checkpoints.load(path), path)

    def apply_gradients(self, grads: Sequence[tf.Tensor], preset: Preset) -> None:
        """Adam and EMA, in replica context, by gradients that are equal on all replicas."""
        learning_rate = warmed_up_learning_rate(preset.learning_rate, preset.warmup_steps, self.step)
        k = tf.cast(self.step + 1, tf.float32)
        step_size = learning_rate * tf.sqrt(1.0 - ADAM_BETA2**k) / (1.0 - ADAM_BETA1**k)

        def update_one(w, m, v, ema, grad, step_size):
            m.assign(ADAM_BETA1 * m + (1.0 - ADAM_BETA1) * grad)
            v.assign(ADAM_BETA2 * v + (1.0 - ADAM_BETA2) * tf.square(grad))
            w.assign_sub(step_size * m / (tf.sqrt(v) + ADAM_EPSILON))
            # In float32 even the constant, as the authors' graph has it: 1 - 0.9999 is 1.00017e-4.
            ema.assign_sub((ema - w) * (1.0 - tf.constant(preset.ema_decay, tf.float32)))

        def update_all(strategy, grads, step_size):
            for w, m, v, ema, grad in zip(self.params, self.adam_m, self.adam_v, self.ema, grads, strict=True):
                strategy.extended.update(w, update_one, args=(m, v, ema, grad, step_size))
            strategy.extended.update(self.step, lambda step: step.assign_add(1))

        tf.distribute.get_replica_context().merge_call(update_all, args=(grads, step_size))


def load_ema(model: UNet, path: str) -> None:
    """Puts the EMA weights of the checkpoint at `path` into `model`.

    Raises:
      InputError: the file is damaged, or is of another network.
    """
    variables = {f"ema/{v.path.removeprefix('unet/')}": v.value for v in model.trainable_variables}
    arrays = {name: array for name, array in checkpoints.load(path).items() if name.startswith("ema/")}
    _assign(variables, arrays, path)


def _assign(variables: dict[str, tf.Variable], arrays: dict[str, np.ndarray], path: str) -> None:
    if mismatched := sorted(variables.keys() ^ arrays.keys()):
        what = "missing" if mismatched[0] in variables else "unknown"
        raise InputError(f"{path} is of another network: {mismatched[0]} is {what}")
    for name, variable in variables.items():
        found, wanted = arrays[name], variable
        if found.shape != tuple(wanted.shape) or found.dtype != wanted.dtype.as_numpy_dtype:
            raise InputError(
                f"{path} is of another network: {name} is {found.dtype} {found.shape},"
                f" not {wanted.dtype.name} {tuple(wanted.shape)}"
            )
    for name, variable in variables.items():
        variable.assign(arrays[name])
