"""A network on a CPU against itself: a few large images after the others, by weights that are rounded, or that stay."""

import numpy as np
import pytest
import tensorflow as tf
from diffusion_tf.train_state import TrainState
from support import golden

from diffusion_tf import checkpoints, onednn, trained_model
from diffusion_tf.presets import get_preset
from diffusion_tf.runtime.strategies import make_strategy
from diffusion_tf.trained_model import TrainedModel


def test_in_parts_is_the_network(monkeypatch):
    strategy = make_strategy("one_device")
    trained = TrainedModel(get_preset("digits", image_size=16, ch_mult=(1,), attn_resolutions=()), strategy)
    golden.assign_random_weights(trained.model, np.random.RandomState(0))
    sizes = []

    def denoise(_, x_t, t):
        return trained.denoise_fn()(x_t, t)

    plain_call = trained.model.call

    def noting_size(x_t, t, rng=None):
        sizes.append(x_t.shape[0])
        return plain_call(x_t, t, rng=rng)

    monkeypatch.setattr(trained.model, "call", noting_size)
    random = np.random.RandomState(1)
    x_t, t = random.standard_normal((5, 16, 16, 1)).astype(np.float32), np.array([3, 0, 999, 500, 7], np.int32)
    whole = trained.over_replicas(denoise, 5)(0, x_t, t)
    monkeypatch.setattr(trained_model, "_MOST_PIXELS", 3 * 16 * 16)
    in_parts = trained.over_replicas(denoise, 5)(0, x_t, t)
    assert set(sizes) == {5, 3}
    assert in_parts.shape == (5, 16, 16, 1) and np.std(whole) > 0.01
    np.testing.assert_allclose(in_parts, whole, rtol=1e-4, atol=1e-5)


def test_a_checkpoints_weights_are_held_as_they_are_multiplied(tmp_path):
    preset = get_preset("digits", precision="bfloat16", attn_resolutions=(8,))
    state = TrainState(preset, make_strategy("one_device"))
    golden.assign_random_weights(state.model, np.random.RandomState(3))
    for ema, w in zip(state.ema, state.params, strict=True):
        ema.assign(w)
    path = checkpoints.save(str(tmp_path), 0, state.to_arrays())
    trained = TrainedModel.from_checkpoint(preset, make_strategy("one_device"), path)
    assert {v.dtype for v in trained.weights} == {tf.bfloat16, tf.float32}
    assert [v.dtype.name for v in trained.weights] == state.model.compute_dtypes
    x_t, t = tf.ones([2, 8, 8, 1]), tf.constant([3, 700])
    np.testing.assert_array_equal(trained.denoise_fn()(x_t, t), state.model.denoise_fn(state.ema)(x_t, t))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_weights_that_stay_make_the_same_network(precision):
    overrides = {"image_size": 16, "ch_mult": (1, 2), "attn_resolutions": (8,)}
    x_t, t = tf.random.stateless_normal([1, 16, 16, 1], seed=[1, 2]), tf.constant([300])

    def output(seed, precision, **kwargs):
        trained = TrainedModel(get_preset("digits", precision=precision, **overrides), make_strategy(), **kwargs)
        golden.assign_random_weights(trained.model, np.random.RandomState(seed))
        denoise = trained.over_replicas(lambda _, *arguments: trained.denoise_fn()(*arguments), 1)
        return denoise(0, x_t, t).numpy()

    for seed in range(2):
        expected, plain = output(seed, "float32"), output(seed, precision)
        staying = output(seed, precision, weights_stay=True)
        error = np.sqrt(np.mean(np.square(staying - expected))) / np.std(expected)
        assert error < {"float32": 1e-5, "bfloat16": 0.05}[precision]
        assert np.any(staying != plain) == onednn._available(tf.as_dtype(precision))
