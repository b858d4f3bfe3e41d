"""What a run is made of: weights, EMA, Adam's moments and the step; how they move, and how they are saved."""

from collections.abc import Sequence
from typing import NamedTuple

import tensorflow as tf

from diffusion_tf.presets import Preset

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
