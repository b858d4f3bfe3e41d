"""3x3 convolutions in float32 on a CPU, by 4 products for each pixel of the output in place of 9.

Winograd's minimal filtering F(2x2, 3x3) (Lavin & Gray 2015, arXiv:1509.09308): tiles of 4x4 pixels, overlapping by two,
become 16 sums of pixels, and the kernel 16 sums of taps; their products over the channels, summed once more, are 2x2
pixels of the output. Each is a sum of C products and not of 9 C, so that this rounds less than a running sum does.
"""

import functools
import operator

import tensorflow as tf

from diffusion_tf.ops.cpu.regions import region_without_gradient

Matrix = tuple[tuple[float, ...], ...]
Grid = list[list[tf.Tensor]]

# B^T, G and A^T of the paper; each acts along both axes.
_PIXELS: Matrix = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
_TAPS: Matrix = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))
_OUTPUTS: Matrix = ((1, 1, 1, 0), (0, 1, -1, -1))


@tf.custom_gradient
def conv3x3(x: tf.Tensor, kernel: tf.Tensor):
    """The convolution of x [B, H, W, C], H and W even, with kernel [3, 3, C, channels]; zeros around x."""

    def grad(grad_y):
        return _convolution(grad_y, _turned(kernel)), _grad_kernel(x, grad_y)

    return _convolution(x, kernel), grad


# To start a program costs as much as some of its work, so that each is a whole convolution.


@region_without_gradient
def _convolution(x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    _, height, width, _ = x.shape
    return _join(_products(_tiles(x), _taps(kernel)), height, width)


@region_without_gradient
def _turned(kernel: tf.Tensor) -> tf.Tensor:
    """The kernel upside down, from its channels to C: by it the gradient of y becomes that of x."""
    return tf.transpose(kernel[::-1, ::-1], [0, 1, 3, 2])


@region_without_gradient
def _grad_kernel(x: tf.Tensor, grad_y: tf.Tensor) -> tf.Tensor:
    # The tiles of x, four times its size, are made again.
    grad_taps = _products(_tiles(x), _flat(_grad_join(grad_y)), transpose_a=True)
    return stacked(along_both_axes(transposed(_TAPS), _grid(grad_taps)))


def along_both_axes(matrix: Matrix, grid: Grid) -> Grid:
    """The product matrix @ grid @ matrix^T, for a grid of tensors."""

    def combine(row, tensors):
        # In few operations, as there are thousands in a network to trace.
        sums = []
        for size in sorted({abs(f) for f in row if f}):
            added, taken = ([x for f, x in zip(row, tensors, strict=True) if f == s * size] for s in (1, -1))
            total = functools.reduce(operator.add, added) if added else -taken.pop(0)
            total = functools.reduce(operator.sub, taken, total)
            sums.append(total if size == 1 else total * size)
        return functools.reduce(operator.add, sums)

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


def _tiles(x: tf.Tensor) -> list[tf.Tensor]:
    """Maps x [B, H, W, C] to the 16 sums of pixels [tiles, C]."""
    _, height, width, channels = x.shape
    # By rows: over zeros along four axes LLVM spends seconds.
    rows = tf.pad(tf.reshape(x, [-1, height, width * channels]), [[0, 0], [1, 1], [channels, channels]])
    x = tf.reshape(rows, [-1, height + 2, width + 2, channels])
    pixels = [[x[:, i : i + height : 2, j : j + width : 2] for j in range(4)] for i in range(4)]
    return _flat(along_both_axes(_PIXELS, pixels))


def _taps(kernel: tf.Tensor) -> list[tf.Tensor]:
    """Maps kernel [3, 3, C, channels] to the 16 sums of taps [C, channels]."""
    return [u for row in along_both_axes(_TAPS, unstacked(kernel)) for u in row]


def _products(a: list[tf.Tensor], b: list[tf.Tensor], transpose_a: bool = False) -> list[tf.Tensor]:
    """The 16 products of matrices."""
    return [tf.matmul(x, y, transpose_a) for x, y in zip(a, b, strict=True)]


def _join(products: list[tf.Tensor], height: int, width: int) -> tf.Tensor:
    """The 16 products [tiles, channels] to y [B, height, width, channels]."""
    channels = products[0].shape[-1]
    shape = tf.constant([-1, height // 2, width // 2, channels])
    maps = _grid([tf.reshape(m, shape) for m in products])
    pixels = [tf.stack(row, axis=3) for row in along_both_axes(_OUTPUTS, maps)]
    return tf.reshape(tf.stack(pixels, axis=2), [-1, height, width, channels])


def _grad_join(grad_y: tf.Tensor) -> Grid:
    """The gradient of `_join`, as maps [B, H / 2, W / 2, channels]."""
    pixels = [[grad_y[:, i::2, j::2] for j in range(2)] for i in range(2)]
    return along_both_axes(transposed(_OUTPUTS), pixels)


def _grid(tensors: list[tf.Tensor]) -> Grid:
    return [tensors[i : i + 4] for i in range(0, 16, 4)]


def _flat(grid: Grid) -> list[tf.Tensor]:
    """Each map [B, H, W, C] of a grid as [B H W, C]."""
    shape = tf.constant([-1, grid[0][0].shape[-1]])
    return [tf.reshape(x, shape) for row in grid for x in row]
