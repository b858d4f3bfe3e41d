"""Regions: parts of a TensorFlow graph that are XLA programs of their own.

On a CPU the fastest products in bfloat16 are oneDNN's, which TensorFlow's graph calls and XLA does not. The fastest
work between them is XLA's, which writes one array where TensorFlow writes one for each operation. So a program for a
CPU is a graph in which every function marked by `region` is compiled, once for all calls of the same shapes.
Starting a region costs time, so for small images `runtime` compiles the whole network as one program.
"""

import functools
from collections.abc import Callable
from typing import Any

import tensorflow as tf

_UNROLLED = 8


def region_without_gradient(function: Callable) -> Callable:
    """Compiles `function(*tensors, **static)`; no gradient flows through it.

    Tensors may come and be returned in lists. Static arguments must be hashable.
    """

    @functools.cache
    def program(static: tuple[tuple[str, Any], ...]) -> Callable:
        return tf.function(functools.partial(function, **dict(static)), jit_compile=True, autograph=False)

    @functools.wraps(function)
    def wrapped(*arguments: Any, **static: Any) -> Any:
        return program(tuple(sorted(static.items())))(*arguments)

    return wrapped


def region(function: Callable) -> Callable:
    """Compiles `function(*tensors, **static)` as `region_without_gradient` does, and its gradient as a second program.

    The gradient computes the region again: reading the arguments twice costs less than keeping intermediate results.
    """

    def gradient(grad_ys: Any, arguments: Any, **static: Any) -> list[tf.Tensor]:
        floats = [x for x in tf.nest.flatten(arguments) if x.dtype.is_floating]
        with tf.GradientTape() as tape:
            tape.watch(floats)
            ys = function(*arguments, **static)
        return tape.gradient(ys, floats, grad_ys, unconnected_gradients="zero")

    forward, backward = region_without_gradient(function), region_without_gradient(gradient)

    @functools.wraps(function)
    def wrapped(*arguments: Any, **static: Any) -> Any:
        @tf.custom_gradient
        def run(*tensors: tf.Tensor) -> tuple[Any, Callable]:
            packed = tf.nest.pack_sequence_as(arguments, tensors)

            def grad(*grad_ys: tf.Tensor) -> list[tf.Tensor | None]:
                grads = iter(backward(list(grad_ys) if len(grad_ys) > 1 else grad_ys[0], packed, **static))
                return [next(grads) if x.dtype.is_floating else None for x in tensors]

            return forward(*packed, **static), grad

        return run(*tf.nest.flatten(arguments))

    return wrapped


def sum_of_rows(rows: tf.Tensor) -> tf.Tensor:
    """Sums [..., N, C] over N to float32 [..., C], for regions: XLA is slow at long sums on a CPU.

    XLA unrolls sums of eight terms, so this reduces by eight first, and takes the rest of the sum as a product with
    ones. The product has two rows of them, because XLA would fuse a product with one row into the sum of eight.
    """
    rows = tf.cast(rows, tf.float32)
    *batch, count, channels = rows.shape
    if count % _UNROLLED == 0:
        rows = tf.reduce_sum(tf.reshape(rows, [*batch, _UNROLLED, count // _UNROLLED, channels]), axis=-3)
    return tf.matmul(tf.ones([*batch, 2, rows.shape[-2]]), rows)[..., 0, :]


def fast_cast(x: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """`tf.cast` between floats, for regions: XLA rounds to bfloat16 slowly on a CPU, so this rounds with integers.

    The same holds for its gradient. NaNs must be those that arithmetic makes, with zeros as their lowest bits.
    """
    if x.dtype == dtype:
        return x

    @tf.custom_gradient
    def cast(x: tf.Tensor) -> tuple[tf.Tensor, Callable]:
        return _rounded(x, dtype), lambda grad: _rounded(grad, x.dtype)

    return cast(x)


def _rounded(x: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    if (x.dtype, dtype) != (tf.float32, tf.bfloat16):
        return tf.cast(x, dtype)
    bits = tf.bitcast(x, tf.uint32)
    high = tf.bitwise.right_shift(bits, 16)
    high = tf.bitwise.right_shift(bits + (0x7FFF + tf.bitwise.bitwise_and(high, 1)), 16)  # to nearest, ties to even
    return tf.bitcast(tf.cast(high, tf.uint16), tf.bfloat16)
