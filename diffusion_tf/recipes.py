"""A recipe for images of any shape and number: `choose_preset`.

Each rule agrees with the recipes that are known to work: Appendix B's for 50,000 images of 32x32 pixels and for
hundreds of thousands of 256x256 pixels, and that of the 1,617 digits of 8x8 pixels.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from diffusion_tf.errors import ConfigError
from diffusion_tf.presets import OWN_IMAGES, Preset

FEW_IMAGES = 1000
"""A network copies the pictures of a set smaller than this, rather than learning what they share."""

# Channels at each resolution by the number of resolutions, as multiples of `ch`: as Appendix B has them for 4 and 6.
_CH_MULT = {1: (1,), 2: (1, 2), 3: (1, 2, 2), 4: (1, 2, 2, 2), 5: (1, 1, 2, 2, 4), 6: (1, 1, 2, 2, 4, 4)}
_LEAST_SIDE = 4  # pixels of the lowest resolution, as in Appendix B's network for 32x32 pixels
_MOST_PIXELS = 1024  # of a side
_MOST_LOWEST = 32 * 32  # positions of the lowest resolution, which always attend to each other
_MOST_ATTENDING = 16 * 16  # positions that attend to each other elsewhere; Appendix B: at 16x16
_MOST_BATCH_PIXELS = 64 * 256 * 256  # Appendix B's largest batch
_EPOCHS = 2048  # as CIFAR-10's 800,000 steps
_MOST_IMAGES_SEEN = 100e6  # Appendix B has 32 to 154 million
_SCHEDULE = tuple("num_steps warmup_steps ema_decay steps_per_loop checkpoint_every keep_every sample_every".split())
_LEAST_STEPS, _MOST_STEPS = 5000, 2_400_000  # Appendix B's longest run


def choose_preset(image_shape: tuple[int, int, int], num_images: int, **overrides: Any) -> Preset:
    """A recipe that suits a set of images. It depends on the arguments alone.

    A field that depends on another field depends on its override too: `num_steps`, for example, decides the warm-up,
    the EMA and the intervals of checkpoints.

    Args:
      image_shape: (H, W, C).
      num_images: the number of training images.
      **overrides: values for some fields of the preset, which stand as they are.

    Raises:
      ConfigError: the images cannot be halved far enough, or a value is out of range.
    """
    height, width, channels = image_shape
    given = {name: value for name, value in overrides.items() if name not in _SCHEDULE}
    sides = {"image_size": height, "image_width": 0 if width == height else width, "channels": channels}
    preset = Preset(dataset=OWN_IMAGES, **{**sides, "attn_resolutions": (), **given})  # checks the values
    preset = dataclasses.replace(preset, **{**_network(preset, num_images, given), **given})
    steps = {"num_steps": _num_steps(num_images, preset.batch_size), **_only(overrides, "num_steps")}
    preset = dataclasses.replace(preset, **steps)
    return dataclasses.replace(preset, **{**_schedule(preset.num_steps, overrides), **_only(overrides, *_SCHEDULE)})


def copying_warning(preset: Preset, num_images: int) -> str | None:
    """What to tell people who train on few images; None if there are enough."""
    if num_images >= FEW_IMAGES:
        return None
    return (
        f"{num_images} images are few, and a network may copy them. dropout={preset.dropout} and"
        f" random_shift={preset.random_shift} work against it; diffusion-tf neighbors tells whether samples are copies"
    )


def _network(preset: Preset, num_images: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of augmentation, network and batch."""
    height, width, channels = preset.image_shape
    ch_mult = preset.ch_mult if "ch_mult" in given else _CH_MULT[len(_resolutions(height, width))]
    sizes = _halved(height, width)[: len(ch_mult)]
    attending = [h for h, w in sizes if _MOST_ATTENDING // 4 < h * w <= _MOST_ATTENDING]
    few = num_images < FEW_IMAGES
    ch = _channels(math.prod(preset.image_shape) * num_images, few)
    return {
        # Grey images are often characters or scans, whose mirror images do not occur.
        "random_flip": channels != 1,
        # The mirrored borders are then 4% of the pixels at most; samples have such borders too.
        "random_shift": round(min(height, width) / 32) if few else 0,
        "ch": ch,
        "ch_mult": ch_mult,
        "attn_resolutions": tuple(attending[:1]),
        # Appendix B: 0.1 for CIFAR-10, against overfitting; 0 for the larger sets.
        "dropout": 0.2 if few else 0.1 if num_images <= 100_000 else 0.0,
        "model_var_type": "fixedsmall" if height * width > 64 * 64 else "fixedlarge",
        "learning_rate": _learning_rate(height * width, given.get("ch", ch)),
        "batch_size": _batch_size(height * width, num_images),
    }


def _halved(height: int, width: int) -> list[tuple[int, int]]:
    """(height, width) at each resolution: images are halved while that is even and leaves 4 pixels, 5 times at most."""
    sizes = [(height, width)]
    while len(sizes) < max(_CH_MULT) and not (height | width) % 2 and min(height, width) // 2 >= _LEAST_SIDE:
        height, width = height // 2, width // 2
        sizes.append((height, width))
    return sizes


def _fits(height: int, width: int) -> bool:
    return math.prod(_halved(height, width)[-1]) <= _MOST_LOWEST and max(height, width) <= _MOST_PIXELS


def _resolutions(height: int, width: int) -> list[tuple[int, int]]:
    """`_halved`, if the lowest resolution is small enough for attention.

    Raises:
      ConfigError: it is not; the message names the nearest sizes for which it is.
    """
    if _fits(height, width):
        return _halved(height, width)
    near = []
    for rounded in (math.floor, math.ceil):
        sides = ([unit * max(1, rounded(side / unit)) for side in (height, width)] for unit in (8, 16, 32, 64))
        near += [f"{h}x{w}" for h, w in sides if _fits(h, w)][:1]
    name, pixels = ("image_size", height) if height % 8 or width % 8 == 0 else ("image_width", width)
    advice = f"take {' or '.join(dict.fromkeys(near))}" if near else f"the largest is {_MOST_PIXELS}x{_MOST_PIXELS}"
    raise ConfigError(
        name, f"={pixels}: images of {height}x{width} pixels cannot be halved often enough for a network: {advice}"
    )


def _channels(num_values: int, few: bool) -> int:
    """`ch`: it grows with the fifth root of the number of values: 32 for digits, 128 for CIFAR-10; few: at most 64."""
    cifar10 = 50_000 * 32 * 32 * 3
    return 32 * min(max(round(4 * (num_values / cifar10) ** 0.2), 1), 2 if few else 4)


def _batch_size(image_pixels: int, num_images: int) -> int:
    """Appendix B: 128 at 32x32 pixels and 64 at 256x256; half for small sets, and less for larger images."""
    fits = 2 ** max(0, (_MOST_BATCH_PIXELS // image_pixels).bit_length() - 1)
    return min(fits, 128 if num_images >= 10_000 else 64)


def _learning_rate(image_pixels: int, ch: int) -> float:
    """Appendix B: 2e-4 at 32x32 pixels and 2e-5 at 256x256, where more is unstable; narrow networks bear more."""
    rate = 2e-4 * (32 * 32 / image_pixels) ** 0.55 * 128 / ch
    return min(1e-3, float(f"{rate:.0e}"))


def _num_steps(num_images: int, batch_size: int) -> int:
    """Appendix B's number of epochs for CIFAR-10, or of images for its larger sets."""
    steps = min(_EPOCHS * num_images, _MOST_IMAGES_SEEN) / max(1, batch_size)
    return int(float(f"{min(max(steps, _LEAST_STEPS), _MOST_STEPS):.1e}"))


def _schedule(steps: int, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that follow from the number of steps: as shares of a run they are digits', and at most CIFAR-10's.

    The EMA forgets the initial weights within a tenth of the run.
    """
    loop = overrides.get("steps_per_loop") or _round_down(min(100, steps // 40))
    save = overrides.get("checkpoint_every") or loop * max(1, min(5000, steps // 8) // loop)
    return {
        "warmup_steps": min(5000, steps // 40),
        "ema_decay": round(1 - max(1e-4, min(1.0, 10 / steps)), 4),
        "steps_per_loop": loop,
        "checkpoint_every": save,
        "keep_every": 20 * save,
        # A grid costs as much as 300 steps of 64 images.
        "sample_every": loop * (min(20_000, steps // 2) // loop) if steps >= 2000 else 0,
    }


def _round_down(number: int) -> int:
    """The largest of 1, 2, 5, 10, 20, 50, 100, ... up to `number`; 1 for less."""
    power = 10 ** (len(str(max(1, number))) - 1)
    return max(digit * power for digit in (1, 2, 5) if digit * power <= max(1, number))


def _only(overrides: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: overrides[name] for name in names if name in overrides}
