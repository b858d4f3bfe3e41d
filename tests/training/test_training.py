"""Training against the authors' six steps, and what a run promises: replicas, resuming, reporting."""

import contextlib
import dataclasses
import json
import os
import threading
import time

import numpy as np
import pytest
import tensorflow as tf
from support import golden

from diffusion_tf.data import open_source
from diffusion_tf.errors import DivergedError, InputError, PreemptedError
from diffusion_tf.presets import get_preset
from diffusion_tf.rng import CounterRng
from diffusion_tf.runtime.strategies import make_strategy
from diffusion_tf.storage import checkpoints
from diffusion_tf.storage.workdir import Workdir
from diffusion_tf.trained_model import load_ema
from diffusion_tf.training import loop
from diffusion_tf.training import step as step_module
from diffusion_tf.training.loop import train
from diffusion_tf.training.optimizer import apply_gradients, warmed_up_learning_rate
from diffusion_tf.training.progress import Progress
from diffusion_tf.training.state import TrainState
from diffusion_tf.training.trainer import Trainer, zero_sums
from diffusion_tf.unet import UNet

TINY = get_preset(
    "digits", num_steps=6, steps_per_loop=2, checkpoint_every=2, sample_every=0, batch_size=16, warmup_steps=2,
    num_timesteps=20, dropout=0.1, random_flip=True, ch_mult=(1,),
)  # fmt: skip


class GoldenRng:
    """The timesteps and noise of train_small.npz."""

    def __init__(self, fixture):
        self.fixture = fixture

    def uniform(self, stream, shape):
        assert stream == "t"
        return tf.constant((self.fixture["t"] + 0.5) / 1000.0, tf.float32)

    def normal(self, stream, shape):
        assert stream == "noise"
        return tf.constant(self.fixture["noise"])


def test_six_steps_are_the_authors(monkeypatch):
    fixture = golden.load("train_small")
    monkeypatch.setattr(step_module, "CounterRng", lambda *_: GoldenRng(fixture))
    trainer = Trainer(golden.SMALL, make_strategy("one_device"))
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
            # The change itself, which is small beside the weights.
            moved = np.linalg.norm(fixture[key] - start[::stride])
            assert np.linalg.norm(ours[::stride] - fixture[key]) < 0.02 * moved + 1e-7 * np.sqrt(len(fixture[key])), key


def test_ema_follows_the_weights_after_each_step():
    preset = dataclasses.replace(TINY, ema_decay=0.9, warmup_steps=0)  # at 0.9999 six steps would hide the order
    trainer = Trainer(preset, make_strategy("one_device"))
    batches = trainer.batches(open_source(preset))
    expected = [w.numpy() for w in trainer.state.params]
    for _ in range(3):
        trainer.run_steps(batches, tf.constant(1))
        expected = [0.9 * ema + 0.1 * w.numpy() for ema, w in zip(expected, trainer.state.params, strict=True)]
    for ema, ours in zip(expected, trainer.state.ema, strict=True):
        np.testing.assert_allclose(ours.numpy(), ema, atol=1e-6)
    moved = [np.abs(ema - w.numpy()).max() for ema, w in zip(expected, trainer.state.params, strict=True)]
    assert np.sum(np.array(moved) > 1e-4) > 5  # so that another order of the updates would show


@pytest.mark.parametrize(
    ("batch_size", "precision", "parts"), [(6, "float32", 3), (5, "float32", 1), (4, "bfloat16", 1)]
)
def test_a_cpu_takes_a_batch_in_parts_to_the_same_gradients(monkeypatch, batch_size, precision, parts):
    preset = dataclasses.replace(TINY, image_size=16, batch_size=batch_size, precision=precision)
    monkeypatch.setattr(step_module, "_MOST_BYTES", 2 * 4 * 16**2)
    original, sizes = step_module.loss_and_gradients, []

    def spy(model, preset, params, images, rng):
        tf.py_function(lambda x: sizes.append(len(x)), [images], [])
        return original(model, preset, params, images, rng)

    monkeypatch.setattr(step_module, "loss_and_gradients", spy)
    trainer = Trainer(preset, make_strategy("one_device"))
    images = np.random.default_rng(0).integers(0, 256, (batch_size, *preset.image_shape), np.uint8)
    params = [tf.constant(w) for w in trainer.state.params]
    found = trainer.run_steps(iter(tf.data.Dataset.from_tensors(images)), tf.constant(1))
    assert sizes == parts * [batch_size // parts]

    # The first learning rate is 0, and Adam's first moment a tenth of the clipped gradient.
    loss, grads = original(trainer.state.model, preset, params, tf.constant(images), CounterRng(preset.seed, 0, 0))
    norm = tf.linalg.global_norm(grads)
    rtol = 1e-5 if precision == "float32" else 1e-2
    np.testing.assert_allclose([found["loss"], found["grad_norm"]], [loss, norm], rtol=rtol)
    for grad, m in zip(grads, trainer.state.adam_m, strict=True):
        clipped = grad * tf.minimum(1.0, preset.grad_clip / norm)
        np.testing.assert_allclose(m / 0.1, clipped, atol=rtol * float(tf.reduce_max(tf.abs(clipped))) + 1e-6)


@pytest.mark.parametrize("usable", [True, False])
def test_adam_in_place_takes_the_step_of_the_pure_function(usable):
    state, random = TrainState(TINY, make_strategy("one_device")), np.random.RandomState(0)
    draw = lambda v: random.normal(size=v.shape).astype(np.float32)
    for variables, scale in ((state.params, 1.0), (state.ema, 1.0), (state.adam_m, 0.1), (state.adam_v, 0.1)):
        for v in variables:
            v.assign(scale * (draw(v) if variables is not state.adam_v else draw(v) ** 2))
    grads = [tf.constant(draw(w)) for w in state.params]
    if not usable:
        grads = [tf.where(grad > 1.0, np.nan, tf.where(grad < -1.0, np.inf, grad)) for grad in grads]
    state.step.assign(7)
    before, clip = state.to_arrays(), tf.constant(0.25 if usable else np.nan)
    expected = apply_gradients(state.tensors(), grads, clip, tf.constant(usable), TINY)
    state.apply_in_place(state.tensors(), grads, clip, tf.constant(usable), TINY)
    pure = dict(zip(before, [v.numpy() for v in tf.nest.flatten(expected)], strict=True))
    for name, after in state.to_arrays().items():
        np.testing.assert_allclose(after, pure[name], rtol=1e-5, atol=1e-7, err_msg=name)
        assert np.array_equal(after, before[name]) == (not usable and name != "step"), name


def test_warm_up():
    rates = [float(warmed_up_learning_rate(2e-4, 4, tf.constant(step))) for step in range(6)]
    np.testing.assert_allclose(rates, golden.load("train_small")["lr"], rtol=1e-6)
    assert float(warmed_up_learning_rate(2e-4, 0, tf.constant(0))) == np.float32(2e-4)


def take_steps(strategy):
    trainer = Trainer(TINY, strategy)
    metrics = trainer.run_steps(trainer.batches(open_source(TINY)), tf.constant(2))
    return {name: float(value) for name, value in metrics.items()}, trainer.state.to_arrays()


@pytest.mark.slow
def test_eight_replicas_take_the_step_of_one_by_noise_of_their_own(monkeypatch):
    one_metrics, one = take_steps(make_strategy("one_device"))

    seen = []
    original = step_module.loss_and_gradients

    def spy(model, preset, params, images, rng):
        noise = rng.normal("noise", images.shape)
        tf.py_function(lambda *tensors: seen.append([x.numpy() for x in tensors]), [images, noise], [])
        return original(model, preset, params, images, rng)

    monkeypatch.setattr(step_module, "loss_and_gradients", spy)
    mirrored = make_strategy("mirrored")
    assert mirrored.num_replicas_in_sync == 8
    eight_metrics, eight = take_steps(mirrored)

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


def run(workdir, preset, strategy=None):
    trainer = Trainer(preset, strategy or make_strategy("one_device"))
    source = open_source(preset)
    workdir.write_config(preset, source.num_examples, "")
    train(trainer, workdir, source)
    return trainer.state.to_arrays()


@pytest.mark.slow
def test_a_resumed_run_is_the_run(tmp_path):
    straight = run(Workdir(tmp_path / "straight"), TINY)
    workdir = Workdir(tmp_path / "stopped")
    run(workdir, dataclasses.replace(TINY, num_steps=4))
    # As if it had been killed after writing a line past its last checkpoint.
    workdir.append_metrics({"step": 5, "loss": 0.0})
    resumed = run(workdir, TINY)
    for name, array in straight.items():
        np.testing.assert_array_equal(resumed[name], array, err_msg=name)

    def lines(folder):
        with open(os.path.join(tmp_path, folder, "metrics.jsonl")) as file:
            return [{k: v for k, v in json.loads(line).items() if k != "images_per_sec"} for line in file]

    assert lines("stopped") == lines("straight")
    assert [line["step"] for line in lines("straight")] == [2, 4, 6]
    assert set(lines("straight")[0]) == {"step", "loss", "grad_norm", "learning_rate", "param_norm", "skipped_steps"}


def test_a_run_reports(tmp_path):
    preset = dataclasses.replace(TINY, num_steps=4, sample_every=4, num_timesteps=2)
    workdir = Workdir(tmp_path)
    final = run(workdir, preset)
    tags = set()
    for file in os.listdir(workdir.tensorboard):
        for event in tf.compat.v1.train.summary_iterator(os.path.join(workdir.tensorboard, file)):
            tags |= {value.tag for value in event.summary.value}
    assert tags == {
        "loss", "grad_norm", "param_norm", "learning_rate", "images_per_sec", "skipped_steps", "ema_samples"
    }  # fmt: skip
    assert os.listdir(workdir.samples) == ["step_00000004.png"]

    model = UNet.from_preset(preset)
    load_ema(model, checkpoints.checkpoint_path(workdir.checkpoints, 4))
    for variable in model.trainable_variables:
        np.testing.assert_array_equal(variable.numpy(), final["ema/" + variable.path.removeprefix("unet/")])


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    strategy = make_strategy("one_device")
    path = checkpoints.save(str(tmp_path), 0, TrainState(TINY, strategy).to_arrays())
    other = TrainState(dataclasses.replace(TINY, ch=64), strategy)
    before = other.to_arrays()
    with pytest.raises(InputError, match="is of another network: .* is float32"):
        other.restore(path)
    deeper = TrainState(dataclasses.replace(TINY, num_res_blocks=2), strategy)
    with pytest.raises(InputError, match="is of another network: .* is missing"):
        deeper.restore(path)
    assert all(np.array_equal(before[k], v) for k, v in other.to_arrays().items())


def test_a_diverging_run_stops_and_keeps_its_checkpoints(tmp_path):
    workdir = Workdir(tmp_path)
    preset = dataclasses.replace(TINY, learning_rate=1e30)
    with pytest.raises(InputError, match="diverged between steps 0 and 2 .*another `workdir`"):
        run(workdir, preset)  # its first two losses are finite: only the weights tell
    assert checkpoints.all_steps(workdir.checkpoints) == []


def test_one_mirrored_device_trains():
    """What --strategy=mirrored is on a machine with one device."""
    metrics, _ = take_steps(tf.distribute.MirroredStrategy(["CPU:0"]))
    assert np.isfinite(metrics["loss"])


def test_batch_not_divisible_by_replicas_is_refused():
    with pytest.raises(InputError, match="batch_size=12 must be a positive multiple of the 8 replicas"):
        Trainer(dataclasses.replace(TINY, batch_size=12), make_strategy("mirrored"))


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    workdir, trained_on = Workdir(str(tmp_path)), threading.Event()
    save, append_metrics = checkpoints.save, Workdir.append_metrics

    def slow_save(folder, step, *args):
        if step == 2:
            assert trained_on.wait(300)
        return save(folder, step, *args)

    def watched(self, metrics):
        append_metrics(self, metrics)
        if metrics["step"] == 4:
            trained_on.set()

    monkeypatch.setattr(checkpoints, "save", slow_save)
    monkeypatch.setattr(Workdir, "append_metrics", watched)
    run(workdir, TINY)
    assert checkpoints.all_steps(workdir.checkpoints) == [2, 4, 6]


def test_a_checkpoint_that_cannot_be_written_ends_the_run(tmp_path, monkeypatch):
    def failing_save(*_):
        raise InputError("cannot write it: the disk is full")

    monkeypatch.setattr(checkpoints, "save", failing_save)
    with pytest.raises(InputError, match="the disk is full"):
        run(Workdir(str(tmp_path)), TINY)


class Poisoned:
    """A trainer, compiled once, whose gradients are NaN in the steps from `first` up to `last`."""

    def __init__(self, monkeypatch):
        self.first, self.last = tf.Variable(0, dtype=tf.uint64), tf.Variable(0, dtype=tf.uint64)
        original = step_module.loss_and_gradients

        def poisoned(model, preset, params, images, rng):
            loss, grads = original(model, preset, params, images, rng)
            factor = tf.where((rng.step >= self.first) & (rng.step < self.last), float("nan"), 1.0)
            return loss, [grad * factor for grad in grads]

        monkeypatch.setattr(step_module, "loss_and_gradients", poisoned)
        self.trainer = Trainer(dataclasses.replace(TINY, max_skipped_steps=2), make_strategy("one_device"))
        self.initial = self.trainer.state.to_arrays()
        self.source = open_source(TINY)
        self.poison(0, 0)
        self.trainer.run_steps(self.trainer.batches(self.source), tf.constant(1), zero_sums())  # compiles

    def poison(self, first, last):
        self.first.assign(first)
        self.last.assign(last)

    def train(self, workdir):
        """As a new process would, without its compilation: the arrays after it."""
        for name, variable in self.trainer.state._named_variables().items():
            variable.assign(self.initial[name])
        train(self.trainer, workdir, self.source)
        return self.trainer.state.to_arrays()


@pytest.fixture(scope="module")
def poisoned():
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield Poisoned(monkeypatch)


def metrics(workdir):
    return [{k: v for k, v in line.items() if k != "images_per_sec"} for line in workdir.read_metrics()]


@pytest.fixture(scope="module")
def straight(poisoned, tmp_path_factory):
    """The arrays and metrics of a run to which nothing happened."""
    workdir = Workdir(str(tmp_path_factory.mktemp("straight")))
    poisoned.poison(0, 0)
    return poisoned.train(workdir), metrics(workdir)


def assert_equal_arrays(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)


def test_a_step_that_is_not_finite_moves_nothing(poisoned, tmp_path):
    poisoned.poison(3, 4)
    workdir = Workdir(str(tmp_path))
    states = []
    for num_steps in (3, 4):
        preset = dataclasses.replace(poisoned.trainer.preset, num_steps=num_steps)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(poisoned.trainer, "preset", preset)
            states.append(poisoned.train(workdir))
    before, after = states
    assert before.pop("step") == 3 and after.pop("step") == 4
    assert_equal_arrays(after, before)
    final = poisoned.train(workdir)
    assert not np.array_equal(final["params/conv_in/kernel"], after["params/conv_in/kernel"])
    assert [line["skipped_steps"] for line in metrics(workdir)] == [0, 0, 1, 0]
    assert metrics(workdir)[2]["loss"] is None  # of no step that counts
    assert all(np.isfinite(array).all() for array in final.values())


def test_a_diverging_run_goes_back_once_with_other_data(poisoned, straight, tmp_path, monkeypatch, caplog):
    workdir, orders = Workdir(str(tmp_path)), []
    poisoned.poison(4, 9)
    batches = Trainer.batches

    def spy(self, source, data_order=0):
        orders.append((int(self.state.step.numpy()), data_order))
        if data_order:
            poisoned.poison(0, 0)  # it was the data's fault
        return batches(self, source, data_order)

    monkeypatch.setattr(Trainer, "batches", spy)
    arrays = poisoned.train(workdir)
    assert orders == [(0, 0), (4, 1)]
    assert "diverged between steps 4 and 6" in caplog.text and "going back to step 4" in caplog.text
    assert [line["step"] for line in metrics(workdir)] == [2, 4, 6]
    assert metrics(workdir)[:2] == straight[1][:2] and metrics(workdir)[2] != straight[1][2]
    assert all(np.isfinite(array).all() for array in arrays.values())
    progress = Progress.of_checkpoint(checkpoints.find(workdir.checkpoints)[1])
    assert progress.data_order == 1  # a resumed run stays with it


def test_a_run_that_diverges_again_stops_with_evidence(poisoned, straight, tmp_path):
    workdir = Workdir(str(tmp_path))
    poisoned.poison(4, 9)
    with pytest.raises(
        DivergedError, match=r"between steps 4 and 6 \(see .*divergence_00000006.json\): start again in"
    ):
        poisoned.train(workdir)
    assert metrics(workdir) == straight[1][:2]
    assert checkpoints.all_steps(workdir.checkpoints) == [2, 4]
    evidence = json.loads((tmp_path / "divergence_00000006.json").read_text())
    assert (
        evidence["data_order"] == 1 and evidence["sums"]["most_in_row"] == 2 and evidence["sums"]["finite_steps"] == 0
    )
    assert len(evidence["metrics"]) == 2 and evidence["norms"]["params/conv_in/kernel"] > 0


def test_a_notice_within_a_loop_loses_no_step(poisoned, straight, tmp_path, monkeypatch):
    class Notice(contextlib.nullcontext):
        def __init__(self):
            super().__init__(self)
            self.looks = 0

        @property
        def reason(self):
            self.looks += 1
            return "SIGTERM" if self.looks >= 3 else None

    poisoned.poison(0, 0)
    monkeypatch.setattr(loop, "PreemptionNotice", Notice)
    monkeypatch.setattr(loop, "_SECONDS_UNSEEN", 0.0)  # looks after each step
    workdir = Workdir(str(tmp_path))
    with pytest.raises(PreemptedError, match="SIGTERM: saved step 3, run it again"):
        poisoned.train(workdir)
    assert checkpoints.all_steps(workdir.checkpoints) == [2, 3] and len(metrics(workdir)) == 1
    arrays = poisoned.train(workdir)
    assert_equal_arrays(arrays, straight[0])
    assert metrics(workdir) == straight[1]


def test_a_clock_that_jumps_back_changes_nothing(poisoned, straight, tmp_path, monkeypatch):
    now = iter(range(10**9, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    poisoned.poison(0, 0)
    workdir = Workdir(str(tmp_path))
    assert_equal_arrays(poisoned.train(workdir), straight[0])
    assert metrics(workdir) == straight[1]


def test_a_damaged_checkpoint_costs_only_the_steps_since_the_one_before(poisoned, straight, tmp_path, caplog):
    workdir = Workdir(str(tmp_path))
    poisoned.poison(0, 0)
    poisoned.train(workdir)
    newest = checkpoints.checkpoint_path(workdir.checkpoints, 6)
    with open(newest, "r+b") as file:
        file.truncate(1000)
    with open(f"{newest}.tmp", "wb") as file:
        file.write(b"half of one")
    assert_equal_arrays(poisoned.train(workdir), straight[0])
    assert "step_00000006.safetensors is not a checkpoint, or is damaged" in caplog.text
    assert metrics(workdir) == straight[1]
    checkpoints.load(newest)
    assert not os.path.exists(f"{newest}.tmp")
