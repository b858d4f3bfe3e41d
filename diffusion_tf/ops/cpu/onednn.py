"""Convolutions on a CPU by weights that stay as they are: oneDNN brings them into its own order but once.

To reorder a kernel takes up to a seventh of a convolution of one image. TensorFlow spares it where a kernel is a
constant of the graph, which then holds several copies of all weights; here the kernel is a variable, and the operation
that TensorFlow makes of such a convolution, as its graphs are prepared for oneDNN, is named in its stead.
"""

import contextlib
import contextvars
import functools
import itertools
import os
from collections.abc import Iterator, Sequence

import tensorflow as tf
from tensorflow.core.framework.attr_value_pb2 import AttrValue

from diffusion_tf.ops.cpu.regions import in_cpu_graph

_weights_stay = contextvars.ContextVar("weights_stay", default=False)


@contextlib.contextmanager
def weights_stay() -> Iterator[None]:
    """What is traced herein reads weights that nothing assigns once it has run."""
    token = _weights_stay.set(True)
    try:
        yield
    finally:
        _weights_stay.reset(token)


def keeps_kernels(dtype: tf.DType) -> bool:
    """Whether `conv` is to be called for maps of this dtype: in a graph for a CPU that has it, by weights that stay."""
    return _weights_stay.get() and in_cpu_graph() and _available(dtype)


@functools.cache
def _available(dtype: tf.DType) -> bool:
    # TensorFlow for Apple's processors lacks the operation, and oneDNN wants AVX-512 for bfloat16.
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
    added: tf.Tensor | None = None,
    strides: tuple[int, int] = (1, 1),
    padding: Sequence[Sequence[int]] = (),
) -> tf.Tensor:
    """The convolution of x [B, H, W, C] with kernel [h, w, C, channels]; it has no gradient.

    Around x are zeros: by `padding`, as many before and after along each axis, else such that the result is as large.
    To it a bias [channels] is added, and to both a map like the result, which is then rounded once. All have one dtype,
    float32 or bfloat16. The first kernel that comes may be kept for all calls of the function in which this is traced.
    """
    summands = [tensor for tensor in (bias, added) if tensor is not None]
    dtype = x.dtype.as_datatype_enum
    attributes = {
        "T": AttrValue(type=dtype),
        "strides": _list(i=[1, *strides, 1]),
        "padding": AttrValue(s=b"EXPLICIT" if padding else b"SAME"),
        "explicit_paddings": _list(i=itertools.chain(*padding)),
        "is_filter_const": AttrValue(b=True),
        "_kernel": AttrValue(s=b"MklNameChangeOp"),  # of an operation's kernels, oneDNN's
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


def _list(**values) -> AttrValue:
    return AttrValue(list=AttrValue.ListValue(**values))
