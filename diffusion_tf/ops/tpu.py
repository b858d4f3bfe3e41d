"""The operations where a TPU's compiler sees the whole program: those of `ops.xla`, or others that take fewer cycles.

A TPU multiplies by 128x128 matrices, keeps a map with the batch and the channels as its fastest axes, and moves a map
whose layout changes. docs/tpu-cycles.md says what each function saves.
"""

from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from diffusion_tf.ops import xla
from diffusion_tf.ops.attention import Projections
from diffusion_tf.ops.xla import adam_in_place, bernoulli, dense, group_norm, normal, side_by_side, upsampled_conv2d

__all__ = [
    "adam_in_place",
    "bernoulli",
    "conv2d",
    "dense",
    "dense_side_by_side",
    "group_norm",
    "normal",
    "self_attention",
    "side_by_side",
    "upsampled_conv2d",
]

_FEW_CHANNELS = 4  # those of an image, of the 128 that a matrix unit computes together
_BLOCK = 4  # rows and columns of pixels that are computed together instead


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
    size, _, _, channels = kernel.shape
    whole_blocks = x.shape[1] % _BLOCK == x.shape[2] % _BLOCK == 0
    if size != 3 or strides != 1 or padding != "SAME" or channels > _FEW_CHANNELS or not whole_blocks:
        return xla.conv2d(x, kernel, strides=strides, padding=padding, bias=bias, add=add)
    y = _conv2d_of_blocks(x, kernel)
    y = y if bias is None else tf.nn.bias_add(y, bias)
    return y if add is None else y + add


@tf.custom_gradient
def _conv2d_of_blocks(x: tf.Tensor, kernel: tf.Tensor) -> tuple[tf.Tensor, Callable]:
    """The 3x3 convolution as one of stride 4 that computes blocks of 4x4 pixels, so 16 times the channels."""
    # Output pixel `a` of a block reads the pixels a, a + 1 and a + 2 of the block and the pixels around it.
    reads = [[[p == a + i for i in range(3)] for p in range(_BLOCK + 2)] for a in range(_BLOCK)]
    taps = tf.constant(np.array(reads), kernel.dtype)
    blocks = tf.einsum("bqj,apjco->pqcabo", taps, tf.einsum("api,ijco->apjco", taps, kernel))
    shape = [*blocks.shape[:3], _BLOCK**2 * kernel.shape[-1]]
    y = tf.nn.conv2d(x, tf.reshape(blocks, shape), strides=_BLOCK, padding=[[0, 0], [1, 1], [1, 1], [0, 0]])

    def grad(grad_y: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        grad_x = tf.raw_ops.Conv2DBackpropInput(
            input_sizes=tf.shape(x), filter=kernel, out_backprop=grad_y, strides=[1] * 4, padding="SAME"
        )
        grad_blocks = tf.raw_ops.Conv2DBackpropFilter(
            input=x,
            filter_sizes=shape,
            out_backprop=tf.nn.space_to_depth(grad_y, _BLOCK),
            strides=[1, _BLOCK, _BLOCK, 1],
            padding="EXPLICIT",
            explicit_paddings=[0, 0, 1, 1, 1, 1, 0, 0],
        )
        grad_blocks = tf.einsum("bqj,pqcabo->apjco", taps, tf.reshape(grad_blocks, blocks.shape))
        return grad_x, tf.einsum("api,apjco->ijco", taps, grad_blocks)

    return tf.nn.depth_to_space(y, _BLOCK), grad


def dense_side_by_side(maps: Sequence[tf.Tensor], kernel: tf.Tensor) -> tf.Tensor:
    """See `ops.dense_side_by_side`."""
    return _dense_side_by_side(kernel, *maps)


@tf.custom_gradient
def _dense_side_by_side(kernel: tf.Tensor, *maps: tf.Tensor) -> tuple[tf.Tensor, Callable]:
    """A 1x1 convolution, which keeps the layout of the maps. The gradient is that of `ops.xla`."""
    y = tf.nn.conv2d(tf.concat(maps, axis=-1), kernel[None, None], strides=1, padding="SAME")
    return y, lambda grad_y: xla.dense_side_by_side_gradients(kernel, maps, grad_y)


def self_attention(h: tf.Tensor, projections: Projections, *, heads: int) -> tf.Tensor:
    """See `ops.self_attention`. One head takes 4 products of the map instead of 6.

    The logits are h (W_q W_k^T) h^T, plus terms that depend on the key by the bias of the queries only: softmax ignores
    what all keys have in common. The weights of the values sum to one, so W_v W_out and its bias follow after the mean
    over the values.
    """
    if heads > 1:
        return xla.self_attention(h, projections, heads=heads)
    q, k, v, out = projections
    _, height, width, channels = h.shape
    unused = 0.0 * k[1]  # gives the bias of the keys a gradient, of zeros
    query_key = tf.matmul(q[0], k[0], transpose_b=True), tf.linalg.matvec(k[0], q[1]) + unused
    value_out = tf.matmul(v[0], out[0]), tf.linalg.matvec(out[0], v[1], transpose_a=True) + out[1]

    positions = tf.reshape(h, [-1, height * width, channels])
    queries = tf.reshape(_pointwise(h, *query_key), [-1, height * width, channels])
    logits = tf.einsum("bqc,bkc->bqk", queries, positions) * channels**-0.5
    weights = tf.cast(tf.nn.softmax(tf.cast(logits, tf.float32)), h.dtype)
    means = tf.einsum("bqk,bkc->bqc", weights, positions)
    return _pointwise(tf.reshape(means, [-1, height, width, channels]), *value_out)


def _pointwise(x: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor) -> tf.Tensor:
    """A dense layer along the channels of x [B, H, W, C] as a 1x1 convolution, which keeps the layout of x."""
    return xla.conv2d(x, kernel[None, None], bias=bias)
