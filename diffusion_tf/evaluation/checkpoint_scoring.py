"""Scores the checkpoints of a run by samples drawn from them, once each, also while training goes on."""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterator
from typing import Any

import tensorflow as tf
from absl import logging

from diffusion_tf.errors import InputError, NotFiniteError
from diffusion_tf.evaluation.best_checkpoint import is_alike, read_best, record_evaluation
from diffusion_tf.evaluation.reference_statistics import Statistics, convention_note
from diffusion_tf.evaluation.scores import (
    FeatureExtractor,
    Images,
    RunSamples,
    compute_scores,
    reference_features,
    score_notes,
)
from diffusion_tf.storage import checkpoints
from diffusion_tf.storage.files import remove
from diffusion_tf.storage.workdir import Workdir

_POLL_SECONDS = 10


class Scorer:
    """Compares images with real ones.

    Args:
      extractor: computes the features.
      metrics: names out of METRICS.
      real: the real images, or statistics of them.
      cache: file that keeps the features of real images.

    Raises:
      InputError: the cache holds the features of other images, or of another network.
    """

    def __init__(self, extractor: FeatureExtractor, metrics: list[str], real: Images | Statistics, cache: str):
        self.description: dict[str, Any] = {"metrics": metrics, "reference": extractor.describe(real)}
        self._extractor = extractor
        self._metrics = metrics
        self._real = real.gaussian if isinstance(real, Statistics) else reference_features(extractor, real, cache)

    def scores(self, images: Images) -> tuple[dict[str, float], dict[str, str]]:
        """Scores of images, by the names of `score_names`, and what `score_notes` says about them."""
        sets = self._real, self._extractor(images, "samples")
        network = self._extractor.network.name
        notes = score_notes(self._metrics, network, *sets)
        if "fid" in self._metrics and network == "inception":
            note = convention_note(self.description["reference"], images.count)
            notes["fid"] = "; ".join(filter(None, [notes.get("fid"), note]))
        return compute_scores(self._metrics, network, *sets), {name: note for name, note in notes.items() if note}

    def forget(self, images: Images) -> None:
        """Removes the features of images that are kept so that an interrupted extraction can be resumed."""
        self._extractor.parts(images).remove()


@dataclasses.dataclass
class CheckpointScorer:
    """Scores checkpoints of a run, and records each score.

    Attributes:
      workdir: the run's folder.
      scorer: compares samples with real images.
      samples: draws the samples.
      best_by: the score by which `checkpoints/best/` is chosen.
      results: where scores and the best checkpoint are kept; default: the run's folder.

    Raises:
      DamagedFileError: the record of the best checkpoint is damaged.
    """

    workdir: Workdir
    scorer: Scorer
    samples: RunSamples
    best_by: str
    results: Workdir | None = None

    def __post_init__(self):
        self._results = self.results or self.workdir
        read_best(self._results)  # before the work, not after it
        num_samples = {"num_samples": self.samples.num_samples}
        self._description = {**self.samples.sampling, **num_samples, **self.scorer.description}
        # Checkpoints that are being scored are copied here, where training does not remove them.
        digest = hashlib.sha256(json.dumps(self._description).encode()).hexdigest()[:8]
        self._held = os.path.join(self._results.checkpoints, "evaluating", digest)

    def score_once(self, step: int, path: str) -> dict[str, Any]:
        """The result for a checkpoint: that of an earlier evaluation, if there is one, else a new one."""
        return self._recorded(step, path) or self._score(step, checkpoints.copy_into(self._held, path))

    def follow(self, eval_every: int) -> Iterator[dict[str, Any]]:
        """Scores checkpoints while training writes them, until that of the last step in the run's configuration.

        A checkpoint whose network overflows has no score: a warning names it.

        Args:
          eval_every: scores the checkpoints at multiples of this step, and the last one.

        Yields:
          The result of each checkpoint that had none.
        """
        overflowing: set[int] = set()
        while True:
            num_steps = self.workdir.read_preset().num_steps
            for step in checkpoints.all_steps(self._held):
                held = checkpoints.checkpoint_path(self._held, step)
                try:
                    result = self._score(step, held)
                except NotFiniteError as error:
                    logging.warning("step %d has no scores: %s", step, error)
                    overflowing.add(step)
                    remove(held)
                else:
                    yield result
            steps = checkpoints.all_steps(self.workdir.checkpoints)
            due = [step for step in steps if step % eval_every == 0 or step == num_steps]
            if not any(self._hold(step) for step in due if step not in overflowing):
                if num_steps in due:
                    return
                time.sleep(_POLL_SECONDS)

    def _hold(self, step: int) -> bool:
        """Copies a checkpoint that has no result to where training does not remove it; False if it has a result."""
        path = checkpoints.checkpoint_path(self.workdir.checkpoints, step)
        try:
            if self._recorded(step, path):
                return False
            checkpoints.copy_into(self._held, path)
            return True
        except InputError:
            if tf.io.gfile.exists(path):
                raise
            return False  # training has removed it in the meantime

    def _recorded(self, step: int, path: str) -> dict[str, Any] | None:
        """The line of an earlier evaluation of the same weights in the same way."""
        places = {self.workdir, self._results}
        lines = [line for place in places for line in place.read_evaluations() if line["step"] == step]
        alike = [line for line in lines if is_alike(line, self._description)]
        digest = checkpoints.load_digest(path) if alike else ""
        return next((line for line in alike if line.get("checkpoint_sha256") == digest), None)

    def _score(self, step: int, held: str) -> dict[str, Any]:
        """Scores and records a copied checkpoint, and removes the copy."""
        images = self.samples.of_checkpoint(held)
        scores, notes = self.scorer.scores(images)
        result = {"step": step, "checkpoint_sha256": images.description["checkpoint"], **self._description}
        record_evaluation(self._results, held, result, scores, self.best_by, notes)
        self.scorer.forget(images)
        remove(held)
        return {**result, **scores, "notes": notes}
