"""A network with its weights on a CPU: microbatches, checkpoints, and frozen weights."""

import numpy as np
import pytest
import tensorflow as tf
from support import golden

from diffusion_tf.ops.cpu import onednn
from diffusion_tf.presets import get_preset
from diffusion_tf.runtime.strategies import make_strategy
from diffusion_tf.storage import checkpoints
from diffusion_tf.trained_model import TrainedModel, load_ema
from diffusion_tf.training.state import TrainState
from diffusion_tf.unet import UNet

LARGE = {"image_size": 16, "ch_mult": (1, 2), "attn_resolutions": (8,)}  # large enough for a CPU graph


def save_random(folder, preset, seed):
    """A checkpoint with random EMA weights, and its state."""
    state = TrainState(preset, make_strategy("one_device"))
    golden.assign_random_weights(state.model, np.random.RandomState(seed))
    for ema, w in zip(state.ema, state.params, strict=True):
        ema.assign(w)
    return checkpoints.save(str(folder), seed, state.to_arrays()), state


def test_microbatches_give_the_outputs_of_the_batch():
    sizes = []

    class Noting(UNet):
        def call(self, x_t, t, labels=None, rng=None):
            sizes.append(x_t.shape[0])
            return super().call(x_t, t, labels, rng)

    preset = get_preset("digits", image_size=16, ch_mult=(1,), attn_resolutions=())
    trained = TrainedModel(preset, make_strategy("one_device"), Noting.from_preset(preset, weights="inference"))
    golden.assign_random_weights(trained.model, np.random.RandomState(0))
    random = np.random.RandomState(1)
    x_t, t = random.standard_normal((5, 16, 16, 1)).astype(np.float32), np.array([3, 0, 999, 500, 7], np.int32)

    def outputs(**kwargs):
        sizes.clear()
        return trained.over_replicas(lambda _, *inputs: trained.denoise_fn(**kwargs)(*inputs), 5)(0, x_t, t)

    whole = outputs()
    assert set(sizes) == {5}
    microbatched = outputs(microbatch_pixels=3 * 16 * 16)
    assert set(sizes) == {3}
    assert microbatched.shape == (5, 16, 16, 1) and np.std(whole) > 0.01
    np.testing.assert_allclose(microbatched, whole, rtol=1e-4, atol=1e-5)


def test_a_checkpoints_weights_are_held_in_their_compute_dtypes(tmp_path):
    preset = get_preset("digits", precision="bfloat16", attn_resolutions=(8,))
    path, state = save_random(tmp_path, preset, 3)
    trained = TrainedModel.from_checkpoint(preset, make_strategy("one_device"), path)
    assert {v.dtype for v in trained.weights} == {tf.bfloat16, tf.float32}
    assert [v.dtype.name for v in trained.weights] == state.model.compute_dtypes
    x_t, t = tf.ones([2, 8, 8, 1]), tf.constant([3, 700])
    np.testing.assert_array_equal(trained.denoise_fn()(x_t, t), state.model.denoise_fn(state.ema)(x_t, t))


def test_a_checkpoints_network_never_goes_on_with_old_weights(tmp_path):
    preset = get_preset("digits", **LARGE)
    (first, _), (second, _) = (save_random(tmp_path, preset, seed) for seed in (1, 2))
    trained = TrainedModel.from_checkpoint(preset, make_strategy("one_device"), first)
    denoise = trained.over_replicas(lambda _, *inputs: trained.denoise_fn()(*inputs), 1)
    x_t, t = tf.random.stateless_normal([1, 16, 16, 1], seed=[1, 2]), tf.constant([300])
    before = denoise(0, x_t, t)
    with pytest.raises(RuntimeError, match="this network's weights are frozen"):
        load_ema(trained.model, second)
    np.testing.assert_array_equal(denoise(0, x_t, t), before)


def test_a_frozen_network_freezes_at_its_first_use():
    preset, strategy = get_preset("digits"), make_strategy("one_device")
    trained = TrainedModel(preset, strategy, UNet.from_preset(preset, weights="frozen"))
    kernel = trained.model.conv_in.kernel
    kernel.assign(kernel.numpy() + 1)
    trained.denoise_fn()
    with pytest.raises(RuntimeError, match="frozen"):
        kernel.assign(kernel.numpy() + 1)


def test_weights_from_outside_of_a_frozen_network_may_change():
    preset, strategy = get_preset("digits", **LARGE), make_strategy("one_device")
    model = UNet.from_preset(preset, weights="frozen")
    golden.assign_random_weights(model, np.random.RandomState(0))
    trained = TrainedModel(preset, strategy, model, [tf.Variable(v.value) for v in model.trainable_variables])
    denoise = trained.over_replicas(lambda _, *inputs: trained.denoise_fn()(*inputs), 1)
    x_t, t = tf.ones([1, 16, 16, 1]), tf.constant([300])
    assert np.any(denoise(0, x_t, t))
    for w in trained.weights:
        w.assign(tf.zeros_like(w))
    assert not np.any(denoise(0, x_t, t))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_frozen_weights_give_the_same_network(precision):
    x_t, t = tf.random.stateless_normal([1, 16, 16, 1], seed=[1, 2]), tf.constant([300])

    def output(seed, precision, weights="inference"):
        preset = get_preset("digits", precision=precision, **LARGE)
        trained = TrainedModel(preset, make_strategy(), UNet.from_preset(preset, weights=weights))
        golden.assign_random_weights(trained.model, np.random.RandomState(seed))
        denoise = trained.over_replicas(lambda _, *arguments: trained.denoise_fn()(*arguments), 1)
        return denoise(0, x_t, t).numpy()

    for seed in range(2):
        expected, plain = output(seed, "float32"), output(seed, precision)
        frozen = output(seed, precision, "frozen")
        error = np.sqrt(np.mean(np.square(frozen - expected))) / np.std(expected)
        assert error < {"float32": 1e-5, "bfloat16": 0.05}[precision]
        assert np.any(frozen != plain) == onednn.available(tf.as_dtype(precision))


@pytest.mark.parametrize("var_type", ["fixedsmall", "learned"])
def test_guidance_extrapolates_from_no_label_to_the_label(var_type):
    """Against two evaluations of the network, in float64; learned variances are those of the label."""
    preset = get_preset("digits", ch_mult=(2,), num_classes=3, model_var_type=var_type, loss_type="kl")
    trained = TrainedModel(preset, make_strategy("one_device"))
    golden.assign_random_weights(trained.model, np.random.RandomState(0))
    random = np.random.RandomState(1)
    x_t, t = random.standard_normal((4, 8, 8, 1)).astype(np.float32), np.array([3, 0, 999, 500], np.int32)
    labels, none = np.array([0, 2, -1, 1], np.int32), np.full(4, -1, np.int32)
    given, plain = (trained.model(x_t, t, of).numpy().astype(np.float64) for of in (labels, none))
    expected = np.concatenate([3 * given[..., :1] - 2 * plain[..., :1], given[..., 1:]], axis=-1)
    calls = []

    class Counting(UNet):
        def call(self, x_t, t, labels=None, rng=None):
            calls.append(x_t.shape[0])
            return super().call(x_t, t, labels, rng)

    counting = Counting.from_preset(preset)
    counting.set_weights(trained.model.get_weights())
    trained = TrainedModel(preset, trained.strategy, counting)
    np.testing.assert_allclose(trained.denoise_fn(tf.constant(labels), 2.0)(x_t, t), expected, atol=1e-4)
    np.testing.assert_allclose(trained.denoise_fn(tf.constant(labels))(x_t, t), given, atol=1e-5)
    np.testing.assert_allclose(trained.denoise_fn()(x_t, t), plain, atol=1e-5)
    assert calls == [8, 4, 4]  # one evaluation of twice the images, or of the images
    assert np.abs(given - plain)[[0, 1, 3]].max(axis=(1, 2, 3)).min() > 1e-3
