"""Stretches of a TensorFlow graph as XLA programs of their own: how a CPU is served best.

There the fastest products in bfloat16 are oneDNN's, which TensorFlow's graph calls and XLA does not; and the fastest
work between them is XLA's, which writes once what TensorFlow writes once for each operation. So on a CPU a program is a
graph (`distribution.replica_function`), in which every function marked by `region` is compiled, once for all calls of
the same shapes. Where all is one XLA program, as on a TPU, the mark does nothing.
Starting a region takes as long as some work does: for small images the whole network is one program (`suit`).
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

_LEAST_SIZE = 16
_PARTS = 8

_in_cpu_graph = contextvars.ContextVar("in_cpu_graph", default=False)


@contextlib.contextmanager
def cpu_graph(with_regions: bool = True) -> Iterator[None]:
    """What is traced herein is a graph for a CPU, with compiled regions; or a part of it that has none."""
    token = _in_cpu_graph.set(with_regions)
    try:
        yield
    finally:
        _in_cpu_graph.reset(token)


def in_cpu_graph() -> bool:
    """Whether a graph for a CPU, or a region of it, is being traced."""
    return _in_cpu_graph.get()


def suit(image_size: int) -> bool:
    """Whether regions are the faster way through a network for images of so many pixels along a side."""
    return image_size >= _LEAST_SIZE


def one_program(function: Callable) -> Any:
    """What `function()`, of tensors in its closure, returns: in a graph for a CPU by one XLA program."""
    if not in_cpu_graph():
        return function()

    def without_regions():
        with cpu_graph(with_regions=False):
            return function()

    return tf.function(without_regions, jit_compile=True, autograph=False)()


def region_without_gradient(function: Callable) -> Callable:
    """Marks `function(*tensors, **static)`, of tensors and lists of them to the like; static arguments are hashable."""

    @functools.cache
    def program(static):
        return tf.function(functools.partial(function, **dict(static)), jit_compile=True, autograph=False)

    @functools.wraps(function)
    def wrapped(*arguments, **static):
        if not in_cpu_graph():
            return function(*arguments, **static)
        return program(tuple(sorted(static.items())))(*arguments)

    return wrapped


def region(function: Callable) -> Callable:
    """`region_without_gradient`, and its gradient: one more program, which works the region out anew.

    To read the arguments again costs less than to keep what is in between.
    """

    def gradient(grad_ys, arguments, **static):
        floats = [x for x in tf.nest.flatten(arguments) if x.dtype.is_floating]
        with tf.GradientTape() as tape:
            tape.watch(floats)
            ys = function(*arguments, **static)
        return tape.gradient(ys, floats, grad_ys, unconnected_gradients="zero")

    forward, backward = region_without_gradient(function), region_without_gradient(gradient)

    @functools.wraps(function)
    def wrapped(*arguments, **static):
        if not in_cpu_graph():
            return function(*arguments, **static)

        @tf.custom_gradient
        def run(*tensors):
            packed = tf.nest.pack_sequence_as(arguments, tensors)

            def grad(*grad_ys):
                grads = iter(backward(list(grad_ys) if len(grad_ys) > 1 else grad_ys[0], packed, **static))
                return [next(grads) if x.dtype.is_floating else None for x in tensors]

            return forward(*packed, **static), grad

        return run(*tf.nest.flatten(arguments))

    return wrapped


def sum_of_rows(rows: tf.Tensor) -> tf.Tensor:
    """[..., N, C] to float32 [..., C], for regions: XLA is slow at sums on a CPU.

    Quick are sums of eight, which it writes out, and products; so eight parts are added up, and their sum is taken by a
    product with ones: two rows of them, as it would draw the product with a vector into the sum of the parts.
    """
    rows = tf.cast(rows, tf.float32)
    *batch, count, channels = rows.shape
    if count % _PARTS == 0:
        rows = tf.reduce_sum(tf.reshape(rows, [*batch, _PARTS, count // _PARTS, channels]), axis=-3)
    return tf.matmul(tf.ones([*batch, 2, rows.shape[-2]]), rows)[..., 0, :]


def quick_cast(x: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """`tf.cast` between floats, and of its gradient, for regions: XLA is slow at rounding to bfloat16 on a CPU.

    Quick are integers. NaNs are taken to be those that arithmetic makes, whose lowest bits are zeros.
    """
    if x.dtype == dtype or not in_cpu_graph():
        return tf.cast(x, dtype)

    @tf.custom_gradient
    def cast(x):
        return _rounded(x, dtype), lambda grad: _rounded(grad, x.dtype)

    return cast(x)


def _rounded(x: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    if (x.dtype, dtype) != (tf.float32, tf.bfloat16):
        return tf.cast(x, dtype)
    bits = tf.bitcast(x, tf.uint32)
    high = tf.bitwise.right_shift(bits, 16)
    high = tf.bitwise.right_shift(bits + (0x7FFF + tf.bitwise.bitwise_and(high, 1)), 16)  # to nearest, ties to even
    return tf.bitcast(tf.cast(high, tf.uint16), tf.bfloat16)
