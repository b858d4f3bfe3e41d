"""Adam and EMA on a CPU by TensorFlow's operations that change variables."""

from collections.abc import Sequence

import tensorflow as tf


def adam_in_place(
    params: Sequence[tf.Variable],
    ema: Sequence[tf.Variable],
    adam_m: Sequence[tf.Variable],
    adam_v: Sequence[tf.Variable],
    grads: Sequence[tf.Tensor],
    *,
    clip: tf.Tensor,
    usable: tf.Tensor,
    learning_rate: tf.Tensor,
    step: tf.Tensor,
    beta1: float,
    beta2: float,
    epsilon: float,
    ema_step: float,
) -> bool:
    """See `ops.adam_in_place`. XLA's fusions take two to three times as long: they write new arrays."""

    def if_usable(value: tf.Tensor | float, otherwise: float) -> tf.Tensor:
        return tf.where(usable, tf.cast(value, tf.float32), otherwise)

    # With these, an unusable step adds 0 and decays nothing: `multiply_no_nan` maps even infinity to 0.
    adam = {
        "lr": if_usable(learning_rate, 0.0),
        "beta1_power": beta1**step,
        "beta2_power": beta2**step,
        "beta1": if_usable(beta1, 1.0),
        "beta2": if_usable(beta2, 1.0),
        "epsilon": epsilon,
    }
    clip, alpha = if_usable(clip, 0.0), if_usable(ema_step, 0.0)
    for w, average, m, v, grad in zip(params, ema, adam_m, adam_v, grads, strict=True):
        clipped = tf.math.multiply_no_nan(grad, clip)
        tf.raw_ops.ResourceApplyAdam(var=w.handle, m=m.handle, v=v.handle, grad=clipped, **adam)
        tf.raw_ops.ResourceApplyGradientDescent(var=average.handle, alpha=alpha, delta=average - w)
    return True
