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

import tensorflow as tf
from absl import flags

from diffusion_tf import checkpoints
from diffusion_tf.datasets import open_source
from diffusion_tf.errors import InputError
from diffusion_tf.evaluation import (
    METRICS,
    FeatureExtractor,
    Images,
    check_metrics,
    compute_scores,
    file_images,
    is_alike,
    record_evaluation,
    reference_features,
    run_samples,
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
flags.DEFINE_integer("eval_every", 1, "With --follow: score checkpoints at multiples of this step.", lower_bound=1)

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
    """What is the same for all checkpoints of one command."""

    def __init__(self, run: common.Run, num_samples: int):
        self.run = run
        self.num_samples = num_samples
        network = _network(run)
        self.names = _metric_names(network.name, num_samples)
        self.extractor = FeatureExtractor(network, run.strategy, FLAGS.batch_size, run.workdir.partial)
        self.reference, self.real = _reference(run, self.extractor, self.names)

    def scores(self, images: Images) -> dict[str, float]:
        """Of some images."""
        generated = self.extractor(images, "samples")
        return compute_scores(self.names, self.extractor.network.name, self.real, generated)

    def result(self, **subject) -> dict:
        """What identifies a measurement, for its line."""
        seed = {} if FLAGS.samples else {"seed": FLAGS.seed}
        return {**subject, "num_samples": self.num_samples, **seed, "metrics": self.names, "reference": self.reference}

    def of_checkpoint(self, step: int, checkpoint: str) -> dict:
        """Scores a checkpoint and records it."""
        run = self.run
        images = run_samples(
            run.strategy,
            run.preset,
            checkpoint,
            num_samples=self.num_samples,
            batch_size=FLAGS.batch_size,
            seed=FLAGS.seed,
        )
        result, scores = self.result(step=step), self.scores(images)
        best_by = FLAGS.best_by or next(iter(scores))
        if best_by not in scores:
            raise InputError(f"--best_by={best_by}: the scores are {', '.join(scores)}")
        record_evaluation(run.workdir, checkpoint, result, scores, best_by)
        self.extractor.parts(images).remove()
        _print(result, scores)
        return {**result, **scores}

    def follow(self) -> None:
        """Scores checkpoints until the last one that the run's configuration promises is scored."""
        workdir = self.run.workdir
        while True:
            done = {line["step"] for line in workdir.read_evaluations() if is_alike(line, self.result())}
            if workdir.read_preset().num_steps in done:
                return
            steps = [s for s in checkpoints.all_steps(workdir.checkpoints) if s % FLAGS.eval_every == 0]
            for step in [step for step in steps if step not in done][:1]:
                path = checkpoints.checkpoint_path(workdir.checkpoints, step)
                if tf.io.gfile.exists(path):
                    self.of_checkpoint(step, path)
            else:
                time.sleep(_POLL_SECONDS)


def main() -> None:
    run = common.Run.from_flags()
    out = FLAGS.out or os.path.join(run.workdir.path, "evaluation.json")
    check_writable(out)
    samples = file_images(FLAGS.samples, run.preset.image_shape) if FLAGS.samples else None
    num_samples = (
        samples.count if samples else FLAGS.num_samples or (1000 if run.preset.dataset == "digits" else 50_000)
    )
    evaluation = _Evaluation(run, num_samples)
    if FLAGS.follow:
        evaluation.follow()
        return
    if samples:
        result, scores = evaluation.result(samples=FLAGS.samples), evaluation.scores(samples)
        evaluation.extractor.parts(samples).remove()
        _print(result, scores)
        write_json(out, {**result, **scores})
    else:
        write_json(out, evaluation.of_checkpoint(run.step, run.checkpoint))
    print(f"numbers: {out}")


if __name__ == "__main__":
    common.run(main)
