"""The Inception network of 2015, by which FID is defined, from weights in PyTorch's layout.

pytorch-fid's `pt_inception-2015-12-05` holds the weights of TensorFlow's graph of that date under torchvision's names
of Inception v3. The graph differs from torchvision's network: averages leave out the padding, the last block pools by
the maximum, and there are 1,008 classes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from diffusion_tf.storage.checkpoints import check_specs
from diffusion_tf.storage.files import Arrays
from diffusion_tf.storage.safetensors_header import ArraySpec

_EPSILON = 1e-3  # of batch normalisation
_FEATURES, _CLASSES = 2048, 1008


class _Conv(NamedTuple):
    """A convolution without bias, batch normalisation and ReLU."""

    name: str
    channels: int
    size: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"


class _Pool(NamedTuple):
    """Pooling over 3x3 pixels; "AVG" leaves out the padding."""

    kind: str
    stride: int = 1
    padding: str = "SAME"


# A list applies its parts one after the other; a tuple applies each to the same input and concatenates the results.
_Part = _Conv | _Pool | list | tuple
_HALVE = _Pool("MAX", 2, "VALID")
_AVERAGE = _Pool("AVG")


def _chain(name: str, *layers: tuple[int, int, int], last_stride: int = 1) -> list[_Conv]:
    """Convolutions `name`_1, `name`_2, ... with (channels, height, width) as given."""
    convs = [_Conv(f"{name}_{i}", channels, (h, w)) for i, (channels, h, w) in enumerate(layers, 1)]
    if last_stride > 1:
        convs[-1] = convs[-1]._replace(stride=last_stride, padding="VALID")
    return convs


def _block_a(name: str, pool_channels: int) -> _Part:
    return (
        _Conv(f"{name}.branch1x1", 64),
        _chain(f"{name}.branch5x5", (48, 1, 1), (64, 5, 5)),
        _chain(f"{name}.branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3)),
        [_AVERAGE, _Conv(f"{name}.branch_pool", pool_channels)],
    )


def _block_b(name: str) -> _Part:
    return (
        _Conv(f"{name}.branch3x3", 384, (3, 3), 2, "VALID"),
        _chain(f"{name}.branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3), last_stride=2),
        _HALVE,
    )


def _block_c(name: str, c: int) -> _Part:
    return (
        _Conv(f"{name}.branch1x1", 192),
        _chain(f"{name}.branch7x7", (c, 1, 1), (c, 1, 7), (192, 7, 1)),
        _chain(f"{name}.branch7x7dbl", (c, 1, 1), (c, 7, 1), (c, 1, 7), (c, 7, 1), (192, 1, 7)),
        [_AVERAGE, _Conv(f"{name}.branch_pool", 192)],
    )


def _block_d(name: str) -> _Part:
    return (
        _chain(f"{name}.branch3x3", (192, 1, 1), (320, 3, 3), last_stride=2),
        _chain(f"{name}.branch7x7x3", (192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3), last_stride=2),
        _HALVE,
    )


def _block_e(name: str, pool: _Pool) -> _Part:
    def split(branch: str) -> tuple[_Conv, _Conv]:
        return _Conv(f"{name}.{branch}a", 384, (1, 3)), _Conv(f"{name}.{branch}b", 384, (3, 1))

    return (
        _Conv(f"{name}.branch1x1", 320),
        [_Conv(f"{name}.branch3x3_1", 384), split("branch3x3_2")],
        [*_chain(f"{name}.branch3x3dbl", (448, 1, 1), (384, 3, 3)), split("branch3x3dbl_3")],
        [pool, _Conv(f"{name}.branch_pool", 192)],
    )


_NETWORK = [
    _Conv("Conv2d_1a_3x3", 32, (3, 3), 2, "VALID"),
    _Conv("Conv2d_2a_3x3", 32, (3, 3), 1, "VALID"),
    _Conv("Conv2d_2b_3x3", 64, (3, 3)),
    _HALVE,
    _Conv("Conv2d_3b_1x1", 80),
    _Conv("Conv2d_4a_3x3", 192, (3, 3), 1, "VALID"),
    _HALVE,
    *(_block_a("Mixed_5b", 32), _block_a("Mixed_5c", 64), _block_a("Mixed_5d", 64)),
    _block_b("Mixed_6a"),
    *(_block_c("Mixed_6b", 128), _block_c("Mixed_6c", 160), _block_c("Mixed_6d", 160), _block_c("Mixed_6e", 192)),
    _block_d("Mixed_7a"),
    *(_block_e("Mixed_7b", _AVERAGE), _block_e("Mixed_7c", _Pool("MAX"))),
]  # fmt: skip


def _apply(part: _Part, x: Any, layer: Callable[[Any, Any], Any], join: Callable[[list], Any]) -> Any:
    """Applies `part` to x, where `layer` computes a convolution or a pooling, and `join` concatenates."""
    if isinstance(part, _Conv | _Pool):
        return layer(part, x)
    if isinstance(part, tuple):
        return join([_apply(inner, x, layer, join) for inner in part])
    for inner in part:
        x = _apply(inner, x, layer, join)
    return x


def weight_shapes() -> dict[str, tuple[int, ...]]:
    """The shapes of all weights in PyTorch's layout, by their names in a `state_dict`."""
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(part: _Conv | _Pool, channels: int) -> int:
        if isinstance(part, _Pool):
            return channels
        shapes[f"{part.name}.conv.weight"] = (part.channels, channels, *part.size)
        for name in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{part.name}.bn.{name}"] = (part.channels,)
        return part.channels

    _apply(_NETWORK, 3, layer, sum)
    return {**shapes, "fc.weight": (_CLASSES, _FEATURES), "fc.bias": (_CLASSES,)}


def fid_inception(arrays: Arrays, path: str) -> Callable[[tf.Tensor], dict[str, tf.Tensor]]:
    """The network with given weights, on the devices of the current strategy.

    Args:
      arrays: weights by the names of a `state_dict`; half precision becomes float32. Counters of batch normalisation
        and torchvision's auxiliary classifier are ignored.
      path: their file, for error messages.

    Returns:
      A function of images float32 [B, 299, 299, 3] in [-1, 1]. It returns `pool_3` [B, 2048], and `logits` [B, 1008]
      without the bias, as Salimans et al. (2016) compute the Inception Score.

    Raises:
      InputError: a weight is missing or unknown, or has another dtype or shape.
    """
    kept = {n: a for n, a in arrays.items() if not n.startswith("AuxLogits.") and not n.endswith("num_batches_tracked")}
    half = ("float16", "bfloat16")
    found = {n: ArraySpec("float32" if a.dtype.name in half else a.dtype.name, a.shape) for n, a in kept.items()}
    check_specs(found, {name: ArraySpec("float32", shape) for name, shape in weight_shapes().items()}, path)
    weights = {name: _folded(name, kept) for name in (n.removesuffix(".conv.weight") for n in kept if ".conv." in n)}
    classes = tf.Variable(kept["fc.weight"].T.astype(np.float32), trainable=False)

    def layer(part: _Conv | _Pool, x: tf.Tensor) -> tf.Tensor:
        if isinstance(part, _Pool):
            return tf.nn.pool(x, [3, 3], part.kind, strides=[part.stride] * 2, padding=part.padding)
        kernel, bias = weights[part.name]
        return tf.nn.relu(tf.nn.conv2d(x, kernel, part.stride, part.padding) + bias)

    def classify(images: tf.Tensor) -> dict[str, tf.Tensor]:
        maps = _apply(_NETWORK, images, layer, lambda branches: tf.concat(branches, axis=-1))
        features = tf.reduce_mean(maps, axis=[1, 2])
        return {"pool_3": features, "logits": features @ classes}

    return classify


def _folded(name: str, arrays: Arrays) -> tuple[tf.Variable, tf.Variable]:
    """Kernel [H, W, in, out] and bias [out] of a convolution and the batch normalisation behind it."""
    gamma, beta, mean, variance = (
        arrays[f"{name}.bn.{key}"].astype(np.float64) for key in ("weight", "bias", "running_mean", "running_var")
    )
    scale = gamma / np.sqrt(variance + _EPSILON)
    kernel = arrays[f"{name}.conv.weight"].transpose(2, 3, 1, 0) * scale
    bias = beta - mean * scale
    return tf.Variable(kernel.astype(np.float32), trainable=False), tf.Variable(
        bias.astype(np.float32), trainable=False
    )
