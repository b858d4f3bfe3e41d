"""The recipes of Appendix B, and the values that a preset refuses."""

import pytest

from diffusion_tf.errors import ConfigError
from diffusion_tf.presets import PRESETS, get_preset, resized


def test_recipes_are_those_of_appendix_b():
    assert set(PRESETS) == {
        "digits", "cifar10", "celebahq256", "lsun_church", "lsun_bedroom", "lsun_bedroom_large", "lsun_cat",
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
@pytest.mark.parametrize("size", [2**power for power in range(2, 12)])
def test_a_resized_preset_has_levels_that_its_images_fill(name, size):
    preset = resized(PRESETS[name], size)
    levels = [size // 2**level for level in range(len(preset.ch_mult))]
    assert preset.image_size == levels[0] == size and levels[-1] >= 4 and size % levels[-1] == 0
    assert preset.attn_resolutions and set(preset.attn_resolutions) <= set(levels)
    assert preset.ch_mult == PRESETS[name].ch_mult[: len(levels)]
    assert resized(PRESETS[name], PRESETS[name].image_size) == PRESETS[name]
