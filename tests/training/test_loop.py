"""Training runs: resuming, reports, divergence, preemption and damaged files."""

import contextlib
import dataclasses
import json
import os
import threading
import time

import numpy as np
import pytest
import tensorflow as tf
from support import killed_runs
from support.tiny_runs import TINY, assert_equal_arrays, run

from diffusion_tf.data import open_source
from diffusion_tf.errors import DivergedError, InputError, PreemptedError
from diffusion_tf.runtime.strategies import make_strategy
from diffusion_tf.storage import checkpoints
from diffusion_tf.storage.workdir import Workdir
from diffusion_tf.trained_model import load_ema
from diffusion_tf.training.loop import train, train_in_workdir
from diffusion_tf.training.progress import Progress
from diffusion_tf.training.step import loss_and_gradients
from diffusion_tf.training.trainer import Trainer, zero_sums
from diffusion_tf.unet import UNet


@pytest.mark.slow
def test_a_resumed_run_equals_one_that_never_stopped(tmp_path):
    straight = run(tmp_path / "straight")
    run(tmp_path / "stopped", dataclasses.replace(TINY, num_steps=4))
    # As if the process had been killed after it wrote a line past its last checkpoint.
    Workdir(str(tmp_path / "stopped")).append_metrics({"step": 5, "loss": 0.0})
    assert_equal_arrays(run(tmp_path / "stopped"), straight)

    lines = killed_runs.metrics(tmp_path / "straight")
    assert killed_runs.metrics(tmp_path / "stopped") == lines
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert set(lines[0]) == {"step", "loss", "grad_norm", "learning_rate", "param_norm", "skipped_steps"}


def test_a_run_leaves_metrics_samples_and_the_ema_of_its_last_step(tmp_path):
    preset, seen = dataclasses.replace(TINY, num_steps=4, sample_every=4, num_timesteps=2), []
    final = run(tmp_path, preset, callbacks=[lambda step, metrics: seen.append({"step": step, **metrics})])
    assert Workdir(str(tmp_path)).read_metrics() == seen and [line["step"] for line in seen] == [2, 4]
    assert os.listdir(tmp_path / "samples") == ["step_00000004.png"]

    model = UNet.from_preset(preset)
    load_ema(model, checkpoints.checkpoint_path(str(tmp_path / "checkpoints"), 4))
    for variable in model.trainable_variables:
        np.testing.assert_array_equal(variable.numpy(), final["ema/" + variable.path.removeprefix("unet/")])


def test_a_run_whose_weights_diverge_stops_before_a_checkpoint(tmp_path):
    with pytest.raises(InputError, match="diverged between steps 0 and 2 .*another `workdir`"):
        run(tmp_path, dataclasses.replace(TINY, learning_rate=1e30))  # the first two losses are finite
    assert checkpoints.all_steps(str(tmp_path / "checkpoints")) == []


def test_a_run_goes_on_with_another_learning_rate_when_the_user_allows_it(tmp_path, caplog):
    preset, strategy, source = dataclasses.replace(TINY, num_steps=2), make_strategy("one_device"), open_source(TINY)
    workdir, path = Workdir(str(tmp_path)), str(tmp_path)
    workdir.write_config(preset, source.num_examples, "")
    arrays = {**Trainer(preset, strategy).state.to_arrays(), "step": np.asarray(2, np.int64)}
    checkpoints.save(workdir.checkpoints, 2, arrays, {"config_sha256": preset.recipe_sha256()})
    slower = dataclasses.replace(preset, learning_rate=1e-5)
    with pytest.raises(InputError, match="allow the change by `allow_recipe_change`"):
        train_in_workdir(slower, strategy, source, path, command="")
    train_in_workdir(slower, strategy, source, path, command="", allow_recipe_change=True)
    history = json.loads((tmp_path / "config.json").read_text())["history"]
    assert history == [{"step": 2, "changes": {"learning_rate": {"old": preset.learning_rate, "new": 1e-5}}}]
    assert "has another recipe" not in caplog.text
    checkpoints.save(workdir.checkpoints, 2, arrays, {"config_sha256": "of another run"})
    train_in_workdir(slower, strategy, source, path, command="")
    assert "has another recipe" in caplog.text


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path):
    trained_on = threading.Event()

    def slow_save(folder, step, *args):
        if step == 2:
            assert trained_on.wait(300)
        return checkpoints.save(folder, step, *args)

    def callback(step, _):
        if step == 4:
            trained_on.set()

    run(tmp_path, callbacks=[callback], save_checkpoint=slow_save)
    assert checkpoints.all_steps(str(tmp_path / "checkpoints")) == [2, 4, 6]


def test_a_checkpoint_that_cannot_be_written_ends_the_run(tmp_path):
    def failing_save(*_):
        raise InputError("cannot write it: the disk is full")

    with pytest.raises(InputError, match="the disk is full"):
        run(tmp_path, save_checkpoint=failing_save)


class PoisonedTrainer(Trainer):
    """A trainer, compiled once, whose gradients are NaN in the steps from `first` up to `last`."""

    def __init__(self, folder):
        self.first, self.last = tf.Variable(0, dtype=tf.uint64), tf.Variable(0, dtype=tf.uint64)
        preset = dataclasses.replace(TINY, max_skipped_steps=2)
        super().__init__(preset, make_strategy("one_device"), loss_and_gradients=self._poisoned)
        self.source = open_source(TINY)
        self.initial = checkpoints.save(str(folder), 0, self.state.to_arrays())
        self.poison(0, 0)
        self.run_steps(self.batches(self.source), tf.constant(1), zero_sums())  # compiles

    def _poisoned(self, model, preset, params, images, rng):
        loss, grads = loss_and_gradients(model, preset, params, images, rng)
        factor = tf.where((rng.step >= self.first) & (rng.step < self.last), float("nan"), 1.0)
        return loss, [grad * factor for grad in grads]

    def poison(self, first, last, *, in_every_order=True):
        """Chooses the poisoned steps; unless `in_every_order`, other orders of the data have none."""
        self.first.assign(first)
        self.last.assign(last)
        self.in_every_order, self.orders = in_every_order, []

    def batches(self, source, data_order=0):
        self.orders.append((int(self.state.step.numpy()), data_order))
        if data_order and not self.in_every_order:
            self.last.assign(self.first)
        return super().batches(source, data_order)

    def train(self, folder, **options):
        """Trains from the initial weights or the checkpoints in `folder`, as a new process, and returns the arrays."""
        self.state.restore(self.initial)
        train(self, Workdir(str(folder)), self.source, **options)
        return self.state.to_arrays()


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory):
    return PoisonedTrainer(tmp_path_factory.mktemp("initial"))


@pytest.fixture(scope="module")
def straight(poisoned, tmp_path_factory):
    """The arrays and metrics of a run without incidents."""
    folder = tmp_path_factory.mktemp("straight")
    poisoned.poison(0, 0)
    return poisoned.train(folder), killed_runs.metrics(folder)


def saved_steps(folder):
    return checkpoints.all_steps(str(folder / "checkpoints"))


def test_a_skipped_step_counts_in_the_metrics(poisoned, tmp_path):
    poisoned.poison(3, 4)
    poisoned.train(tmp_path)
    assert [line["skipped_steps"] for line in killed_runs.metrics(tmp_path)] == [0, 1, 0]


def test_a_diverging_run_goes_back_once_and_takes_the_data_in_another_order(poisoned, straight, tmp_path, caplog):
    poisoned.poison(4, 9, in_every_order=False)
    arrays = poisoned.train(tmp_path)
    assert poisoned.orders == [(0, 0), (4, 1)]
    assert "diverged between steps 4 and 6" in caplog.text and "going back to step 4" in caplog.text
    metrics = killed_runs.metrics(tmp_path)
    assert [line["step"] for line in metrics] == [2, 4, 6]
    assert metrics[:2] == straight[1][:2] and metrics[2] != straight[1][2]
    assert all(np.isfinite(array).all() for array in arrays.values())
    progress = Progress.of_checkpoint(checkpoints.find(str(tmp_path / "checkpoints"))[1])
    assert progress.data_order == 1  # a resumed run keeps that order


def test_a_run_that_diverges_again_stops_with_evidence(poisoned, straight, tmp_path):
    poisoned.poison(4, 9)
    message = r"between steps 4 and 6 \(see .*divergence_00000006.json\): start again in"
    with pytest.raises(DivergedError, match=message):
        poisoned.train(tmp_path)
    assert killed_runs.metrics(tmp_path) == straight[1][:2]
    assert saved_steps(tmp_path) == [2, 4]
    evidence = json.loads((tmp_path / "divergence_00000006.json").read_text())
    assert evidence["data_order"] == 1
    assert evidence["sums"]["most_in_row"] == 2 and evidence["sums"]["finite_steps"] == 0
    assert len(evidence["metrics"]) == 2 and evidence["norms"]["params/conv_in/kernel"] > 0


class ThirdLookNotice(contextlib.nullcontext):
    """A notice that arrives between the second and the third look at it."""

    def __init__(self):
        super().__init__(self)
        self.looks = 0

    @property
    def reason(self):
        self.looks += 1
        return "SIGTERM" if self.looks >= 3 else None


def test_a_preempted_run_saves_its_step_and_continues_bit_for_bit(poisoned, straight, tmp_path):
    poisoned.poison(0, 0)
    with pytest.raises(PreemptedError, match="SIGTERM: saved step 3, run it again"):
        poisoned.train(tmp_path, make_notice=ThirdLookNotice, max_call_seconds=0.0)  # looks after each step
    assert saved_steps(tmp_path) == [2, 3] and len(killed_runs.metrics(tmp_path)) == 1
    assert_equal_arrays(poisoned.train(tmp_path), straight[0])
    assert killed_runs.metrics(tmp_path) == straight[1]


def test_a_clock_that_jumps_back_changes_nothing(poisoned, straight, tmp_path, monkeypatch):
    now = iter(range(10**9, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    poisoned.poison(0, 0)
    assert_equal_arrays(poisoned.train(tmp_path), straight[0])
    assert killed_runs.metrics(tmp_path) == straight[1]


def test_a_damaged_checkpoint_costs_only_the_steps_since_the_one_before(poisoned, straight, tmp_path, caplog):
    poisoned.poison(0, 0)
    poisoned.train(tmp_path)
    newest = checkpoints.checkpoint_path(str(tmp_path / "checkpoints"), 6)
    os.truncate(newest, 1000)
    assert_equal_arrays(poisoned.train(tmp_path), straight[0])
    assert "step_00000006.safetensors is not a checkpoint, or is damaged" in caplog.text
    assert killed_runs.metrics(tmp_path) == straight[1]
    checkpoints.load(newest)
