"""Scores samples of a trained run against real images: FID, Inception Score, KID, precision and recall.

  python -m experiments.evaluate --workdir=runs/cifar10 --num_samples=50000 --batch_size=500
  python -m experiments.evaluate --workdir=runs/cifar10 --samples=samples.npz --inception=inception.pb
  python -m experiments.evaluate --workdir=runs/cifar10 --follow --num_samples=10000

Draws samples from the EMA weights of a checkpoint (or takes a file of them), and compares their features by Inception
with those of the real images, which are computed once and kept. For digits a small classifier stands in for Inception,
and --features=pixels needs no network at all; scores are named after their features, and only Inception's is a FID.
--follow scores one checkpoint after the other while another process trains. Each score of a checkpoint becomes a line
of evaluations.jsonl and a scalar in TensorBoard, and checkpoints/best/ keeps the best.

The same command again goes on where an interrupted one was.
"""

import os
import time
from typing import Any

import tensorflow as tf
from absl import flags

from diffusion_tf import checkpoints
from diffusion_tf.datasets import open_source
from diffusion_tf.errors import InputError
from diffusion_tf.evaluation import (
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
    score_names,
    source_images,
)
from diffusion_tf.feature_networks import (
    INCEPTION_TFHUB,
    FeatureNetwork,
    digits_network,
    inception_network,
    pixels_network,
)
from diffusion_tf.files import check_writable, write_json
from diffusion_tf.resumable import Arrays
from experiments import common

FLAGS = flags.FLAGS
common.define_measurement_flags(batch_size=100)
flags.DEFINE_list("metrics", None, f"Which of {', '.join(METRICS)}. Default: all that the features allow.")
flags.DEFINE_integer("num_samples", None, "How many samples. Default: 50,000, and 1,000 for digits.", lower_bound=2)
flags.DEFINE_string("samples", None, "Score this .npz (`samples`, uint8 [N, H, W, C]) in place of a checkpoint.")
flags.DEFINE_string("reference", "train", "The real images: train, test, or an .npz like --samples.")
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


def _network(run: common.Run) -> FeatureNetwork:
    name = FLAGS.features or ("digits" if run.preset.dataset == "digits" else "inception")
    if name == "inception":
        return inception_network(FLAGS.inception, run.strategy)
    if name == "digits" and run.preset.image_shape != (8, 8, 1):
        raise InputError(f"--features=digits knows 8x8 digits, not {run.preset.image_shape}")
    return digits_network() if name == "digits" else pixels_network()


def _metric_names(network: str, count: int) -> list[str]:
    names = FLAGS.metrics or [name for name in METRICS if (name, network) != ("inception_score", "pixels")]
    for name in names:
        if name not in METRICS:
            raise InputError(f"--metrics={name}: choose from {', '.join(METRICS)}")
    check_metrics(names, network, count)
    return names


def _reference_images(run: common.Run) -> Images:
    if FLAGS.reference not in ("train", "test"):
        return file_images(FLAGS.reference, run.preset.image_shape)
    source = open_source(run.preset, FLAGS.reference, data_dir=FLAGS.data_dir, tfrecord=FLAGS.tfrecord)
    return source_images(source, run.preset.dataset, FLAGS.reference)


def _reference(run: common.Run, extractor: FeatureExtractor, names: list[str]) -> tuple[dict, Arrays]:
    """(description, features) of the real images."""
    images = _reference_images(run)
    check_metrics([name for name in names if name != "inception_score"], extractor.network.name, images.count)
    label = images.description.get("split") or images.description["file_sha256"][:8]
    default = os.path.join(run.workdir.path, f"reference_{extractor.network.name}_{label}.npz")
    return extractor.describe(images), reference_features(extractor, images, FLAGS.reference_cache or default)


def _print(result: dict, scores: dict[str, float]) -> None:
    reference = result["reference"]
    images = reference.get("images") or reference["file"]
    print(f"\n{result['num_samples']} samples against {reference['num_images']} images of {images}")
    for name, score in scores.items():
        print(f"  {name:<38}{score:.5g}")


class _Evaluation:
    """What is the same for everything that one command scores."""

    def __init__(self, run: common.Run, num_samples: int):
        self.run = run
        self.num_samples = num_samples
        network = _network(run)
        self.names = _metric_names(network.name, num_samples)
        self.extractor = FeatureExtractor(network, run.strategy, FLAGS.batch_size, run.workdir.partial)
        self.reference, self.real = _reference(run, self.extractor, self.names)

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
        super().__init__(run, num_samples)
        known = [score for name in self.names for score in score_names(name, self.extractor.network.name)]
        self.best_by = FLAGS.best_by or known[0]
        if self.best_by not in known:
            raise InputError(f"--best_by={self.best_by}: the scores are {', '.join(known)}")
        self.samples = RunSamples(
            run.strategy, run.preset, num_samples=num_samples, batch_size=FLAGS.batch_size, seed=FLAGS.seed
        )

    def score(self, step: int, checkpoint: str) -> dict[str, Any]:
        """Scores a checkpoint, and records it."""
        # Training may remove its own copy before this is through.
        held = checkpoints.hold(self.run.workdir.checkpoints, checkpoint)
        images = self.samples.of_checkpoint(held)
        result, scores = self.result(step=step, seed=FLAGS.seed), self.scores(images)
        record_evaluation(self.run.workdir, held, result, scores, self.best_by)
        self.extractor.parts(images).remove()
        tf.io.gfile.remove(held)
        _print(result, scores)
        return {**result, **scores}

    def follow(self) -> None:
        """Scores checkpoints until the last one that the run's configuration promises is scored."""
        workdir, wanted = self.run.workdir, self.result(seed=FLAGS.seed)
        while True:
            done = {line["step"] for line in workdir.read_evaluations() if is_alike(line, wanted)}
            num_steps = workdir.read_preset().num_steps
            if num_steps in done:
                return
            steps = checkpoints.all_steps(workdir.checkpoints)
            due = [s for s in steps if s not in done and (s % FLAGS.eval_every == 0 or s == num_steps)]
            if not due:
                time.sleep(_POLL_SECONDS)
                continue
            path = checkpoints.checkpoint_path(workdir.checkpoints, due[0])
            try:
                self.score(due[0], path)
            except InputError:
                if tf.io.gfile.exists(path):  # else training has removed it meanwhile
                    raise


def main() -> None:
    run = common.Run.from_flags()
    if FLAGS.follow and (FLAGS.samples or FLAGS.checkpoint or FLAGS.out):
        raise InputError("--follow scores every checkpoint into evaluations.jsonl: no --samples, --checkpoint or --out")
    num_samples = FLAGS.num_samples or (1000 if run.preset.dataset == "digits" else 50_000)
    if FLAGS.follow:
        _CheckpointEvaluation(run, num_samples).follow()
        return
    out = FLAGS.out or os.path.join(run.workdir.path, "evaluation.json")
    check_writable(out)
    if FLAGS.samples:
        images = file_images(FLAGS.samples, run.preset.image_shape)
        evaluation = _Evaluation(run, images.count)
        result = evaluation.result(samples=FLAGS.samples)
        scores = evaluation.scores(images)
        evaluation.extractor.parts(images).remove()
        _print(result, scores)
        write_json(out, {**result, **scores})
    else:
        step, checkpoint = run.find_checkpoint()
        write_json(out, _CheckpointEvaluation(run, num_samples).score(step, checkpoint))
    print(f"numbers: {out}")


if __name__ == "__main__":
    common.run(main)
