"""Linear maps of the taps of a 3x3 kernel or the pixels of a tile, applied along both spatial axes.

Winograd's convolution and the upsampled convolution are products with such sums. Both backends use this module.
"""

import functools
import itertools
import operator
from collections.abc import Callable, Sequence

import tensorflow as tf

Matrix = tuple[tuple[float, ...], ...]
Grid = list[list[tf.Tensor]]

# The phases of an upsampled map: (parity of the row, parity of the column).
PHASES = tuple(itertools.product(range(2), repeat=2))

# Along one axis, an output of the upsampled convolution reads two pixels of the small map: m - 1 and m for output 2m
# (first two rows), m and m + 1 for output 2m + 1. Each row tells which of the three taps fall on one of these pixels.
_PHASE_TAPS: Matrix = ((1, 0, 0), (0, 1, 1), (1, 1, 0), (0, 0, 1))

# Along one axis, pixel m of the small map reaches the outputs 2m - 1 ... 2m + 2. Each row tells by which of the taps.
_GRADIENT_TAPS: Matrix = ((0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0))


def along_both_axes(matrix: Matrix, grid: Grid) -> Grid:
    """The product matrix @ grid @ matrix^T, for a grid of tensors."""

    def combine(row: Sequence[float], tensors: Sequence[tf.Tensor]) -> tf.Tensor:
        # Few operations, because a network contains thousands of these sums to trace.
        sums = []
        for size in sorted({abs(f) for f in row if f}):
            plus, minus = ([x for f, x in zip(row, tensors, strict=True) if f == s * size] for s in (1, -1))
            total = functools.reduce(operator.add, plus) if plus else -minus.pop(0)
            total = functools.reduce(operator.sub, minus, total)
            sums.append(total if size == 1 else total * size)
        return functools.reduce(operator.add, sums)

    columns = [[combine(row, column) for row in matrix] for column in zip(*grid, strict=True)]
    return [[combine(row, tensors) for row in matrix] for tensors in zip(*columns, strict=True)]


def transposed(matrix: Matrix) -> Matrix:
    """The transpose of a matrix."""
    return tuple(zip(*matrix, strict=True))


def unstacked(kernel: tf.Tensor) -> Grid:
    """The taps of a kernel [H, W, ...] as a grid."""
    return [tf.unstack(row) for row in tf.unstack(kernel)]


def stacked(grid: Grid) -> tf.Tensor:
    """The kernel [H, W, ...] with the taps of a grid."""
    return tf.stack([tf.stack(row) for row in grid])


def phase_kernels(kernel: tf.Tensor) -> list[tf.Tensor]:
    """The 2x2 kernels by which each of PHASES reads the small map: sums of the taps of kernel [3, 3, in, out]."""
    rows = along_both_axes(_PHASE_TAPS, unstacked(kernel))
    return [stacked([row[2 * b : 2 * b + 2] for row in rows[2 * a : 2 * a + 2]]) for a, b in PHASES]


def phase_padding(a: int, b: int) -> list[list[int]]:
    """The zeros around the small map for phase (a, b)."""
    return [[0, 0], [1 - a, a], [1 - b, b], [0, 0]]


def gradient_kernel(kernel: tf.Tensor) -> tf.Tensor:
    """The kernel [4, 4, in, out] of stride 2 that maps the output's gradient to the input's."""
    return stacked(along_both_axes(_GRADIENT_TAPS, unstacked(kernel)))


def gradient_of_taps(grad: tf.Tensor) -> tf.Tensor:
    """The gradient of kernel [3, 3, in, out], given that of `gradient_kernel(kernel)`."""
    return stacked(along_both_axes(transposed(_GRADIENT_TAPS), unstacked(grad)))


def upsampled_conv2d_gradients(
    x: tf.Tensor,
    kernel: tf.Tensor,
    grad_y: tf.Tensor,
    *,
    gradient_kernel: Callable[[tf.Tensor], tf.Tensor] = gradient_kernel,
    gradient_of_taps: Callable[[tf.Tensor], tf.Tensor] = gradient_of_taps,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The gradients of the upsampled convolution with respect to x, kernel and bias.

    Args:
      x: [B, H, W, C].
      kernel: [3, 3, C, channels].
      grad_y: [B, 2 H, 2 W, channels].
      gradient_kernel: this module's function, or the same compiled as a region.
      gradient_of_taps: likewise.
    """
    # The transpositions are here because XLA is slow at them on a CPU, where the two functions are regions.
    kernel4 = tf.transpose(gradient_kernel(kernel), [0, 1, 3, 2])
    grad_x = tf.nn.conv2d(grad_y, kernel4, strides=2, padding="SAME")
    grad_kernel4 = tf.raw_ops.Conv2DBackpropFilter(
        input=grad_y, filter_sizes=kernel4.shape, out_backprop=x, strides=[1, 2, 2, 1], padding="SAME"
    )
    grad_kernel = gradient_of_taps(tf.transpose(grad_kernel4, [0, 1, 3, 2]))
    return grad_x, grad_kernel, tf.raw_ops.BiasAddGrad(out_backprop=grad_y)
