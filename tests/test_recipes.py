"""The recipes that are chosen for images of any shape and number."""

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import diffusion_tf as dtf
from diffusion_tf.errors import ConfigError
from diffusion_tf.network_size import network_size
from diffusion_tf.presets import PRESETS
from diffusion_tf.recipes import choose_preset, copying_warning

sides = st.integers(1, 1024)
counts = st.integers(1, 10**7)


def chosen_or_advice(height, width, channels, count):
    """The preset, or the sizes that the refusal names."""
    try:
        return choose_preset((height, width, channels), count), []
    except ConfigError as error:
        advice = str(error).rpartition("take ")[2].split(" or ")
        return None, [tuple(map(int, size.split("x"))) for size in advice]


@pytest.mark.parametrize(
    ("name", "num_images", "differs"),
    [
        ("cifar10", 50_000, {"num_steps": 780_000}),
        ("celebahq256", 30_000, {"num_steps": 960_000, "dropout": 0.1}),
        ("lsun_church", 126_227, {"num_steps": 1_600_000}),
        ("lsun_cat", 1_657_266, {"num_steps": 1_600_000}),
    ],
)
def test_the_papers_images_get_the_papers_recipe(name, num_images, differs):
    preset = PRESETS[name]
    chosen = choose_preset(preset.image_shape, num_images)
    assert dataclasses.replace(preset, dataset="images", **differs) == chosen


def test_the_digits_get_the_digits_network():
    digits = PRESETS["digits"]
    chosen = choose_preset(digits.image_shape, 1617)
    for name in ("ch", "ch_mult", "attn_resolutions", "batch_size", "random_flip"):
        assert getattr(chosen, name) == getattr(digits, name), name


@given(sides, sides, st.sampled_from([1, 3, 4]), counts)
@settings(deadline=None, max_examples=300)
def test_every_size_has_a_network_or_the_nearest_sizes_that_have_one(height, width, channels, count):
    preset, advice = chosen_or_advice(height, width, channels, count)
    if preset is None:
        assert 1 <= len(advice) <= 2
        assert all(chosen_or_advice(*size, channels, count)[0] for size in advice)
        return
    factor = 2 ** (len(preset.ch_mult) - 1)
    assert preset.image_shape == (height, width, channels)
    assert height % factor == 0 and width % factor == 0
    assert (height // factor) * (width // factor) <= 32 * 32
    assert min(height, width) // factor >= 4 or factor == 1
    assert set(preset.attn_resolutions) <= {height >> level for level in range(len(preset.ch_mult))}
    assert all(preset.ch * mult % 32 == 0 for mult in preset.ch_mult)
    assert preset.num_steps % preset.steps_per_loop == 0


@given(st.sampled_from([(8, 8, 1), (28, 28, 1), (32, 64, 1), (64, 64, 3), (256, 256, 3)]), counts, counts)
@settings(deadline=None)
def test_more_images_never_get_a_smaller_network_or_fewer_looks(shape, count, more):
    few, many = (choose_preset(shape, n) for n in sorted((count, more)))
    assert network_size(few).parameters <= network_size(many).parameters
    assert few.num_steps * few.batch_size <= 1.05 * many.num_steps * many.batch_size  # steps have two digits
    assert few.dropout >= many.dropout and few.random_shift >= many.random_shift


def test_28_pixels_are_halved_to_7():
    preset = choose_preset((28, 28, 1), 60_000)
    assert (preset.ch_mult, preset.attn_resolutions) == ((1, 2, 2), (14,))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((127, 127, 3), "image_size=127: images of 127x127 pixels cannot .*: take 120x120 or 128x128"),
        ((128, 127, 3), "image_width=127: images of 128x127 pixels cannot .*: take 128x120 or 128x128"),
        ((2048, 2048, 3), "image_size=2048: must be 1,024 at most"),
        ((0, 8, 3), "image_size=0: must be greater than 0"),
        ((8, 8, 0), "channels=0: must be greater than 0"),
    ],
)
def test_other_sizes_are_refused(shape, message):
    with pytest.raises(ConfigError, match=message):
        choose_preset(shape, 100)


def test_what_follows_from_a_field_follows_from_its_override():
    preset = choose_preset((32, 32, 3), 50_000, num_steps=3800, ch_mult=(1,), dropout=0.0)
    digits = PRESETS["digits"]
    assert (preset.num_steps, preset.dropout, preset.attn_resolutions) == (3800, 0.0, ())
    assert math.isclose(preset.ema_decay, digits.ema_decay, abs_tol=1e-3)
    assert (preset.warmup_steps, preset.checkpoint_every, preset.sample_every) == (95, 450, 1900)
    short = choose_preset((32, 32, 3), 50_000, num_steps=30)
    assert (short.steps_per_loop, short.checkpoint_every, short.sample_every) == (1, 3, 0)
    for change, message in (({"num_steps": -1}, "num_steps=-1"), ({"learning_rate": -1.0}, "learning_rate=-1.0")):
        with pytest.raises(ConfigError, match=message):
            choose_preset((32, 32, 3), 50_000, **change)


def test_few_images_get_a_warning_dropout_and_shifts():
    preset = choose_preset((64, 64, 3), 999)
    assert (preset.dropout, preset.random_shift, preset.random_flip) == (0.2, 2, True)
    assert copying_warning(preset, 999).startswith("999 images are few, and a network may copy them. dropout=0.2 and")
    preset = choose_preset((64, 64, 3), 1000)
    assert (preset.dropout, preset.random_shift, copying_warning(preset, 1000)) == (0.1, 0, None)


def test_the_public_api_chooses_too():
    assert dtf.choose_preset is choose_preset
