"""Adam (Kingma & Ba 2015) with warm-up, and the moving average of the weights (Appendix B)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import tensorflow as tf

from diffusion_tf import ops
from diffusion_tf.presets import Preset

if TYPE_CHECKING:
    from diffusion_tf.training.state import TrainState

_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8


class StateTensors(NamedTuple):
    """The state of training as tensors: lists in the order of the model's variables, and the step, int64."""

    params: list[tf.Tensor]
    ema: list[tf.Tensor]
    adam_m: list[tf.Tensor]
    adam_v: list[tf.Tensor]
    step: tf.Tensor


class Gradients(NamedTuple):
    """The gradients of the global batch, equal on all replicas.

    Attributes:
      grads: in the order of the model's variables, not clipped.
      norm: their global norm, float32.
      clip: the factor, float32, that brings the norm down to the preset's `grad_clip`; 1 if it is smaller.
      usable: bool, whether the loss and the norm are finite; otherwise the step is skipped.
    """

    grads: Sequence[tf.Tensor]
    norm: tf.Tensor
    clip: tf.Tensor
    usable: tf.Tensor


def clip_and_check(loss: tf.Tensor, grads: Sequence[tf.Tensor], grad_clip: float) -> Gradients:
    """Computes the global norm of the gradients, the factor that clips it, and whether the step is usable.

    Differs from the authors, who clip each replica's gradient before the average: their result depends on the number of
    replicas.
    """
    norm = tf.linalg.global_norm(grads)
    clip = tf.minimum(1.0, grad_clip / norm)
    return Gradients(grads, norm, clip, is_finite_step(loss, norm))


def is_finite_step(loss: tf.Tensor, grad_norm: tf.Tensor) -> tf.Tensor:
    """Whether a step's loss and gradient norm are finite, so that its weights may be used."""
    return tf.math.is_finite(loss) & tf.math.is_finite(grad_norm)


def warmed_up_learning_rate(learning_rate: float, warmup_steps: int, step: tf.Tensor) -> tf.Tensor:
    """The learning rate after `step` steps, float32: it grows linearly, and the first step's is 0 (Appendix B)."""
    if warmup_steps == 0:
        return tf.constant(learning_rate, tf.float32)
    return learning_rate * tf.minimum(tf.cast(step, tf.float32) / warmup_steps, 1.0)


def adam_step(state: StateTensors, gradients: Gradients, preset: Preset) -> StateTensors:
    """The state after a step of Adam and of the EMA, in float32; if the gradients are not usable, only `step` moves."""
    learning_rate = warmed_up_learning_rate(preset.learning_rate, preset.warmup_steps, state.step)
    k = tf.cast(state.step + 1, tf.float32)
    step_size = learning_rate * tf.sqrt(1.0 - _BETA2**k) / (1.0 - _BETA1**k)

    updated = [
        _update_one(before, grad * gradients.clip, step_size, gradients.usable, preset.ema_decay)
        for *before, grad in zip(*state[:4], gradients.grads, strict=True)
    ]
    params, ema, adam_m, adam_v = (list(group) for group in zip(*updated, strict=True))
    return StateTensors(params, ema, adam_m, adam_v, state.step + 1)


def _update_one(
    before: Sequence[tf.Tensor], grad: tf.Tensor, step_size: tf.Tensor, usable: tf.Tensor, ema_decay: float
) -> list[tf.Tensor]:
    """A weight, its EMA and its moments after the step."""
    w, ema, m, v = before
    m = _BETA1 * m + (1.0 - _BETA1) * grad
    v = _BETA2 * v + (1.0 - _BETA2) * tf.square(grad)
    w = w - step_size * m / (tf.sqrt(v) + _EPSILON)
    # The constant is float32 too, as in the authors' graph: 1 - 0.9999 is 1.00017e-4.
    ema = ema - (ema - w) * (1.0 - tf.constant(ema_decay, tf.float32))
    return [tf.where(usable, new, old) for new, old in zip((w, ema, m, v), before, strict=True)]


def assign_adam_step(state: "TrainState", before: StateTensors, gradients: Gradients, preset: Preset) -> None:
    """Takes `adam_step` on the variables of `state`, in replica context: in place, or by assigning its result.

    Args:
      state: the variables.
      before: their values, from which the gradients were computed.
      gradients: of the global batch.
      preset: the recipe.
    """
    in_place = ops.adam_in_place(
        state.params,
        state.ema,
        state.adam_m,
        state.adam_v,
        gradients.grads,
        clip=gradients.clip,
        usable=gradients.usable,
        learning_rate=warmed_up_learning_rate(preset.learning_rate, preset.warmup_steps, before.step),
        step=tf.cast(before.step + 1, tf.float32),
        beta1=_BETA1,
        beta2=_BETA2,
        epsilon=_EPSILON,
        ema_step=float(1.0 - np.float32(preset.ema_decay)),
    )
    if in_place:
        state.step.assign(before.step + 1)
    else:
        state.assign(adam_step(before, gradients, preset))
