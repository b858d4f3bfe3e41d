"""Convolutions on a CPU whose frozen weights oneDNN reorders only once.

Reordering a kernel takes up to a seventh of the time of a convolution of one image. TensorFlow avoids it if the kernel
is a constant of the graph, but the graph then holds several copies of all weights. Here the kernel stays a variable,
and this module creates the operation into which TensorFlow rewrites such a convolution for oneDNN.
"""

import functools
import itertools
import os
from collections.abc import Sequence
from typing import Any

import tensorflow as tf
from tensorflow.core.framework.attr_value_pb2 import AttrValue

from diffusion_tf.ops import backend


def keeps_kernels(dtype: tf.DType) -> bool:
    """Whether to call `conv` for maps of this dtype: the program's weights are frozen, and the CPU supports it."""
    return backend.current().frozen_weights and available(dtype)


@functools.cache
def available(dtype: tf.DType) -> bool:
    """Whether this machine has the operation: not Apple's processors; bfloat16 needs AVX-512."""
    if os.environ.get("TF_ENABLE_ONEDNN_OPTS") == "0":
        return False
    try:
        with tf.init_scope():
            ones = functools.partial(tf.ones, dtype=dtype)
            tf.function(conv, autograph=False)(ones([1, 1, 1, 32]), ones([1, 1, 32, 32]), ones([32]))
    except (ValueError, RuntimeError, tf.errors.OpError):
        return False
    return True


def conv(
    x: tf.Tensor,
    kernel: tf.Tensor,
    bias: tf.Tensor | None = None,
    add: tf.Tensor | None = None,
    *,
    strides: int = 1,
    padding: str | Sequence[Sequence[int]] = "SAME",
) -> tf.Tensor:
    """A convolution that may keep the first kernel it sees for all calls of the program; it has no gradient.

    All tensors have one dtype, float32 or bfloat16. The sum with bias and map is rounded once.

    Args:
      x: [B, H, W, C].
      kernel: [h, w, C, channels].
      bias: [channels], or None.
      add: a map of the result's shape to add, or None; it needs a bias.
      strides: along both axes.
      padding: as for `ops.conv2d`.
    """
    summands = [tensor for tensor in (bias, add) if tensor is not None]
    dtype = x.dtype.as_datatype_enum
    attributes = {
        "T": AttrValue(type=dtype),
        "strides": _list(i=[1, strides, strides, 1]),
        "padding": AttrValue(s=b"SAME" if padding == "SAME" else b"EXPLICIT"),
        "explicit_paddings": _list(i=() if padding == "SAME" else itertools.chain(*padding)),
        "is_filter_const": AttrValue(b=True),
        "_kernel": AttrValue(s=b"MklNameChangeOp"),  # selects oneDNN's kernel of the operation
    }
    if summands:
        attributes["fused_ops"] = _list(s=[b"BiasAdd", b"Add"][: len(summands)])
        attributes["num_args"], attributes["num_host_args"] = AttrValue(i=len(summands)), AttrValue(i=0)
        attributes["TArgs"] = _list(type=[dtype] * len(summands))
    operation = tf.compat.v1.get_default_graph().create_op(
        "_MklNativeFusedConv2D" if summands else "_MklNativeConv2D",
        [x, kernel, *summands],
        [x.dtype],
        name="conv",
        attrs=attributes,
    )
    return operation.outputs[0]


def _list(**values: Any) -> AttrValue:
    return AttrValue(list=AttrValue.ListValue(**values))
