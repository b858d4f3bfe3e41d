"""Progress between checkpoints: means of metrics, divergence, and what the manifest stores."""

import dataclasses
import math

import numpy as np
import pytest

from diffusion_tf.errors import DamagedFileError
from diffusion_tf.storage import checkpoints
from diffusion_tf.training.progress import Progress

SUMS = {
    "loss": 3.0, "grad_norm": 6.0, "finite_steps": 3.0, "skipped_steps": 2.0, "skipped_in_row": 1.0, "most_in_row": 2.0,
    "param_norm": 7.0,
}  # fmt: skip


def test_metrics_are_means_over_the_finite_steps():
    progress = Progress(sums=dict(SUMS))
    assert progress.take_metrics() == {"loss": 1.0, "grad_norm": 2.0, "param_norm": 7.0, "skipped_steps": 2}


def test_only_the_skipped_steps_at_the_end_outlive_a_line_of_metrics():
    progress = Progress(sums=dict(SUMS))
    progress.take_metrics()
    assert progress.sums == {**dict.fromkeys(SUMS, 0.0), "skipped_in_row": 1.0}


def test_metrics_without_a_finite_step_are_nan():
    metrics = Progress(sums={**SUMS, "finite_steps": 0.0}).take_metrics()
    assert math.isnan(metrics["loss"]) and math.isnan(metrics["grad_norm"])


@pytest.mark.parametrize(
    ("changes", "diverged"), [({}, False), ({"most_in_row": 3.0}, True), ({"param_norm": math.inf}, True)]
)
def test_a_run_diverges_by_skipped_steps_in_a_row_or_by_its_weights(changes, diverged):
    assert Progress(sums={**SUMS, **changes}).has_diverged(3) == diverged


def test_a_checkpoint_stores_the_progress(tmp_path):
    progress = Progress(data_order=1, sums=SUMS)
    manifest = {"progress": dataclasses.asdict(progress)}
    path = checkpoints.save(str(tmp_path), 2, {"step": np.array(2)}, manifest)
    assert Progress.of_checkpoint(path) == progress


def test_a_checkpoint_without_progress_counts_as_new(tmp_path):
    assert Progress.of_checkpoint(checkpoints.save(str(tmp_path), 2, {"step": np.array(2)})) == Progress()


@pytest.mark.parametrize("stored", [{"data_order": 0}, {"data_order": "x", "sums": SUMS}, {"data_order": 0, "sums": 1}])
def test_invalid_progress_is_refused(tmp_path, stored):
    path = checkpoints.save(str(tmp_path), 2, {"step": np.array(2)}, {"progress": stored})
    with pytest.raises(DamagedFileError, match="does not tell the run's progress"):
        Progress.of_checkpoint(path)
