"""Convolutions and products along the channels on a CPU: by oneDNN, or by Winograd's algorithm where it is faster."""

from collections.abc import Callable, Sequence

import tensorflow as tf

from diffusion_tf.ops import attention, taps, xla
from diffusion_tf.ops.cpu import onednn
from diffusion_tf.ops.cpu.regions import region_without_gradient
from diffusion_tf.ops.cpu.winograd import conv3x3

_MIN_WINOGRAD_PIXELS = 512  # in a batch; with fewer, the sums of taps cost what they save
_MIN_WINOGRAD_CHANNELS = 32

_phase_kernels = region_without_gradient(taps.phase_kernels)
_gradient_kernel = region_without_gradient(taps.gradient_kernel)
_gradient_of_taps = region_without_gradient(taps.gradient_of_taps)


def side_by_side(maps: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """One concatenated map: on a CPU, XLA would check in every loop which map each channel belongs to."""
    return [tf.concat(maps, axis=-1)]


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
    if padding == "SAME" and _suits_winograd(x, kernel, strides):
        y = conv3x3(x, kernel)
    elif onednn.keeps_kernels(x.dtype):
        if bias is not None:
            return onednn.conv(x, kernel, bias, add, strides=strides, padding=padding)
        y = onednn.conv(x, kernel, strides=strides, padding=padding)
    else:
        y = tf.nn.conv2d(x, kernel, strides=strides, padding=padding)
    y = y if bias is None else tf.nn.bias_add(y, bias)
    return y if add is None else y + add


def _suits_winograd(x: tf.Tensor, kernel: tf.Tensor, strides: int) -> bool:
    batch, height, width, _ = x.shape
    rows, columns, *channels = kernel.shape
    return (
        x.dtype == tf.float32
        and (rows, columns, strides) == (3, 3, 1)
        and height % 2 == width % 2 == 0
        and min(channels) >= _MIN_WINOGRAD_CHANNELS
        and batch * height * width >= _MIN_WINOGRAD_PIXELS
    )


@tf.custom_gradient
def upsampled_conv2d(x: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor) -> tuple[tf.Tensor, Callable]:
    """See `ops.upsampled_conv2d`."""
    kernels = dict(zip(taps.PHASES, _phase_kernels(kernel), strict=True))

    def phase(a: int, b: int) -> tf.Tensor:
        padding = taps.phase_padding(a, b)
        if onednn.keeps_kernels(x.dtype):
            return onednn.conv(x, kernels[a, b], bias, padding=padding)
        return tf.nn.bias_add(tf.nn.conv2d(x, kernels[a, b], strides=1, padding=padding), bias)

    def grad(grad_y: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        return taps.upsampled_conv2d_gradients(
            x, kernel, grad_y, gradient_kernel=_gradient_kernel, gradient_of_taps=_gradient_of_taps
        )

    return _interleaved([phase(a, b) for a, b in taps.PHASES]), grad


@region_without_gradient
def _interleaved(phases: list[tf.Tensor]) -> tf.Tensor:
    """Four maps [B, H, W, C] as the even and odd rows and columns of one [B, 2 H, 2 W, C]."""
    _, height, width, channels = phases[0].shape
    dtype = phases[0].dtype
    bits = tf.uint16 if dtype == tf.bfloat16 else dtype  # XLA would move bfloat16 as float32
    phases = [tf.bitcast(phase, bits) for phase in phases]
    rows = [tf.stack(phases[2 * a : 2 * a + 2], axis=3) for a in range(2)]
    return tf.bitcast(tf.reshape(tf.stack(rows, axis=2), [-1, 2 * height, 2 * width, channels]), dtype)


def dense(x: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor) -> tf.Tensor:
    """See `ops.dense`."""
    if not onednn.keeps_kernels(x.dtype):
        return xla.dense(x, kernel, bias)
    return tf.squeeze(onednn.conv(x[:, :, None], kernel[None, None], bias), axis=2)


def dense_side_by_side(maps: Sequence[tf.Tensor], kernel: tf.Tensor) -> tf.Tensor:
    """See `ops.dense_side_by_side`."""
    if not onednn.keeps_kernels(maps[0].dtype):
        return xla.dense_side_by_side(maps, kernel)
    return onednn.conv(tf.concat(maps, axis=-1), kernel[None, None])


def self_attention(h: tf.Tensor, projections: attention.Projections, *, heads: int) -> tf.Tensor:
    """See `ops.self_attention`."""
    return attention.self_attention(h, projections, heads=heads, dense=dense)
