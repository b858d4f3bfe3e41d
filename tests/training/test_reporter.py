"""Reports of a run, from plain callables."""

import dataclasses
import os
import pathlib

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from support.tiny_runs import TINY

from diffusion_tf.errors import NotFiniteError
from diffusion_tf.storage.workdir import Workdir
from diffusion_tf.training.reporter import Reporter

PRESET = dataclasses.replace(TINY, num_steps=5, checkpoint_every=4, sample_every=4)
METRICS = {"loss": 0.5, "grad_norm": 2.0}


class Calls:
    """Makes a reporter whose callables record their calls."""

    def __init__(self, folder: pathlib.Path):
        self.workdir, self.calls, self.metrics = Workdir(str(folder)), [], []

    def make_reporter(self, step):
        return Reporter(
            self.workdir,
            PRESET,
            step,
            learning_rate=lambda step: step / 8,
            draw=self.draw,
            save=lambda: self.calls.append("save"),
            callbacks=[self.callback],
        )

    def draw(self):
        self.calls.append("draw")
        return np.zeros((4, 8, 8, 1), np.uint8)

    def callback(self, step, metrics):
        self.calls.append(step)
        self.metrics.append({"step": step, **metrics})


@pytest.fixture
def calls(tmp_path):
    return Calls(tmp_path)


def test_every_report_is_a_line_and_a_callback_and_some_save_and_sample(calls):
    reporter = calls.make_reporter(0)
    for step in (2, 4, 5):
        reporter.report(step, METRICS)
    reporter.close()
    assert calls.calls == [2, 4, "save", "draw", 5, "save"]
    lines = calls.workdir.read_metrics()
    assert lines == calls.metrics
    rates = [line.pop("images_per_sec") for line in lines]
    assert all(rate > 0 for rate in rates)
    # The last of `step` steps has step - 1 before it.
    assert lines == [{"step": step, **METRICS, "learning_rate": (step - 1) / 8} for step in (2, 4, 5)]


def test_tensorboard_has_the_metrics_and_the_samples(calls):
    reporter = calls.make_reporter(0)
    reporter.report(4, METRICS)
    reporter.close()
    tags = set()
    for file in os.listdir(calls.workdir.tensorboard):
        for event in tf.compat.v1.train.summary_iterator(os.path.join(calls.workdir.tensorboard, file)):
            tags |= {value.tag for value in event.summary.value}
    assert tags == {*METRICS, "learning_rate", "images_per_sec", "ema_samples"}
    assert os.listdir(calls.workdir.samples) == ["step_00000004.png"]
    with Image.open(os.path.join(calls.workdir.samples, "step_00000004.png")) as grid:
        assert min(grid.size) >= 2 * 8


def test_a_resumed_run_draws_the_samples_that_are_missing_once(calls):
    calls.make_reporter(4).close()
    calls.make_reporter(4).close()
    calls.make_reporter(2).close()
    assert calls.calls == ["draw"]


def test_a_restart_drops_the_metrics_of_later_steps(calls):
    reporter = calls.make_reporter(0)
    reporter.report(2, METRICS)
    reporter.report(4, METRICS)
    reporter.start(2)
    assert [line["step"] for line in calls.workdir.read_metrics()] == [2]
    reporter.close()
    calls.make_reporter(0).close()
    assert calls.workdir.read_metrics() == []


def test_samples_that_are_not_finite_do_not_stop_training(calls, caplog):
    def overflow():
        raise NotFiniteError("samples 0 hold NaN or infinity")

    calls.draw = overflow
    reporter = calls.make_reporter(0)
    for step in (2, 4, 5):
        reporter.report(step, METRICS)
    reporter.close()
    assert calls.calls == [2, 4, "save", 5, "save"]
    assert "no grid of samples at step 4: samples 0 hold NaN or infinity" in caplog.text
    assert not os.path.exists(calls.workdir.samples)
