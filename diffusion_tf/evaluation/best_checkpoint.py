"""Records evaluations, and keeps the checkpoint that scored best."""

import contextlib
import os
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

from diffusion_tf.errors import DamagedFileError
from diffusion_tf.storage import checkpoints
from diffusion_tf.storage.event_files import EventFile
from diffusion_tf.storage.json_files import read_json, write_json
from diffusion_tf.storage.records import BestEvaluation
from diffusion_tf.storage.workdir import Workdir

_HIGHER_IS_BETTER = ("inception_score", "classifier_score_digits", "precision", "recall")
_BEST = "evaluation.json"  # beside the best checkpoint


def record_evaluation(
    workdir: Workdir,
    checkpoint: str,
    result: dict[str, Any],
    scores: dict[str, float],
    best_by: str,
    notes: dict[str, str],
) -> None:
    """Adds a line to `evaluations.jsonl` and scalars to TensorBoard, and keeps the best checkpoint.

    `checkpoints/best/` holds the best of all checkpoints that were measured in the same way. If another measurement
    chose it, it stays: remove it to choose by this one.

    Args:
      workdir: the run's folder.
      checkpoint: path of the checkpoint.
      result: what was measured, and how.
      scores: the scores.
      best_by: the score that decides.
      notes: what `score_notes` says about them.
    """
    line = {**result, **scores, "notes": notes}
    workdir.append_evaluation(line)
    # A standard error may be NaN.
    finite = {f"evaluation/{name}": score for name, score in scores.items() if np.isfinite(score)}
    with contextlib.closing(EventFile(os.path.join(workdir.tensorboard, "evaluation"))) as events:
        events.scalars(result["step"], finite)

    folder = best_folder(workdir)
    try:
        best = read_best(workdir)
    except DamagedFileError as error:  # since the evaluation began
        logging.warning("%s stays: %s", folder, error)
        return
    if best and not (is_alike(best, result) and best["best_by"] == best_by):
        print(f"{folder} keeps step {best['step']}, which another measurement chose: remove it to choose by this one")
        return
    sign = -1.0 if best_by.startswith(_HIGHER_IS_BETTER) else 1.0
    if best is None or sign * scores[best_by] < sign * best[best_by]:
        checkpoints.copy_into(folder, checkpoint)
        write_json(os.path.join(folder, _BEST), {**line, "best_by": best_by})


def best_folder(workdir: Workdir) -> str:
    """The folder of the best checkpoint."""
    return os.path.join(workdir.checkpoints, "best")


def read_best(workdir: Workdir) -> dict[str, Any] | None:
    """The evaluation of the best checkpoint; None if there is none, or its score was not finite.

    Raises:
      DamagedFileError: its file is damaged.
    """
    path = os.path.join(best_folder(workdir), _BEST)
    if not tf.io.gfile.exists(path):
        return None
    try:
        best = read_json(path, BestEvaluation)
    except DamagedFileError as error:
        raise DamagedFileError(f"{error}: remove it") from error
    score = best.get(best["best_by"])
    if not isinstance(score, float | None):
        raise DamagedFileError(f"{path} is damaged, its {best['best_by']} is not a score: remove it")
    return None if score is None else workdir.complete([best])[0]


def is_alike(line: dict[str, Any], result: dict[str, Any]) -> bool:
    """Whether a line of `evaluations.jsonl` was measured in the same way as `result`, of any checkpoint."""
    return all(line.get(name) == value for name, value in result.items() if name not in ("step", "checkpoint_sha256"))
