"""Self-attention by its definition, for any way to compute a dense layer."""

from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

Projection = tuple[tf.Tensor, tf.Tensor]  # a kernel [in, out] and a bias [out]


class Projections(NamedTuple):
    """The dense layers of self-attention, each a kernel [C, C] and a bias [C] in the dtype of the map.

    Attributes:
      q: makes the queries.
      k: makes the keys.
      v: makes the values.
      out: maps the means of the values to the result.
    """

    q: Projection
    k: Projection
    v: Projection
    out: Projection


def self_attention(h: tf.Tensor, projections: Projections, *, heads: int, dense: Callable[..., tf.Tensor]) -> tf.Tensor:
    """See `ops.self_attention`; `dense` is the backend's function of that name."""
    _, height, width, channels = h.shape
    positions = height * width
    h = tf.reshape(h, [-1, positions, channels])
    queries, keys, values = (_split(dense(h, *part), heads) for part in projections[:3])
    logits = tf.einsum("...qc,...kc->...qk", queries, keys) * (channels // heads) ** -0.5
    weights = tf.cast(tf.nn.softmax(tf.cast(logits, tf.float32)), h.dtype)
    h = _side_by_side(tf.einsum("...qk,...kc->...qc", weights, values), heads)
    return tf.reshape(dense(h, *projections.out), [-1, height, width, channels])


def _split(x: tf.Tensor, heads: int) -> tf.Tensor:
    """Maps [B, N, C] to [B, heads, N, C / heads]; the same for one head."""
    if heads == 1:
        return x
    _, positions, channels = x.shape
    return tf.transpose(tf.reshape(x, [-1, positions, heads, channels // heads]), [0, 2, 1, 3])


def _side_by_side(x: tf.Tensor, heads: int) -> tf.Tensor:
    """The inverse of `_split`."""
    if heads == 1:
        return x
    _, _, positions, channels = x.shape
    return tf.reshape(tf.transpose(x, [0, 2, 1, 3]), [-1, positions, heads * channels])
