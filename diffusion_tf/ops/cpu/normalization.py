"""Group normalisation, swish and dropout on a CPU, in one compiled region."""

from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from diffusion_tf.ops.cpu.regions import fast_cast, region, sum_of_rows


def group_norm(
    maps: Sequence[tf.Tensor],
    gamma: tf.Tensor,
    beta: tf.Tensor,
    *,
    num_groups: int,
    epsilon: float,
    swish: bool = False,
    offset: tf.Tensor | None = None,
    keep: tf.Tensor | None = None,
    rate: float = 0.0,
) -> tf.Tensor:
    """See `ops.group_norm`."""
    optional = {"offset": offset, "keep": keep}
    given = {name: tensor for name, tensor in optional.items() if tensor is not None}
    return _group_norm(
        list(maps),
        gamma,
        beta,
        *given.values(),
        given=tuple(given),
        num_groups=num_groups,
        epsilon=epsilon,
        swish=swish,
        rate=rate,
    )


@region
def _group_norm(
    maps: list[tf.Tensor],
    gamma: tf.Tensor,
    beta: tf.Tensor,
    *optional: tf.Tensor,
    given: tuple[str, ...],
    num_groups: int,
    epsilon: float,
    swish: bool,
    rate: float,
) -> tf.Tensor:
    """`group_norm`; `given` names the `optional` tensors."""
    tensors = dict(zip(given, optional, strict=True))
    floats = [fast_cast(x, tf.float32) for x in maps]
    mean = tf.concat([_spatial_mean(x) for x in floats], axis=-1)
    mean_square = tf.concat([_spatial_mean(tf.square(x)) for x in floats], axis=-1)
    offset = tf.cast(tensors.get("offset", 0.0), tf.float32)
    mean_square = _over_groups(mean_square + offset * (2.0 * mean + offset), num_groups)
    mean = _over_groups(mean + offset, num_groups)
    variance = tf.maximum(mean_square - tf.square(mean), 0.0)
    scale = gamma * tf.math.rsqrt(variance + epsilon)
    shift = beta + (offset - mean) * scale
    y = _scale_and_shift(tf.concat(floats, axis=-1), scale, shift)
    if swish:
        y = _swish(y)
    if "keep" in tensors:
        y = tf.where(tensors["keep"], y / (1.0 - rate), 0.0)
    return fast_cast(y, maps[0].dtype)


def _over_groups(moments: tf.Tensor, num_groups: int) -> tf.Tensor:
    """Averages moments [B, C] of the channels over each group, as products: XLA would divide again for every pixel."""
    size = moments.shape[-1] // num_groups
    members = np.repeat(np.eye(num_groups, dtype=np.float32), size, axis=1)
    return tf.matmul(tf.matmul(moments, members / size, transpose_b=True), members)


def _spatial_mean(x: tf.Tensor) -> tf.Tensor:
    """Means [B, C] of the channels of a map [B, H, W, C]."""
    return _spatial_sum(x) / (x.shape[1] * x.shape[2])


def _spatial_sum(x: tf.Tensor) -> tf.Tensor:
    return sum_of_rows(tf.reshape(x, [-1, x.shape[1] * x.shape[2], x.shape[3]]))


@tf.custom_gradient
def _scale_and_shift(x: tf.Tensor, scale: tf.Tensor, shift: tf.Tensor) -> tuple[tf.Tensor, Callable]:
    """The sum x scale + shift, of a map [B, H, W, C] and [B, C]; its gradient takes fast sums."""

    def grad(grad_y: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        return grad_y * scale[:, None, None], _spatial_sum(grad_y * x), _spatial_sum(grad_y)

    return x * scale[:, None, None] + shift[:, None, None], grad


@tf.custom_gradient
def _swish(x: tf.Tensor) -> tuple[tf.Tensor, Callable]:
    def grad(grad_y: tf.Tensor) -> tf.Tensor:
        # XLA recomputes cheap work in each loop that reads it, here two sums and a map. It keeps a quotient.
        denominator = 1.0 + tf.exp(-x)
        return grad_y * (1.0 + x * (1.0 - 1.0 / denominator)) / denominator

    return tf.nn.silu(x), grad
