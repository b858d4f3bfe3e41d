"""Scores samples of a trained run against real images: FID, Inception Score, KID, precision and recall.

  python -m experiments.evaluate --workdir=runs/cifar10 --num_samples=50000 --batch_size=500
  python -m experiments.evaluate --workdir=runs/cifar10 --samples=samples.npz --inception=inception.pb
  python -m experiments.evaluate --workdir=runs/cifar10 --follow --num_samples=10000
  python -m experiments.evaluate --workdir=runs/cifar10 --sampler=ddim --sampler_steps=50

Draws samples from the EMA weights of a checkpoint (or takes a file of them), and compares their features by Inception
with those of the real images, which are computed once and kept. For digits a small classifier stands in for Inception,
and --features=pixels needs no network at all; scores are named after their features, and only Inception's is a FID.
--follow scores one checkpoint after the other while another process trains. Each score of a checkpoint becomes a line
of evaluations.jsonl and a scalar in TensorBoard, and checkpoints/best/ keeps the best.

The same command again goes on where an interrupted one was.
"""

import hashlib
import json
import os
import time
from typing import Any

import tensorflow as tf
from absl import flags

from diffusion_tf.errors import InputError
from diffusion_tf.evaluation.feature_networks import INCEPTION_TFHUB
from diffusion_tf.evaluation.scores import (
    MAX_REFERENCE,
    METRICS,
    FeatureExtractor,
    Images,
    RunSamples,
    check_metrics,
    compute_scores,
    file_images,
    is_alike,
    record_evaluation,
    reference_features,
    reference_path,
    score_names,
)
from diffusion_tf.storage import checkpoints
from diffusion_tf.storage.files import write_json
from experiments import common

FLAGS = flags.FLAGS
common.define_measurement_flags(batch_size=100)
common.define_sampler_flags()
flags.DEFINE_list("metrics", None, f"Which of {', '.join(METRICS)}. Default: all that the features allow.")
flags.DEFINE_integer("num_samples", None, "How many samples. Default: 50,000, and 1,000 for digits.", lower_bound=2)
flags.DEFINE_string("samples", None, "Score this .npz (`samples`, uint8 [N, H, W, C]) in place of a checkpoint.")
flags.DEFINE_string("reference", "train", "The real images: train, test, or an .npz like --samples.")
flags.DEFINE_integer("num_reference", MAX_REFERENCE, "At most how many images of train or test.", lower_bound=2)
flags.DEFINE_string("reference_cache", None, "Where their features are kept. Default: in the workdir.")
flags.DEFINE_enum(
    "features", None, ("inception", "digits", "pixels"), "Whose features. Default: inception, for digits digits."
)
flags.DEFINE_string(
    "inception", INCEPTION_TFHUB, "A TF-Hub handle, a SavedModel folder, or a frozen graph with pool_3:0 and logits:0."
)
flags.DEFINE_string("best_by", None, "The score that chooses the best checkpoint. Default: the first one measured.")
flags.DEFINE_boolean("follow", False, "Score each checkpoint as training writes it, until the last.")
flags.DEFINE_integer(
    "eval_every", 1, "With --follow: score the checkpoints at multiples of this step, and the last.", lower_bound=1
)

_POLL_SECONDS = 10


def _metric_names(network: str) -> list[str]:
    names = FLAGS.metrics or [name for name in METRICS if (name, network) != ("inception_score", "pixels")]
    for name in names:
        if name not in METRICS:
            raise InputError(f"--metrics={name}: choose from {', '.join(METRICS)}")
    return names


def _best_by(names: list[str], network: str) -> str:
    known = [score_names(name, network)[0] for name in names]
    best_by = FLAGS.best_by or known[0]
    if best_by not in known:
        raise InputError(f"--best_by={best_by}: choose from {', '.join(known)}")
    return best_by


def _reference_images(run: common.Run) -> Images:
    if FLAGS.reference not in ("train", "test"):
        return file_images(FLAGS.reference, run.preset.image_shape)
    return common.split_images(run, FLAGS.reference, at_most=FLAGS.num_reference)


def _print(result: dict[str, Any]) -> None:
    reference = result["reference"]
    images = reference.get("images") or reference["file"]
    print(f"\n{result['num_samples']} samples against {reference['num_images']} images of {images}")
    for name, score in result.items():
        if isinstance(score, float):
            print(f"  {name:<38}{score:.5g}")


class _Evaluation:
    """What is the same for everything that one command scores."""

    def __init__(self, run: common.Run, num_samples: int):
        self.run = run
        self.num_samples = num_samples
        network = common.feature_network(
            run, FLAGS.features or ("digits" if run.preset.dataset == "digits" else "inception")
        )
        self.names = _metric_names(network.name)
        self.best_by = _best_by(self.names, network.name)
        images = _reference_images(run)
        check_metrics(self.names, network.name, num_samples, images.count)
        self.extractor = FeatureExtractor(network, run.strategy, FLAGS.batch_size, run.workdir.partial)
        self.reference = self.extractor.describe(images)
        cache = FLAGS.reference_cache or reference_path(run.workdir, network, images)
        self.real = reference_features(self.extractor, images, cache)

    def result(self, **subject) -> dict[str, Any]:
        """What was measured, and how."""
        return {**subject, "num_samples": self.num_samples, "metrics": self.names, "reference": self.reference}

    def scores(self, images: Images) -> dict[str, float]:
        """Of some images."""
        generated = self.extractor(images, "samples")
        return compute_scores(self.names, self.extractor.network.name, self.real, generated)


class _CheckpointEvaluation(_Evaluation):
    """Scores checkpoints by samples of them."""

    def __init__(self, run: common.Run, num_samples: int):
        settings = common.sampler_from_flags(run)
        super().__init__(run, num_samples)
        self.samples = RunSamples(
            run.strategy,
            run.preset,
            num_samples=num_samples,
            batch_size=FLAGS.batch_size,
            seed=FLAGS.seed,
            settings=settings,
        )
        self.wanted = self.result(**self.samples.sampling)
        # Checkpoints under evaluation are held here, where training does not remove them.
        digest = hashlib.sha256(json.dumps(self.wanted).encode()).hexdigest()[:8]
        self.held = os.path.join(run.workdir.checkpoints, "evaluating", digest)

    def done(self, step: int, path: str) -> dict[str, Any] | None:
        """The line of an earlier evaluation of this very checkpoint in this very way."""
        lines = [line for line in self.run.workdir.read_evaluations() if line["step"] == step]
        alike = [line for line in lines if is_alike(line, self.wanted)]
        digest = checkpoints.load_digest(path) if alike else ""
        return next((line for line in alike if line["checkpoint_sha256"] == digest), None)

    def score(self, step: int, held: str) -> dict[str, Any]:
        """Scores a checkpoint that is held, records it and lets go of it."""
        images = self.samples.of_checkpoint(held)
        scores = self.scores(images)
        result = self.result(step=step, checkpoint_sha256=images.description["checkpoint"], **self.samples.sampling)
        record_evaluation(self.run.workdir, held, result, scores, self.best_by)
        self.extractor.parts(images).remove()
        tf.io.gfile.remove(held)
        _print({**result, **scores})
        return {**result, **scores}

    def score_once(self, step: int, path: str) -> dict[str, Any]:
        """Scores a checkpoint, or reads back what it scored."""
        line = self.done(step, path)
        if line:
            _print(line)
            return line
        return self.score(step, checkpoints.copy_into(self.held, path))

    def follow(self) -> None:
        """Scores checkpoints until the last one that the run's configuration promises is scored."""
        folder = self.run.workdir.checkpoints
        while True:
            num_steps = self.run.workdir.read_preset().num_steps
            for step in checkpoints.all_steps(self.held):  # an interrupted one, which training may have removed since
                self.score(step, checkpoints.checkpoint_path(self.held, step))
            due = [s for s in checkpoints.all_steps(folder) if s % FLAGS.eval_every == 0 or s == num_steps]
            for step in due:
                path = checkpoints.checkpoint_path(folder, step)
                try:
                    if not self.done(step, path):
                        checkpoints.copy_into(self.held, path)
                        break
                except InputError:
                    if tf.io.gfile.exists(path):  # else training has removed it meanwhile
                        raise
            else:
                if num_steps in due:
                    return
                time.sleep(_POLL_SECONDS)


def main() -> None:
    run = common.Run.from_flags()
    if FLAGS.follow and (FLAGS.samples or FLAGS.checkpoint or FLAGS.out):
        raise InputError("--follow scores every checkpoint into evaluations.jsonl: no --samples, --checkpoint or --out")
    if FLAGS.eval_every != 1 and not FLAGS.follow:
        raise InputError("--eval_every goes with --follow")
    num_samples = FLAGS.num_samples or (1000 if run.preset.dataset == "digits" else 50_000)
    if FLAGS.follow:
        _CheckpointEvaluation(run, num_samples).follow()
        return
    out = common.out_path(os.path.join(run.workdir.path, "evaluation.json"), ".json")
    if FLAGS.samples:
        images = file_images(FLAGS.samples, run.preset.image_shape)
        evaluation = _Evaluation(run, images.count)
        result = {**evaluation.result(samples=FLAGS.samples), **evaluation.scores(images)}
        evaluation.extractor.parts(images).remove()
        _print(result)
    else:
        step, checkpoint = run.find_checkpoint()
        result = _CheckpointEvaluation(run, num_samples).score_once(step, checkpoint)
    write_json(out, result)
    print(f"numbers: {out}")


if __name__ == "__main__":
    common.run(main)
