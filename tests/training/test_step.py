"""The augmentation of a training step's images."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from diffusion_tf.errors import ConfigError
from diffusion_tf.presets import Preset
from diffusion_tf.rng import CounterRng
from diffusion_tf.training.step import augmented

SHIFTS = Preset(
    dataset="images", image_size=6, image_width=9, channels=2, random_flip=False, random_shift=2, attn_resolutions=()
)


@pytest.mark.parametrize("compiled", [False, True])
def test_shifts_are_crops_of_the_mirrored_image_and_all_equally_likely(compiled):
    images = np.random.default_rng(0).normal(size=(1000, *SHIFTS.image_shape)).astype(np.float32)
    rng = CounterRng(3, 5, 7)
    shifted = tf.function(lambda x: augmented(x, SHIFTS, rng), jit_compile=compiled)(images).numpy()
    begin = np.floor(5 * rng.uniform("shift", (len(images), 2)).numpy()).astype(int)
    for image, found, (row, column) in zip(images, shifted, begin, strict=True):
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="reflect")
        np.testing.assert_array_equal(found, padded[row : row + 6, column : column + 9])
    counts = np.bincount(5 * begin[:, 0] + begin[:, 1], minlength=25)
    assert np.square(counts - 40).sum() / 40 < 51  # chi squared with 24 degrees of freedom: p = 0.001


def test_an_images_shift_and_flip_are_its_own_in_any_batch():
    preset = dataclasses.replace(SHIFTS, random_flip=True)
    images = np.random.default_rng(0).normal(size=(8, *SHIFTS.image_shape)).astype(np.float32)
    whole = augmented(tf.constant(images), preset, CounterRng(0, 1, 0)).numpy()
    parts = [augmented(tf.constant(images[i : i + 4]), preset, CounterRng(0, 1, 0).skip(i)).numpy() for i in (0, 4)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    one_axis = dataclasses.replace(preset, random_shift=0)
    flipped = augmented(tf.constant(images), one_axis, CounterRng(0, 1, 0)).numpy()
    kinds = {"kept": images, "flipped": images[:, :, ::-1]}
    of_kind = {
        name: [np.array_equal(a, b) for a, b in zip(flipped, other, strict=True)] for name, other in kinds.items()
    }
    assert any(of_kind["kept"]) and any(of_kind["flipped"]) and sum(map(sum, of_kind.values())) == 8


def test_a_shift_is_less_than_the_sides():
    dataclasses.replace(SHIFTS, random_shift=5)
    with pytest.raises(ConfigError, match="random_shift=6: must be less than the sides"):
        dataclasses.replace(SHIFTS, random_shift=6)
    with pytest.raises(ConfigError, match="random_shift=-1: must be 0 or more"):
        dataclasses.replace(SHIFTS, random_shift=-1)
