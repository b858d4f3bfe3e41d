"""The compiled training step: the authors' six steps, EMA, microbatches, replicas, and steps that are skipped."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf
from support import golden
from support.tiny_runs import TINY, assert_equal_arrays

from diffusion_tf.data import open_source
from diffusion_tf.data.digits import load_digit_labels, load_digits
from diffusion_tf.errors import InputError
from diffusion_tf.rng import CounterRng
from diffusion_tf.runtime.strategies import make_strategy
from diffusion_tf.training.step import loss_and_gradients
from diffusion_tf.training.trainer import Trainer


class GoldenRng:
    """The timesteps and noise of train_small.npz."""

    def __init__(self, fixture):
        self.fixture = fixture

    def skip(self, examples):
        assert examples == 0
        return self

    def uniform(self, stream, shape):
        assert stream == "t"
        return tf.constant((self.fixture["t"] + 0.5) / 1000.0, tf.float32)

    def normal(self, stream, shape):
        assert stream == "noise"
        return tf.constant(self.fixture["noise"])


def test_six_steps_are_the_authors():
    fixture = golden.load("train_small")
    trainer = Trainer(golden.SMALL, make_strategy("one_device"), make_rng=lambda *_: GoldenRng(fixture))
    golden.assign_random_weights(trainer.state.model, np.random.RandomState(4242))
    for ema, w in zip(trainer.state.ema, trainer.state.params, strict=True):
        ema.assign(w)
    initial = trainer.state.to_arrays()
    batches = iter(tf.data.Dataset.from_tensors(fixture["x0_uint8"].astype(np.uint8)).repeat())

    for step in range(6):
        metrics = trainer.run_steps(batches, tf.constant(1))
        np.testing.assert_allclose(metrics["loss"], fixture["loss"][step], rtol=1e-5)
        np.testing.assert_allclose(metrics["grad_norm"], fixture["gnorm"][step], rtol=1e-4)
        if step == 0:  # the first learning rate is 0, yet the moments move
            after = trainer.state.to_arrays()
            assert all(np.array_equal(after[k], initial[k]) for k in initial if k.startswith(("params/", "ema/")))
            assert all(after[k].any() for k in initial if k.startswith("adam_m/"))
    assert int(trainer.state.step.numpy()) == 6

    arrays = trainer.state.to_arrays()
    for variable in trainer.state.model.trainable_variables:
        path, name = variable.path.removeprefix("unet/"), golden.tf1_name(variable.path)
        if name in golden.ZERO_GRADIENT:
            continue  # Adam turns the rounding noise of these gradients into steps of full size
        stride = -(-variable.numpy().size // 256)
        for group, key in (("params", f"step6/w/{name}"), ("ema", f"step6/ema/{name}")):
            ours, start = arrays[f"{group}/{path}"].ravel(), initial[f"{group}/{path}"].ravel()
            np.testing.assert_allclose(ours[::stride], fixture[key], rtol=1e-4, atol=1e-5, err_msg=key)
            np.testing.assert_allclose(np.linalg.norm(ours), fixture[f"norm/{key}"], rtol=1e-5, err_msg=key)
            # The change is small compared with the weights, so compare it on its own too.
            moved = np.linalg.norm(fixture[key] - start[::stride])
            assert np.linalg.norm(ours[::stride] - fixture[key]) < 0.02 * moved + 1e-7 * np.sqrt(len(fixture[key])), key


def test_ema_averages_the_weights_after_each_step():
    preset = dataclasses.replace(TINY, ema_decay=0.9, warmup_steps=0)  # at 0.9999 a wrong order would not show
    trainer = Trainer(preset, make_strategy("one_device"))
    batches = trainer.batches(open_source(preset))
    expected = [w.numpy() for w in trainer.state.params]
    for _ in range(3):
        trainer.run_steps(batches, tf.constant(1))
        expected = [0.9 * ema + 0.1 * w.numpy() for ema, w in zip(expected, trainer.state.params, strict=True)]
    for ema, ours in zip(expected, trainer.state.ema, strict=True):
        np.testing.assert_allclose(ours.numpy(), ema, atol=1e-6)
    moved = [np.abs(ema - w.numpy()).max() for ema, w in zip(expected, trainer.state.params, strict=True)]
    assert np.sum(np.array(moved) > 1e-4) > 5  # enough for a wrong order of the updates to show


@pytest.mark.parametrize(
    ("batch_size", "precision", "microbatches"), [(6, "float32", 3), (5, "float32", 1), (4, "bfloat16", 1)]
)
def test_microbatches_have_the_loss_and_gradients_of_the_whole_batch(batch_size, precision, microbatches):
    preset = dataclasses.replace(TINY, image_size=16, batch_size=batch_size, precision=precision)
    sizes = []

    def spy(model, preset, params, images, rng):
        tf.py_function(lambda x: sizes.append(len(x)), [images], [])
        return loss_and_gradients(model, preset, params, images, rng)

    # At most two images of a microbatch in float32, and four in bfloat16.
    trainer = Trainer(preset, make_strategy("one_device"), loss_and_gradients=spy, microbatch_bytes=2 * 4 * 16**2)
    images = np.random.default_rng(0).integers(0, 256, (batch_size, *preset.image_shape), np.uint8)
    params = [tf.constant(w) for w in trainer.state.params]
    found = trainer.run_steps(iter(tf.data.Dataset.from_tensors(images)), tf.constant(1))
    assert sizes == microbatches * [batch_size // microbatches]

    # The first learning rate is 0, and Adam's first moment is a tenth of the clipped gradient.
    rng = CounterRng(preset.seed, 0, 0)
    loss, grads = loss_and_gradients(trainer.state.model, preset, params, tf.constant(images), rng)
    norm = tf.linalg.global_norm(grads)
    rtol = 1e-5 if precision == "float32" else 1e-2
    np.testing.assert_allclose([found["loss"], found["grad_norm"]], [loss, norm], rtol=rtol)
    for grad, m in zip(grads, trainer.state.adam_m, strict=True):
        clipped = grad * tf.minimum(1.0, preset.grad_clip / norm)
        np.testing.assert_allclose(m / 0.1, clipped, atol=rtol * float(tf.reduce_max(tf.abs(clipped))) + 1e-6)


def take_two_steps(strategy, **options):
    trainer = Trainer(TINY, strategy, **options)
    metrics = trainer.run_steps(trainer.batches(open_source(TINY)), tf.constant(2))
    return {name: float(value) for name, value in metrics.items()}, trainer.state.to_arrays()


@pytest.mark.slow
def test_eight_replicas_take_the_steps_of_one_with_different_noise_for_every_image():
    seen = []

    def spy(model, preset, params, images, rng):
        noise = rng.normal("noise", images.shape)
        tf.py_function(lambda *tensors: seen.append([x.numpy() for x in tensors]), [images, noise], [])
        return loss_and_gradients(model, preset, params, images, rng)

    mirrored = make_strategy("mirrored")
    assert mirrored.num_replicas_in_sync == 8
    eight_metrics, eight = take_two_steps(mirrored, loss_and_gradients=spy)
    one_metrics, one = take_two_steps(make_strategy("one_device"))

    np.testing.assert_allclose(eight_metrics["loss"], one_metrics["loss"], rtol=1e-5)
    np.testing.assert_allclose(eight_metrics["grad_norm"], one_metrics["grad_norm"], rtol=1e-5)
    assert one.keys() == eight.keys()
    for name, array in one.items():
        if name.startswith(("params/", "ema/")):
            np.testing.assert_allclose(eight[name], array, atol=1e-5, err_msg=name)
    assert len(seen) == 2 * 8  # steps, replicas
    for values in zip(*seen, strict=True):
        examples = np.concatenate(values).reshape(2 * 16, -1)
        assert len(np.unique(examples, axis=0)) == 2 * 16


def test_a_mirrored_strategy_of_one_device_trains():
    """`strategy=mirrored` on a machine with one device."""
    metrics, _ = take_two_steps(tf.distribute.MirroredStrategy(["CPU:0"]))
    assert np.isfinite(metrics["loss"])


def test_a_step_that_is_not_finite_is_skipped():
    skip = tf.Variable(False)

    def nan_gradients(*args):
        loss, grads = loss_and_gradients(*args)
        return loss, [tf.where(skip, float("nan"), grad) for grad in grads]

    trainer = Trainer(TINY, make_strategy("one_device"), loss_and_gradients=nan_gradients)
    batches = trainer.batches(open_source(TINY))
    sums = trainer.run_steps(batches, tf.constant(2))
    before = trainer.state.to_arrays()
    skip.assign(True)
    skipped_sums = trainer.run_steps(batches, tf.constant(1), sums)
    after = trainer.state.to_arrays()
    assert (before.pop("step"), after.pop("step")) == (2, 3)
    assert_equal_arrays(after, before)
    counts = {"skipped_steps": 1.0, "skipped_in_row": 1.0, "most_in_row": 1.0}
    assert {name: float(value) for name, value in skipped_sums.items()} == {
        **{name: float(value) for name, value in sums.items()},
        **counts,
    }
    skip.assign(False)
    final_sums = trainer.run_steps(batches, tf.constant(1), skipped_sums)
    final = trainer.state.to_arrays()
    assert not np.array_equal(final["params/conv_in/kernel"], after["params/conv_in/kernel"])
    assert all(np.isfinite(array).all() for array in final.values())
    assert [float(final_sums[name]) for name in ("finite_steps", *counts)] == [3, 1, 0, 1]


def test_a_batch_size_not_divisible_by_the_replicas_is_refused():
    with pytest.raises(InputError, match="batch_size=12 must be a positive multiple of the 8 replicas"):
        Trainer(dataclasses.replace(TINY, batch_size=12), make_strategy("mirrored"))


CLASSES = dataclasses.replace(TINY, num_classes=10)


class Listening:
    """A model that predicts zeros and remembers the labels that it is given."""

    def denoise_fn(self, _params, _rng):
        def denoise(x_t, _, labels):
            self.labels = labels.numpy()
            return tf.zeros_like(x_t)

        return denoise


def test_training_hides_labels_at_their_rate_by_example():
    preset = dataclasses.replace(CLASSES, label_dropout=0.3)
    images, labels = np.zeros((2000, 8, 8, 1), np.uint8), np.arange(2000, dtype=np.int32) % 10
    seen = []
    for step, first, count in ((5, 0, 2000), (5, 700, 1300), (6, 0, 2000)):
        model, examples = Listening(), slice(first, first + count)
        loss_and_gradients(
            model, preset, [], tf.constant(images[examples]), CounterRng(0, step, first), labels=labels[examples]
        )
        seen.append(model.labels)
    hidden = seen[0] == -1
    assert abs(hidden.mean() - 0.3) < 5 * np.sqrt(0.21 / 2000)
    np.testing.assert_array_equal(seen[0][~hidden], labels[~hidden])
    np.testing.assert_array_equal(seen[1], seen[0][700:])  # an example's own, whatever the microbatch
    assert not np.array_equal(seen[2], seen[0])


@pytest.mark.slow
def test_replicas_train_each_image_with_its_label():
    seen = []

    def spy(model, preset, params, images, rng, labels):
        tf.py_function(lambda *tensors: seen.append([x.numpy() for x in tensors]), [images, labels], [])
        return loss_and_gradients(model, preset, params, images, rng, labels)

    source, states = open_source(CLASSES), []
    for trainer in (
        Trainer(CLASSES, make_strategy("mirrored"), loss_and_gradients=spy),
        Trainer(CLASSES, make_strategy("one_device")),  # one XLA program, which Python cannot watch
    ):
        trainer.run_steps(trainer.batches(source), tf.constant(2))
        states.append(trainer.state.to_arrays())
    labels_of = {image.tobytes(): label for image, label in zip(load_digits(), load_digit_labels(), strict=True)}
    pairs = [pair for images, labels in seen for pair in zip(images, labels, strict=True)]
    assert len(pairs) == 2 * CLASSES.batch_size
    assert all(labels_of[image.tobytes()] == label for image, label in pairs)
    for name, array in states[1].items():
        if name.startswith(("params/", "ema/")):
            np.testing.assert_allclose(states[0][name], array, atol=1e-5, err_msg=name)
