"""The operations of the network and its training: one function each, computed as suits the program's device.

Each function asks `backend.current()`, and calls the function of the same name and signature in `ops.xla`,
`ops.tpu` or `ops.cpu`. The results differ by rounding only.
"""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from diffusion_tf.ops import backend, cpu, tpu, xla
from diffusion_tf.ops.attention import Projections


def _implementation() -> Any:
    current = backend.current()
    return cpu if current.cpu_graph else tpu if current.tpu else xla


def side_by_side(maps: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Feature maps [B, H, W, C_i] as one map of sum C_i channels, for `group_norm` and `dense_side_by_side`.

    The list holds the maps as they are, or one concatenated map, whichever the backend reads faster.
    """
    return _implementation().side_by_side(maps)


def conv2d(
    x: tf.Tensor,
    kernel: tf.Tensor,
    *,
    strides: int = 1,
    padding: str | Sequence[Sequence[int]] = "SAME",
    bias: tf.Tensor | None = None,
    add: tf.Tensor | None = None,
) -> tf.Tensor:
    """A convolution, and what is added to it.

    A CPU takes 4 products instead of 9 for each output of a 3x3 kernel, stride 1, even H and W, 32 or more channels and
    float32. With frozen weights it may keep the first kernel of a program, and has no gradient.

    Args:
      x: [B, H, W, C], float32 or bfloat16; the other tensors have the same dtype.
      kernel: [h, w, C, channels].
      strides: along both axes.
      padding: TensorFlow's SAME, or numbers of zeros before and after x along each of its axes.
      bias: [channels], or None.
      add: a map of the result's shape, or None.

    Returns:
      [B, ceil(H / strides), ceil(W / strides), channels] for SAME padding, in the dtype of x.
    """
    return _implementation().conv2d(x, kernel, strides=strides, padding=padding, bias=bias, add=add)


def upsampled_conv2d(x: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor) -> tf.Tensor:
    """The 3x3 convolution of x with each pixel repeated 2x2 (nearest-neighbour upsampling), plus the bias.

    Takes 4 products instead of 9 for each output, also in its gradients: outputs at even and at odd places read 2x2
    pixels of x by sums of the kernel's taps. A pixel of x reaches 4x4 outputs, so its gradient is a convolution of
    stride 2.

    Args:
      x: [B, H, W, C].
      kernel: [3, 3, C, channels].
      bias: [channels].

    Returns:
      [B, 2 H, 2 W, channels] in the dtype of x.
    """
    return _implementation().upsampled_conv2d(x, kernel, bias)


def dense(x: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor) -> tf.Tensor:
    """The product of positions x [B, N, C] with kernel [C, units], plus bias [units]: [B, N, units]."""
    return _implementation().dense(x, kernel, bias)


def dense_side_by_side(maps: Sequence[tf.Tensor], kernel: tf.Tensor) -> tf.Tensor:
    """The product of maps [B, H, W, C_i], side by side, with kernel [sum C_i, units]: [B, H, W, units]."""
    return _implementation().dense_side_by_side(maps, kernel)


def self_attention(h: tf.Tensor, projections: Projections, *, heads: int) -> tf.Tensor:
    """Self-attention over all positions of h [B, H, W, C]: out(softmax(q(h) k(h)^T / sqrt(C / heads)) v(h)).

    The softmax is float32.

    Args:
      h: [B, H, W, C].
      projections: the dense layers q, k, v and out.
      heads: heads of C / heads channels each.

    Returns:
      [B, H, W, C] in the dtype of h.
    """
    return _implementation().self_attention(h, projections, heads=heads)


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
    """Group normalisation over (H, W, C / groups) in float32, then swish and dropout if asked for.

    The moments follow from the sums of each channel and of its square, which a compiler takes as it writes a map; the
    sums of a skip connection are those of the way down. The variance is E[x^2] - E[x]^2.

    Args:
      maps: [B, H, W, C_i], the channels side by side; C = sum C_i is divisible by `num_groups`.
      gamma: float32 [C].
      beta: float32 [C].
      num_groups: groups of consecutive channels.
      epsilon: added to the variance.
      swish: whether x sigmoid(x) follows.
      offset: [B, C], added to the maps before; None: nothing. It moves the means only, so the maps are not read again,
        and its gradient is one of the sums that the gradient takes anyway.
      keep: bool [B, H, W, C], the dropout mask of what is kept; None: no dropout.
      rate: the dropout rate, in [0, 1).

    Returns:
      [B, H, W, C] in the dtype of the maps.
    """
    return _implementation().group_norm(
        maps, gamma, beta, num_groups=num_groups, epsilon=epsilon, swish=swish, offset=offset, keep=keep, rate=rate
    )


def normal(keys: tf.Tensor, shape: tuple[int, ...]) -> tf.Tensor:
    """Standard normal float32 of static `shape` [B, H, ...], by the Box-Muller transform of hashed positions.

    Row i depends on `keys[i]` only, of uint32 keys [B, 2].
    """
    return _implementation().normal(keys, shape=shape)


def bernoulli(keys: tf.Tensor, shape: tuple[int, ...], rate: float) -> tf.Tensor:
    """Bool of static `shape` [B, ...] that is False with probability `rate`; row i depends on keys[i], uint32 [B, 2].

    The bits are the same on every backend.
    """
    return _implementation().bernoulli(keys, shape=shape, rate=rate)


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
    """Takes a step of Adam and of the EMA on the variables, if that is the backend's fastest way.

    Args:
      params: the weights.
      ema: their moving averages, in the same order.
      adam_m: Adam's first moments.
      adam_v: Adam's second moments.
      grads: the gradients.
      clip: float32 scalar by which the gradients are multiplied.
      usable: bool scalar; if False, the variables keep their values.
      learning_rate: float32 scalar.
      step: float32 scalar, the number of this step from 1 on.
      beta1: decay of the first moments.
      beta2: decay of the second moments.
      epsilon: added to the root of the second moments.
      ema_step: 1 - decay of the EMA.

    Returns:
      Whether the step was taken. If not, nothing happened, and the caller assigns the result of the pure update.
    """
    return _implementation().adam_in_place(
        params,
        ema,
        adam_m,
        adam_v,
        grads,
        clip=clip,
        usable=usable,
        learning_rate=learning_rate,
        step=step,
        beta1=beta1,
        beta2=beta2,
        epsilon=epsilon,
        ema_step=ema_step,
    )
