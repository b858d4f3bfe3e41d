"""3x3 convolutions in float32 on a CPU, by 4 products for each pixel of the output in place of 9.

Winograd's minimal filtering F(2x2, 3x3) (Lavin & Gray 2015, arXiv:1509.09308): tiles of 4x4 pixels, overlapping by two,
become 16 sums of pixels, and the kernel 16 sums of taps; their products over the channels, summed once more, are 2x2
pixels of the output. The direct convolution adds up nine times as many products, so that this one even rounds less.
"""

import tensorflow as tf

from diffusion_tf.regions import region

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

    def grad(grad_y):
        return _grad_x(grad_y, kernel), _grad_kernel(x, grad_y)

    return _conv3x3(x, kernel), grad


@region
def _conv3x3(x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    _, height, width, _ = x.shape
    return _join([tf.matmul(v, u) for v, u in zip(_tiles(x), _taps(kernel), strict=True)], height, width)


@region
def _grad_x(grad_y: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    """By the kernel upside down, from its channels to C."""
    _, height, width, _ = grad_y.shape
    taps = _taps(kernel)
    turned = [taps[4 * i + j] for i in _UPSIDE_DOWN for j in _UPSIDE_DOWN]
    products = [tf.matmul(g, u, transpose_b=True) for g, u in zip(_tiles(grad_y), turned, strict=True)]
    return _join(products, height, width)


@region
def _grad_kernel(x: tf.Tensor, grad_y: tf.Tensor) -> tf.Tensor:
    """The tiles of x, four times its size, are made again."""
    pixels = [[grad_y[:, i::2, j::2] for j in range(2)] for i in range(2)]
    grad_products = _flat(_along_both_axes(_transposed(_OUTPUTS), pixels))
    grad_taps = [tf.matmul(v, g, transpose_a=True) for v, g in zip(_tiles(x), grad_products, strict=True)]
    return tf.stack([tf.stack(row) for row in _along_both_axes(_transposed(_TAPS), _grid(grad_taps))])


def _tiles(x: tf.Tensor) -> list[tf.Tensor]:
    """Maps x [B, H, W, C] to the 16 sums of pixels [tiles, C]."""
    _, height, width, _ = x.shape
    x = tf.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]])
    pixels = [[x[:, i : i + height : 2, j : j + width : 2] for j in range(4)] for i in range(4)]
    return _flat(_along_both_axes(_PIXELS, pixels))


def _taps(kernel: tf.Tensor) -> list[tf.Tensor]:
    """Maps kernel [3, 3, C, channels] to the 16 sums of taps [C, channels]."""
    taps = [tf.unstack(row) for row in tf.unstack(kernel)]
    return [u for row in _along_both_axes(_TAPS, taps) for u in row]


def _join(products: list[tf.Tensor], height: int, width: int) -> tf.Tensor:
    """The 16 products [tiles, channels] to y [B, height, width, channels]."""
    channels = products[0].shape[-1]
    maps = _grid([tf.reshape(m, [-1, height // 2, width // 2, channels]) for m in products])
    pixels = [tf.stack(row, axis=3) for row in _along_both_axes(_OUTPUTS, maps)]
    return tf.reshape(tf.stack(pixels, axis=2), [-1, height, width, channels])


def _along_both_axes(matrix: Matrix, grid: Grid) -> Grid:
    """The product matrix @ grid @ matrix^T, for a grid of tensors."""

    def combine(row, tensors):
        # In few operations, as there are thousands in a network to trace: what is subtracted comes last.
        terms = sorted(((f, x) for f, x in zip(row, tensors, strict=True) if f), key=lambda term: term[0] < 0)
        signed = [(f < 0, x if abs(f) == 1 else x * abs(f)) for f, x in terms]
        total = -signed[0][1] if signed[0][0] else signed[0][1]
        for negative, x in signed[1:]:
            total = total - x if negative else total + x
        return total

    columns = [[combine(row, column) for row in matrix] for column in zip(*grid, strict=True)]
    return [[combine(row, tensors) for row in matrix] for tensors in zip(*columns, strict=True)]


def _transposed(matrix: Matrix) -> Matrix:
    return tuple(zip(*matrix, strict=True))


def _grid(tensors: list[tf.Tensor]) -> Grid:
    return [tensors[i : i + 4] for i in range(0, 16, 4)]


def _flat(grid: Grid) -> list[tf.Tensor]:
    """Each map [B, H, W, C] of a grid as [B H W, C]."""
    return [tf.reshape(x, [-1, x.shape[-1]]) for row in grid for x in row]
