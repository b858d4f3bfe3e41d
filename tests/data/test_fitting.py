"""The size of pictures: each mode against Pillow's own functions, and what it says of small pictures."""

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
from support.odd_pictures import encoded, picture

from diffusion_tf.data.fitting import Fitting
from diffusion_tf.errors import ConfigError, InputError

LANCZOS = PIL.Image.Resampling.LANCZOS
SIZES = [(50, 40), (40, 50), (64, 64), (33, 90), (12, 200), (20, 12), (7, 7), (1, 30)]
TARGETS = [(16, 16), (16, 32), (48, 12)]  # (width, height)


def fit(image, target, resize, channels=3):
    return Fitting((target[1], target[0], channels), resize).fit(np.asarray(image).reshape(*image.size[::-1], -1))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("size", SIZES)
def test_crop_takes_the_largest_centred_part_of_the_right_aspect_ratio(size, target):
    image = picture(1, size)
    scale = min(size[0] / target[0], size[1] / target[1])
    part = [max(1, int(scale * side + 0.5 + 1e-9)) for side in target]
    left, top = ((whole - cut) // 2 for whole, cut in zip(size, part, strict=True))
    wanted = image.crop((left, top, left + part[0], top + part[1])).resize(target, LANCZOS)
    np.testing.assert_array_equal(fit(image, target, "crop"), np.asarray(wanted))


@pytest.mark.parametrize(
    ("size", "target"),
    [
        ((50, 40), (20, 20)), ((40, 50), (20, 20)), ((64, 64), (16, 16)), ((64, 64), (16, 32)), ((30, 90), (24, 24)),
        ((20, 10), (16, 32)),
    ],
)  # fmt: skip
def test_pad_is_pillows_pad_with_white(size, target):
    for mode in ("RGB", "L"):
        image = picture(2, size).convert(mode)
        padded = PIL.ImageOps.pad(image, target, LANCZOS, color="white")
        wanted = np.asarray(padded).reshape(target[1], target[0], -1)
        np.testing.assert_array_equal(fit(image, target, "pad", len(mode)), wanted)


def test_pad_with_alpha_is_transparent():
    found = fit(picture(2, (40, 20)).convert("RGBA"), (16, 16), "pad", channels=4)
    assert not found[:4].any() and not found[-4:].any() and (found[4:12, :, 3] == 255).all()


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_stretch_is_pillows_resize(mode):
    image = picture(3, (50, 40)).convert(mode)
    if mode == "RGBA":
        image.putalpha(PIL.Image.linear_gradient("L").resize(image.size))
    wanted = np.asarray(image.resize((16, 24), LANCZOS)).reshape(24, 16, -1)
    np.testing.assert_array_equal(fit(image, (16, 24), "stretch", len(mode)), wanted)


def test_scaling_is_antialiased():
    stripes = PIL.Image.fromarray(np.tile(np.array([0, 255], np.uint8), (64, 32)))
    assert np.abs(fit(stripes, (16, 16), "crop", 1).astype(int) - 127.5).max() < 16


def test_a_picture_of_the_right_size_keeps_its_pixels():
    image = picture(4, (32, 16))
    for resize in ("crop", "pad", "stretch", "none"):
        fitting = Fitting((16, 32, 3), resize)
        np.testing.assert_array_equal(fitting.fit(fitting.decode(encoded(image))), np.asarray(image))
        assert not fitting.enlarges(np.asarray(image))


@pytest.mark.parametrize(
    ("size", "resize", "enlarged"),
    [
        ((20, 40), "crop", False), ((15, 40), "crop", True), ((15, 40), "pad", False), ((15, 15), "pad", True),
        ((15, 40), "stretch", True), ((16, 16), "stretch", False),
    ],
)  # fmt: skip
def test_enlarged_pictures_are_known(size, resize, enlarged):
    assert Fitting((16, 16, 3), resize).enlarges(np.asarray(picture(5, size))) == enlarged


def test_none_refuses_another_size():
    with pytest.raises(InputError, match=r"its size is 20 x 40 pixels, and must be 16 x 16 \(width x height\)"):
        Fitting((16, 16, 3), "none").decode(encoded(picture(6, (20, 40))))
    images = np.zeros((2, 20, 40, 3), np.uint8)
    with pytest.raises(ConfigError, match="resize=none: the images are 20x40, and the run's 16x16"):
        Fitting((16, 16, 3), "none").fit_array(images)
    with pytest.raises(ConfigError, match="channels=3: images of 2 channels keep them"):
        Fitting((16, 16, 3)).fit_array(images[..., :2])
    assert Fitting((16, 16, 1)).fit_array(images).shape == (2, 16, 16, 1)
