"""The size of a preset's network, counted layer by layer, and the memory of its training step."""

from collections.abc import Iterator
from typing import NamedTuple

from diffusion_tf.presets import Preset

# Memory of a training step for each byte of activations: 1.2 to 1.8 in XLA's programs for CPUs, by memory_analysis().
_ACTIVATION_FACTOR = 1.6


class Size(NamedTuple):
    """What a layer or a network needs.

    Attributes:
      parameters: weights and biases.
      multiply_adds: products of the forward pass of one image.
      activations: numbers that a training step keeps of one image for its backward pass.
    """

    parameters: int
    multiply_adds: int
    activations: int


def network_size(preset: Preset) -> Size:
    """The size of the network that `unet.py:UNet` builds for `preset`."""
    return Size(*map(sum, zip(*_layers(preset), strict=True)))


def training_bytes(preset: Preset, images: int) -> int:
    """Estimated memory of a training step that computes `images` at once.

    Weights, EMA, Adam's two moments and gradients are float32. Activations have the compute dtype; a factor stands for
    their gradients and copies. The estimate is within a quarter of what XLA's programs for CPUs take. Programs for
    other devices may take more or less.
    """
    size = network_size(preset)
    activation_bytes = images * size.activations * (2 if preset.precision == "bfloat16" else 4)
    return 20 * size.parameters + round(_ACTIVATION_FACTOR * activation_bytes)


def _layers(preset: Preset) -> Iterator[Size]:
    """The layers in the order of `unet.py:UNet`."""
    ch, temb = preset.ch, 4 * preset.ch
    height, width, image_channels = preset.image_shape
    sizes = [(height >> level, width >> level) for level in range(len(preset.ch_mult))]
    levels = [
        (ch * mult, h * w, h in preset.attn_resolutions) for mult, (h, w) in zip(preset.ch_mult, sizes, strict=True)
    ]
    yield _dense(ch, temb, 1)
    yield _dense(temb, temb, 1)
    if preset.num_classes:
        yield Size(preset.num_classes * temb, 0, temb)
    yield _conv(image_channels, ch, height * width)
    channels, skips = ch, [ch]
    for level, (level_channels, positions, attends) in enumerate(levels):
        for _ in range(preset.num_res_blocks):
            yield from _block(channels, level_channels, positions, temb)
            channels = level_channels
            if attends:
                yield from _attention(channels, positions)
            skips.append(channels)
        if level != len(levels) - 1:
            yield _conv(channels, channels, levels[level + 1][1])
            skips.append(channels)
    yield from _block(channels, channels, levels[-1][1], temb)
    if preset.mid_attention:
        yield from _attention(channels, levels[-1][1])
    yield from _block(channels, channels, levels[-1][1], temb)
    for level, (level_channels, positions, attends) in reversed(list(enumerate(levels))):
        for _ in range(preset.num_res_blocks + 1):
            yield from _block(channels + skips.pop(), level_channels, positions, temb)
            channels = level_channels
            if attends:
                yield from _attention(channels, positions)
        if level != 0:
            yield _conv(channels, channels, levels[level - 1][1])
    yield _norm(channels, height * width)
    yield _conv(channels, image_channels * (2 if preset.model_var_type == "learned" else 1), height * width)


def _block(in_channels: int, channels: int, positions: int, temb: int) -> Iterator[Size]:
    yield _norm(in_channels, positions)
    yield _conv(in_channels, channels, positions)
    yield _dense(temb, channels, 1)
    yield _norm(channels, positions)
    yield _conv(channels, channels, positions)
    if in_channels != channels:
        yield _dense(in_channels, channels, positions)


def _attention(channels: int, positions: int) -> Iterator[Size]:
    yield _norm(channels, positions)
    yield from 4 * [_dense(channels, channels, positions)]  # queries, keys, values, and the projection of the result
    yield Size(0, 2 * positions**2 * channels, 2 * positions**2)  # logits and weights


def _norm(channels: int, positions: int) -> Size:
    return Size(2 * channels, 0, channels * positions)


def _conv(in_channels: int, channels: int, positions: int) -> Size:
    weights = 9 * in_channels * channels
    return Size(weights + channels, weights * positions, channels * positions)


def _dense(in_channels: int, channels: int, positions: int) -> Size:
    weights = in_channels * channels
    return Size(weights + channels, weights * positions, channels * positions)
