"""3x3 convolutions in float32 on a CPU, with 4 products instead of 9 for each pixel of the output.

Winograd's minimal filtering F(2x2, 3x3) (Lavin & Gray 2015, arXiv:1509.09308). Tiles of 4x4 pixels that overlap by two
become 16 sums of pixels, and the kernel becomes 16 sums of taps. Their products over the channels are summed once more
to 2x2 pixels of the output. Each product is a sum of C terms, not 9 C, so this rounds less than a running sum does.
"""

from collections.abc import Callable

import tensorflow as tf

from diffusion_tf.ops.cpu.regions import region_without_gradient
from diffusion_tf.ops.taps import Grid, Matrix, along_both_axes, stacked, transposed, unstacked

# B^T, G and A^T of the paper. Each acts along both axes.
_PIXELS: Matrix = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
_TAPS: Matrix = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))
_OUTPUTS: Matrix = ((1, 1, 1, 0), (0, 1, -1, -1))


@tf.custom_gradient
def conv3x3(x: tf.Tensor, kernel: tf.Tensor) -> tuple[tf.Tensor, Callable]:
    """The convolution of x [B, H, W, C], H and W even, with kernel [3, 3, C, channels]; zeros surround x."""

    def grad(grad_y: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return _convolution(grad_y, _rotated(kernel)), _grad_kernel(x, grad_y)

    return _convolution(x, kernel), grad


# Each region is a whole convolution, because the start of a region costs as much as some of its work.


@region_without_gradient
def _convolution(x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    _, height, width, _ = x.shape
    return _join(_products(_tiles(x), _taps(kernel)), height, width)


@region_without_gradient
def _rotated(kernel: tf.Tensor) -> tf.Tensor:
    """The kernel [3, 3, channels, C], rotated by 180 degrees, that maps the gradient of y to that of x."""
    return tf.transpose(kernel[::-1, ::-1], [0, 1, 3, 2])


@region_without_gradient
def _grad_kernel(x: tf.Tensor, grad_y: tf.Tensor) -> tf.Tensor:
    # Computes the tiles of x again: they are four times its size.
    grad_taps = _products(_tiles(x), _flat(_grad_join(grad_y)), transpose_a=True)
    return stacked(along_both_axes(transposed(_TAPS), _grid(grad_taps)))


def _tiles(x: tf.Tensor) -> list[tf.Tensor]:
    """Maps x [B, H, W, C] to the 16 sums of pixels [tiles, C]."""
    _, height, width, channels = x.shape
    # Pads whole rows, because LLVM takes seconds to compile padding along four axes.
    rows = tf.pad(tf.reshape(x, [-1, height, width * channels]), [[0, 0], [1, 1], [channels, channels]])
    x = tf.reshape(rows, [-1, height + 2, width + 2, channels])
    pixels = [[x[:, i : i + height : 2, j : j + width : 2] for j in range(4)] for i in range(4)]
    return _flat(along_both_axes(_PIXELS, pixels))


def _taps(kernel: tf.Tensor) -> list[tf.Tensor]:
    """Maps kernel [3, 3, C, channels] to the 16 sums of taps [C, channels]."""
    return [u for row in along_both_axes(_TAPS, unstacked(kernel)) for u in row]


def _products(a: list[tf.Tensor], b: list[tf.Tensor], transpose_a: bool = False) -> list[tf.Tensor]:
    """The 16 matrix products."""
    return [tf.matmul(x, y, transpose_a) for x, y in zip(a, b, strict=True)]


def _join(products: list[tf.Tensor], height: int, width: int) -> tf.Tensor:
    """Maps the 16 products [tiles, channels] to y [B, height, width, channels]."""
    channels = products[0].shape[-1]
    shape = tf.constant([-1, height // 2, width // 2, channels])
    maps = _grid([tf.reshape(m, shape) for m in products])
    pixels = [tf.stack(row, axis=3) for row in along_both_axes(_OUTPUTS, maps)]
    return tf.reshape(tf.stack(pixels, axis=2), [-1, height, width, channels])


def _grad_join(grad_y: tf.Tensor) -> Grid:
    """The gradient of `_join`: 16 maps [B, H / 2, W / 2, channels]."""
    pixels = [[grad_y[:, i::2, j::2] for j in range(2)] for i in range(2)]
    return along_both_axes(transposed(_OUTPUTS), pixels)


def _grid(tensors: list[tf.Tensor]) -> Grid:
    return [tensors[i : i + 4] for i in range(0, 16, 4)]


def _flat(grid: Grid) -> list[tf.Tensor]:
    """Each map [B, H, W, C] of a grid as [B H W, C]."""
    shape = tf.constant([-1, grid[0][0].shape[-1]])
    return [tf.reshape(x, shape) for row in grid for x in row]
