"""3x3 convolutions in float32 on a CPU, by 4 products for each pixel of the output in place of 9.

Winograd's minimal filtering F(2x2, 3x3) (Lavin & Gray 2015, arXiv:1509.09308): tiles of 4x4 pixels, overlapping by two,
become 16 sums of pixels, and the kernel 16 sums of taps; their products over the channels, summed once more, are 2x2
pixels of the output. Each is a sum of C products and not of 9 C, so that this rounds less than a running sum does.
"""

import functools
import operator

import tensorflow as tf

from diffusion_tf.regions import region_without_gradient

Matrix = tuple[tuple[float, ...], ...]
Grid = list[list[tf.Tensor]]

# B^T, G and A^T of the paper; each acts along both axes.
_PIXELS: Matrix = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
_TAPS: Matrix = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))
_OUTPUTS: Matrix = ((1, 1, 1, 0), (0, 1, -1, -1))
_UPSIDE_DOWN = (3, 1, 2, 0)  # the rows of _TAPS that the taps in reverse have


@tf.custom_gradient
def conv3x3(x: tf.Tensor, kernel: tf.Tensor):
    """The convolution of x [B, H, W, C], H and W even, with kernel [3, 3, C, channels]; zeros around x."""
    _, height, width, _ = x.shape

    def grad(grad_y):
        # By the kernel upside down, from its channels to C.
        taps = _taps(kernel)
        turned = [taps[4 * i + j] for i in _UPSIDE_DOWN for j in _UPSIDE_DOWN]
        grad_x = _join(_products(_tiles(grad_y), turned, transpose_b=True), height=height, width=width)
        # The tiles of x, four times its size, are made again.
        return grad_x, _grad_taps(_products(_tiles(x), _grad_join(grad_y), transpose_a=True))

    return _join(_products(_tiles(x), _taps(kernel)), height=height, width=width), grad


def along_both_axes(matrix: Matrix, grid: Grid) -> Grid:
    """The product matrix @ grid @ matrix^T, for a grid of tensors."""

    def combine(row, tensors):
        # In few operations, as there are thousands in a network to trace.
        terms = [(f, x if abs(f) == 1 else x * abs(f)) for f, x in zip(row, tensors, strict=True) if f]
        added, taken = [x for f, x in terms if f > 0], [x for f, x in terms if f < 0]
        total = functools.reduce(operator.add, added) if added else -taken.pop(0)
        return functools.reduce(operator.sub, taken, total)

    columns = [[combine(row, column) for row in matrix] for column in zip(*grid, strict=True)]
    return [[combine(row, tensors) for row in matrix] for tensors in zip(*columns, strict=True)]


def transposed(matrix: Matrix) -> Matrix:
    """Rows as columns."""
    return tuple(zip(*matrix, strict=True))


def unstacked(kernel: tf.Tensor) -> Grid:
    """A kernel [H, W, ...] as the grid of its taps."""
    return [tf.unstack(row) for row in tf.unstack(kernel)]


def stacked(grid: Grid) -> tf.Tensor:
    """The kernel [H, W, ...] whose taps are the grid."""
    return tf.stack([tf.stack(row) for row in grid])


# Each a program of its own, to be compiled for a shape of maps or of kernels, and not for each pair of the two.


@region_without_gradient
def _tiles(x: tf.Tensor) -> list[tf.Tensor]:
    """Maps x [B, H, W, C] to the 16 sums of pixels [tiles, C]."""
    _, height, width, _ = x.shape
    x = tf.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]])
    pixels = [[x[:, i : i + height : 2, j : j + width : 2] for j in range(4)] for i in range(4)]
    return _flat(along_both_axes(_PIXELS, pixels))


@region_without_gradient
def _taps(kernel: tf.Tensor) -> list[tf.Tensor]:
    """Maps kernel [3, 3, C, channels] to the 16 sums of taps [C, channels]."""
    return [u for row in along_both_axes(_TAPS, unstacked(kernel)) for u in row]


@region_without_gradient
def _products(
    a: list[tf.Tensor], b: list[tf.Tensor], *, transpose_a: bool = False, transpose_b: bool = False
) -> list[tf.Tensor]:
    """The 16 products of matrices."""
    return [tf.matmul(x, y, transpose_a, transpose_b) for x, y in zip(a, b, strict=True)]


@region_without_gradient
def _join(products: list[tf.Tensor], *, height: int, width: int) -> tf.Tensor:
    """The 16 products [tiles, channels] to y [B, height, width, channels]."""
    channels = products[0].shape[-1]
    maps = _grid([tf.reshape(m, [-1, height // 2, width // 2, channels]) for m in products])
    pixels = [tf.stack(row, axis=3) for row in along_both_axes(_OUTPUTS, maps)]
    return tf.reshape(tf.stack(pixels, axis=2), [-1, height, width, channels])


@region_without_gradient
def _grad_join(grad_y: tf.Tensor) -> list[tf.Tensor]:
    """The gradient of `_join`."""
    pixels = [[grad_y[:, i::2, j::2] for j in range(2)] for i in range(2)]
    return _flat(along_both_axes(transposed(_OUTPUTS), pixels))


@region_without_gradient
def _grad_taps(grad_taps: list[tf.Tensor]) -> tf.Tensor:
    """The gradient of `_taps`."""
    return stacked(along_both_axes(transposed(_TAPS), _grid(grad_taps)))


def _grid(tensors: list[tf.Tensor]) -> Grid:
    return [tensors[i : i + 4] for i in range(0, 16, 4)]


def _flat(grid: Grid) -> list[tf.Tensor]:
    """Each map [B, H, W, C] of a grid as [B H W, C]."""
    return [tf.reshape(x, [-1, x.shape[-1]]) for row in grid for x in row]
