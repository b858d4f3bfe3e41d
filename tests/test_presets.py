"""The recipes of Appendix B, and the values that a preset refuses."""

import dataclasses
import json

import numpy as np
import pytest

from diffusion_tf.errors import ConfigError
from diffusion_tf.presets import PRESETS, get_preset, resized


def test_recipes_are_those_of_appendix_b():
    assert set(PRESETS) == {
        "digits", "cifar10", "cifar10_small", "celebahq256", "lsun_church", "lsun_bedroom", "lsun_bedroom_large",
        "lsun_cat",
    }  # fmt: skip
    cifar10 = PRESETS["cifar10"]
    assert (cifar10.learning_rate, cifar10.batch_size, cifar10.dropout) == (2e-4, 128, 0.1)
    assert (cifar10.num_steps, cifar10.model_var_type, cifar10.random_flip) == (800_000, "fixedlarge", True)
    for name, preset in PRESETS.items():
        assert (preset.num_timesteps, preset.beta_schedule, preset.beta_start, preset.beta_end) == (
            1000,
            "linear",
            1e-4,
            0.02,
        )
        assert (preset.model_mean_type, preset.loss_type, preset.grad_clip) == ("eps", "mse", 1.0)
        if preset.image_size == 256:
            assert (preset.learning_rate, preset.batch_size, preset.dropout) == (2e-5, 64, 0.0)
            assert (preset.model_var_type, preset.ch_mult) == ("fixedsmall", (1, 1, 2, 2, 4, 4))
            assert preset.random_flip == (not name.startswith("lsun_bedroom"))
        if name != "digits":
            assert (preset.ema_decay, preset.warmup_steps, preset.attn_resolutions) == (0.9999, 5000, (16,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate=0.0: must be greater than 0"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0: must be greater than 0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan: must be greater than 0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"dropout": 1.0}, r"dropout=1.0: must be in \[0, 1\)"),
        ({"ema_decay": -0.1}, "ema_decay=-0.1"),
        ({"seed": 2**32}, "seed=4294967296"),
        ({"beta_end": 1.5}, "beta_end=1.5"),
        ({"num_timesteps": 1}, "num_timesteps=1: must be 2 or more"),
        ({"model_mean_type": "v"}, "model_mean_type=v: choose one of eps, xstart, xprev"),
        ({"checkpoint_every": 75}, "checkpoint_every=75: must be a multiple of `steps_per_loop=50`"),
        ({"keep_every": 900}, "keep_every=900: must be a multiple of `checkpoint_every=500`"),
        ({"ch_mult": ()}, "ch_mult"),
        ({"num_timesteps": 1e9}, "num_timesteps=1000000000.0: must be a whole number"),
        ({"num_timesteps": 10**9}, "num_timesteps=1000000000: must be 100,000 at most"),
        ({"num_timesteps": 10**5000}, "num_timesteps: the number has too many digits"),
        ({"learning_rate": 10**400}, "learning_rate: the number has too many digits"),
        ({"batch_size": True}, "batch_size=True: must be a whole number"),
        ({"batch_size": "64"}, "batch_size=64: must be a whole number"),
        ({"seed": None}, "seed=None: must be a whole number"),
        ({"random_flip": 1}, "random_flip=1: must be true or false"),
        ({"dropout": "0.1"}, "dropout=0.1: must be a number"),
        ({"beta_end": [0.1]}, r"beta_end=\[0.1\]: must be a number"),
        ({"loss_type": "kl\n" * 99}, r"loss_type='kl\\nkl.*'...: choose one of mse, kl"),
        ({"ch_mult": 2}, "ch_mult=2: must be whole numbers"),
        ({"ch_mult": (1, 2.0)}, "ch_mult=2.0: must be a whole number"),
        ({"ch_mult": (1,) * 11}, "ch_mult=.*: must be 1 to 10 numbers from 1 to 64"),
        ({"attn_resolutions": (256,)}, "makes 65,536 positions that attend to each other; 16,384 at most"),
        ({"image_width": 2048}, "must be 1,024 at most"),
        ({"ch": 4096, "ch_mult": (1, 64)}, r"ch=4096: makes 1,855,878,856,704 weights or more; 268,435,456"),
        ({"image_size": 1024, "ch": 1056}, "image_size=1024: makes 1,107,296,256 features of one image in a layer"),
        ({"batch_size": 2**20, "image_size": 64}, "batch_size=1048576: makes 4,294,967,296 pixels in a batch"),
    ],
)
def test_values_out_of_range_are_refused_by_field_and_range(change, message):
    with pytest.raises(ConfigError, match=message):
        get_preset("digits", **change)


def test_unknown_preset_lists_the_choices():
    with pytest.raises(ConfigError, match="dataset=mnist: choose one of digits, cifar10"):
        get_preset("mnist")


def test_longer_run_has_the_same_recipe():
    preset = get_preset("digits")
    assert preset.recipe_differences(get_preset("digits", num_steps=9000, keep_checkpoints=1)) == []
    assert preset.recipe_differences(get_preset("digits", dropout=0.5, seed=3)) == [
        "dropout: 0.0 != 0.5",
        "seed: 0 != 3",
    ]


@pytest.mark.parametrize("name", sorted(set(PRESETS) - {"digits"}))
@pytest.mark.parametrize("size", [2**power for power in range(2, 11)])
def test_a_resized_preset_has_levels_that_its_images_fill(name, size):
    preset = resized(PRESETS[name], size)
    levels = [size // 2**level for level in range(len(preset.ch_mult))]
    assert preset.image_size == levels[0] == size and levels[-1] >= 4 and size % levels[-1] == 0
    assert preset.attn_resolutions and set(preset.attn_resolutions) <= set(levels)
    assert preset.ch_mult == PRESETS[name].ch_mult[: len(levels)]
    assert resized(PRESETS[name], PRESETS[name].image_size) == PRESETS[name]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("cifar10", {"num_timesteps": 10_000, "batch_size": 8192}),
        ("lsun_bedroom_large", {"ch": 256, "batch_size": 2048}),
        ("celebahq256", {"image_size": 1024, "ch_mult": (1, 1, 2, 2, 4, 4, 8, 8), "attn_resolutions": (32, 16)}),
    ],
)
def test_recipes_beyond_the_papers_are_accepted(name, change):
    get_preset(name, **change)


def test_other_types_of_numbers_become_pythons():
    preset = get_preset("digits", num_steps=np.int64(100), dropout=0, learning_rate=np.float32(0.5), ch_mult=[1, 2])
    assert preset == get_preset("digits", num_steps=100, dropout=0.0, learning_rate=0.5, ch_mult=(1, 2))
    assert json.loads(json.dumps(dataclasses.asdict(preset)))["num_steps"] == 100
    assert (type(preset.dropout), type(preset.learning_rate), type(preset.ch_mult)) == (float, float, tuple)


def test_the_lower_bound_of_weights_is_below_their_number():
    assert 35_746_307 / 4 < get_preset("cifar10").least_weights < 35_746_307


def test_a_field_that_is_younger_than_a_checkpoint_does_not_change_its_recipe():
    digits = get_preset("digits")
    assert digits.recipe_sha256().startswith("bb87c84a60d1")  # of the first version
    assert dataclasses.replace(digits, image_width=16).recipe_sha256() != digits.recipe_sha256()


def test_label_dropout_is_part_of_a_recipe_with_classes_only():
    digits, classes = get_preset("digits"), get_preset("digits", num_classes=10)
    assert digits.recipe_differences(dataclasses.replace(digits, label_dropout=0.2)) == []
    assert classes.recipe_differences(dataclasses.replace(classes, label_dropout=0.2)) == ["label_dropout: 0.5 != 0.2"]
    assert classes.recipe_differences(digits) == ["num_classes: 10 != 0"]
    assert classes.recipe_sha256() != dataclasses.replace(classes, label_dropout=0.2).recipe_sha256()


def test_images_may_be_wider_than_high():
    preset = get_preset("cifar10", image_width=64)
    assert preset.image_shape == (32, 64, 3) and preset.image_pixels == 2048
    with pytest.raises(ConfigError, match="positions that attend"):
        get_preset("cifar10", image_size=256, image_width=1024, attn_resolutions=(128,))
