"""Runs that start with the weights of others."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from support.tiny_runs import TINY, assert_equal_arrays

import diffusion_tf as dtf
from diffusion_tf.data.digits import load_digits
from diffusion_tf.errors import ConfigError, InputError
from diffusion_tf.interop.diffusers import write_diffusers
from diffusion_tf.interop.fine_tuning import fine_tuning_preset, initial_weights
from diffusion_tf.runtime.strategies import make_strategy
from diffusion_tf.storage import checkpoints
from diffusion_tf.storage.workdir import Workdir
from diffusion_tf.training.state import TrainState, state_arrays
from diffusion_tf.unet import UNet

CLASSES = "class_embedding/kernel"


def drawn_weights(preset, seed):
    model = UNet.from_preset(preset)
    stream = np.random.RandomState(seed)
    return {
        name: stream.standard_normal(v.shape).astype(np.float32)
        for name, v in zip(model.weight_names, model.trainable_variables, strict=True)
    }


def save_run(path, preset=TINY):
    """A run whose checkpoint of step 4 has other EMA weights than weights, and moments that are not 0; the EMA."""
    weights, ema = drawn_weights(preset, 1), drawn_weights(preset, 2)
    workdir = Workdir(str(path))
    workdir.write_config(preset, 100, "")
    squares = {name: w**2 for name, w in weights.items()}
    checkpoints.save(workdir.checkpoints, 4, state_arrays(weights, ema, (weights, squares), step=4))
    return ema


def started(path, preset, init_from):
    """The state of a run that starts with these weights."""
    state = TrainState(preset, make_strategy("one_device"))
    state.start_from(initial_weights(Workdir(str(path)), str(init_from), preset))
    return state.to_arrays()


def test_a_run_starts_with_the_emas_bytes_at_step_0_and_fresh_moments(tmp_path):
    ema = save_run(tmp_path / "source")
    expected = state_arrays(ema, ema)
    checkpoint = tmp_path / "source/checkpoints/step_00000004.safetensors"
    for source in (tmp_path / "source", checkpoint):
        assert_equal_arrays(started(tmp_path / "new", TINY, source), expected)
    exported = tmp_path / "exported"
    write_diffusers(str(exported), dataclasses.replace(TINY, model_mean_type="eps"), list(ema), list(ema.values()))
    assert_equal_arrays(started(tmp_path / "new", TINY, exported), expected)


@pytest.mark.parametrize(("there", "asked"), [(0, 3), (5, 3), (3, 0)])
def test_a_table_of_other_classes_starts_as_initialised(there, asked, tmp_path):
    ema = save_run(tmp_path / "source", dataclasses.replace(TINY, num_classes=there))
    preset = dataclasses.replace(TINY, num_classes=asked)
    new = TrainState(preset, make_strategy("one_device")).to_arrays()
    arrays = started(tmp_path / "new", preset, tmp_path / "source")
    assert arrays.keys() == new.keys()
    for group in ("params", "ema"):
        for name in ema.keys() - {CLASSES}:
            np.testing.assert_array_equal(arrays[f"{group}/{name}"], ema[name])
        if asked:
            np.testing.assert_array_equal(arrays[f"{group}/{CLASSES}"], new[f"{group}/{CLASSES}"])


def test_a_table_of_as_many_classes_is_taken_over(tmp_path):
    preset = dataclasses.replace(TINY, num_classes=3)
    ema = save_run(tmp_path / "source", preset)
    assert_equal_arrays(started(tmp_path / "new", preset, tmp_path / "source"), state_arrays(ema, ema))


def test_the_recipe_is_the_sources_and_attention_stays_at_its_level(tmp_path):
    source = dataclasses.replace(
        TINY, ch_mult=(1, 2), attn_resolutions=(4,), num_classes=3, warmup_steps=5000, ema_decay=0.9999, norm_eps=1e-5
    )
    Workdir(str(tmp_path)).write_config(source, 100, "")
    larger = fine_tuning_preset(str(tmp_path), {"image_size": 16, "image_width": 32, "num_steps": 400})
    assert larger == dataclasses.replace(
        source, image_size=16, image_width=32, num_steps=400, attn_resolutions=(8,), num_classes=0, warmup_steps=10,
        ema_decay=0.975,
    )  # fmt: skip
    given = {"warmup_steps": 7, "ema_decay": 0.5, "num_classes": 4, "learning_rate": 1e-5, "num_steps": 10**6}
    assert fine_tuning_preset(str(tmp_path), given) == dataclasses.replace(source, **given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ch": 64, "num_timesteps": 50}, r"another network \(ch: 64 != 32; num_timesteps: 50 != 20, asked != there\)"),
        ({"attn_resolutions": (8,)}, r"\(levels with attention: \[0\] != \[\], asked != there\)"),
        ({"model_var_type": "learned", "loss_type": "kl"}, r"\(model_var_type: learned != fixedsmall"),
        ({"downsample_padding": 1, "freq_shift": 0}, r"\(freq_shift: 0 != 1; downsample_padding: 1 != 0"),
    ],
)
def test_a_network_that_differs_is_refused_by_its_settings(change, message, tmp_path):
    save_run(tmp_path / "source")
    with pytest.raises(ConfigError, match=message):
        initial_weights(Workdir(str(tmp_path / "new")), str(tmp_path / "source"), dataclasses.replace(TINY, **change))


def test_what_the_weights_do_not_depend_on_may_differ(tmp_path):
    ema = save_run(tmp_path / "source")
    preset = dataclasses.replace(
        TINY, image_size=16, dropout=0.3, seed=5, batch_size=4, learning_rate=1.0, model_var_type="fixedlarge"
    )
    assert_equal_arrays(started(tmp_path / "new", preset, tmp_path / "source"), state_arrays(ema, ema))


def test_a_source_that_is_none_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in ("empty", "nothing", "nothing/checkpoints/step_00000004.safetensors"):
        with pytest.raises(ConfigError, match=f"init_from=.*{path} is neither a run nor a diffusers folder"):
            fine_tuning_preset(str(tmp_path / path), {})
    Workdir(str(tmp_path / "empty")).write_config(TINY, 100, "")
    with pytest.raises(InputError, match="empty/checkpoints holds no checkpoint"):
        initial_weights(Workdir(str(tmp_path / "new")), str(tmp_path / "empty"), TINY)


def test_a_run_keeps_the_source_that_it_recorded(tmp_path):
    ema = save_run(tmp_path / "source")
    shutil.copytree(tmp_path / "source", tmp_path / "other")
    new = Workdir(str(tmp_path / "new"))
    weights = initial_weights(new, str(tmp_path / "source"), TINY)
    new.write_config(TINY, 100, "", init_from={"path": weights.path, "sha256": weights.sha256})
    assert new.read_init_from() == {"path": str(tmp_path / "source"), "sha256": weights.sha256}
    # A run that was stopped before its first checkpoint starts with the same weights, with or without the flag.
    for init_from in (None, str(tmp_path / "source"), f"{tmp_path}/other/../source"):
        again = initial_weights(new, init_from, TINY)
        assert (again.sha256, again.weights.keys()) == (weights.sha256, weights.weights.keys())
    with pytest.raises(ConfigError, match="init_from=.*other: the run in .*new started with the weights of .*source"):
        initial_weights(new, str(tmp_path / "other"), TINY)
    with pytest.raises(ConfigError, match="the run in .*source started with random weights: choose another `workdir`"):
        initial_weights(Workdir(str(tmp_path / "source")), str(tmp_path / "other"), TINY)
    checkpoints.save(f"{tmp_path}/source/checkpoints", 6, state_arrays(ema, ema))
    with pytest.raises(InputError, match="source has changed since .*new was started with it"):
        initial_weights(new, None, TINY)
    checkpoints.save(new.checkpoints, 0, state_arrays(ema, ema))
    assert initial_weights(new, str(tmp_path / "source"), TINY) is None  # nothing is read


@pytest.mark.slow
def test_a_resumed_fine_tuned_run_has_the_bits_of_one_that_never_stopped(tmp_path):
    source, whole, halves = (tmp_path / name for name in ("source", "whole", "halves"))
    save_run(source)
    images = load_digits()[:64]
    preset = dataclasses.replace(fine_tuning_preset(str(source), {}), num_steps=4, learning_rate=1e-4)
    dtf.train(preset, str(whole), images, init_from=str(source))
    dtf.train(dataclasses.replace(preset, num_steps=2), str(halves), images, init_from=str(source))
    config = json.loads((halves / "config.json").read_text())
    shutil.rmtree(source)
    run = dtf.train(preset, str(halves), images)
    assert run.step == 4 and json.loads((halves / "config.json").read_text())["init_from"] == config["init_from"]
    for step in (0, 2, 4):
        found, expected = (
            checkpoints.load(checkpoints.checkpoint_path(str(run / "checkpoints"), step)) for run in (halves, whole)
        )
        assert_equal_arrays(found, expected)
