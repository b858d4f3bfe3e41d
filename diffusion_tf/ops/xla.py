"""The operations where one compiler sees the whole program (TPU, GPU, small images): straight-line code.

`ops` documents each function. TensorFlow also runs them eagerly, or as a graph of several replicas.
"""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from diffusion_tf.ops import attention, hashing, taps

normal, bernoulli = hashing.normal, hashing.bernoulli


def side_by_side(maps: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """The maps as they are, so that a compiler sums each one as it writes it."""
    return list(maps)


def conv2d(
    x: tf.Tensor,
    kernel: tf.Tensor,
    *,
    strides: int = 1,
    padding: str | Sequence[Sequence[int]] = "SAME",
    bias: tf.Tensor | None = None,
    add: tf.Tensor | None = None,
) -> tf.Tensor:
    """See `ops.conv2d`."""
    y = tf.nn.conv2d(x, kernel, strides=strides, padding=padding)
    y = y if bias is None else tf.nn.bias_add(y, bias)
    return y if add is None else y + add


@tf.custom_gradient
def upsampled_conv2d(x: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor) -> tuple[tf.Tensor, Callable]:
    """See `ops.upsampled_conv2d`."""
    kernels = dict(zip(taps.PHASES, taps.phase_kernels(kernel), strict=True))

    def phase(a: int, b: int) -> tf.Tensor:
        y = tf.nn.conv2d(x, kernels[a, b], strides=1, padding=taps.phase_padding(a, b))
        return tf.nn.bias_add(y, bias)

    def grad(grad_y: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        return taps.upsampled_conv2d_gradients(x, kernel, grad_y)

    return _interleaved(phase, x, kernel.shape[-1]), grad


def _interleaved(phase: Callable[[int, int], tf.Tensor], x: tf.Tensor, channels: int) -> tf.Tensor:
    """The even and odd rows and columns of one map [B, 2 H, 2 W, channels].

    Each phase is written to its place as it is computed. Side by side along batch and width, the phases lie as a TPU
    keeps the upsampled map, (H, W, B, C) from the slowest axis to the fastest: the transposition moves nothing there.
    """
    batch = tf.shape(x)[0] if x.shape[0] is None else x.shape[0]
    _, height, width, _ = x.shape
    y = tf.zeros([2 * batch, height, 2 * width, channels], x.dtype)
    for a, b in taps.PHASES:
        y = tf.raw_ops.TensorStridedSliceUpdate(
            input=y,
            begin=[b * batch, 0, a * width, 0],
            end=[(b + 1) * batch, height, (a + 1) * width, channels],
            strides=[1] * 4,
            value=phase(a, b),
        )
    y = tf.transpose(tf.reshape(y, [2, batch, height, 2, width, channels]), [1, 2, 3, 4, 0, 5])
    return tf.reshape(y, [batch, 2 * height, 2 * width, channels])


def dense(x: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor) -> tf.Tensor:
    """See `ops.dense`."""
    return tf.nn.bias_add(tf.tensordot(x, kernel, axes=1), bias)


def dense_side_by_side(maps: Sequence[tf.Tensor], kernel: tf.Tensor) -> tf.Tensor:
    """See `ops.dense_side_by_side`."""
    return _dense_side_by_side(kernel, *maps)


@tf.custom_gradient
def _dense_side_by_side(kernel: tf.Tensor, *maps: tf.Tensor) -> tuple[tf.Tensor, Callable]:
    """Computes a gradient for each map: that of the concatenated maps would be written, then read again in slices."""

    def grad(grad_y: tf.Tensor) -> tuple[tf.Tensor, ...]:
        return dense_side_by_side_gradients(kernel, maps, grad_y)

    return tf.einsum("bhwi,io->bhwo", tf.concat(maps, axis=-1), kernel), grad


def dense_side_by_side_gradients(
    kernel: tf.Tensor, maps: Sequence[tf.Tensor], grad_y: tf.Tensor
) -> tuple[tf.Tensor, ...]:
    """The gradients of `dense_side_by_side` with respect to the kernel and to each map."""
    kernels = tf.split(kernel, [x.shape[-1] for x in maps], axis=0)
    grad_kernel = tf.concat([tf.einsum("bhwi,bhwo->io", x, grad_y) for x in maps], axis=0)
    return grad_kernel, *(tf.einsum("bhwo,io->bhwi", grad_y, k) for k in kernels)


def self_attention(h: tf.Tensor, projections: attention.Projections, *, heads: int) -> tf.Tensor:
    """See `ops.self_attention`."""
    return attention.self_attention(h, projections, heads=heads, dense=dense)


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

    def over_groups(moments: tf.Tensor) -> tf.Tensor:
        size = moments.shape[-1] // num_groups
        groups = tf.reshape(moments, [-1, num_groups, size])
        return tf.repeat(tf.reduce_mean(groups, axis=2), size, axis=1)

    dtype = maps[0].dtype
    floats = [tf.cast(x, tf.float32) for x in maps]
    mean = tf.concat([tf.reduce_mean(x, axis=[1, 2]) for x in floats], axis=-1)
    mean_square = tf.concat([tf.reduce_mean(tf.square(x), axis=[1, 2]) for x in floats], axis=-1)
    offset = 0.0 if offset is None else tf.cast(offset, tf.float32)
    mean_square = over_groups(mean_square + offset * (2.0 * mean + offset))
    mean = over_groups(mean + offset)
    variance = tf.maximum(mean_square - tf.square(mean), 0.0)
    scale = gamma * tf.math.rsqrt(variance + epsilon)
    shift = beta + (offset - mean) * scale
    y = tf.concat(floats, axis=-1) * scale[:, None, None] + shift[:, None, None]
    y = tf.cast(y, dtype)  # before swish: a TPU keeps this map for the gradient
    if swish:
        y = tf.nn.silu(y)
    if keep is not None:
        y = tf.where(keep, y / (1.0 - rate), 0.0)
    return y


def adam_in_place(*_: Any, **__: Any) -> bool:
    """Does nothing: the compiler fuses the pure update, and replicas assign its result together."""
    return False
