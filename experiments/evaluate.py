"""Scores samples of a trained run against real images: FID, Inception Score, KID, precision and recall.

  python -m experiments.evaluate --workdir=runs/cifar10 --num_samples=50000 --batch_size=500
  python -m experiments.evaluate --workdir=runs/cifar10 --samples=samples.npz --inception=inception.pb
  python -m experiments.evaluate --workdir=runs/cifar10 --reference=fid_stats_cifar10.npz --inception=inception.pth
  python -m experiments.evaluate --workdir=runs/cifar10 --follow --num_samples=10000
  python -m experiments.evaluate --workdir=runs/cifar10 --sampler_steps=50

Samples come from the EMA weights of a checkpoint, or from a file. Their Inception features are compared with those of
the real images, which are computed once and kept, or with published statistics. Digits use a small classifier instead
of Inception, and --features=pixels needs no network. Scores are named after their features: only those of Inception are
called fid. --follow scores one checkpoint after the other while another process trains. Each score of a checkpoint is a
line of evaluations.jsonl and a scalar in TensorBoard, and checkpoints/best/ keeps the best checkpoint.

The same command resumes an interrupted evaluation.
"""

import math
import os
from typing import Any

from absl import flags

from diffusion_tf.errors import InputError
from diffusion_tf.evaluation import FEATURES, INCEPTION_TFHUB, MAX_REFERENCE, METRICS, RESIZES

from . import _flags, _program

FLAGS = flags.FLAGS
_flags.define_measurement_flags(batch_size=100)
_flags.define_sampler_flags()
_flags.define_condition_flags()
flags.DEFINE_list("metrics", None, f"Any of {', '.join(METRICS)}. Default: all that the features allow.")
flags.DEFINE_integer("num_samples", None, "Number of samples. Default: 50,000; 1,000 for digits.", lower_bound=2)
_flags.define_path("samples", None, "Score this .npz (`samples`, uint8 [N, H, W, C]) instead of a checkpoint.")
_flags.define_path(
    "reference", "train", "The real images: train, test, an .npz like --samples, or one of their `mu` and `sigma`."
)
flags.DEFINE_integer("num_reference", MAX_REFERENCE, "Largest number of real images of a split.", lower_bound=2)
_flags.define_path("reference_cache", None, "File that keeps their features. Default: in the workdir.")
flags.DEFINE_enum(
    "features", None, FEATURES, "Features to compare. Default: inception; digits for digits."
)  # fmt: skip
_flags.define_path(
    "inception", INCEPTION_TFHUB, "TF-Hub handle, SavedModel, frozen graph, or pytorch-fid's .pth or .safetensors."
)
flags.DEFINE_enum(
    "inception_resize", None, RESIZES, "The resize for Inception. Default: pytorch_fid for its weights, else tf1."
)  # fmt: skip
flags.DEFINE_string("best_by", None, "The score that chooses the best checkpoint. Default: the first of --metrics.")
flags.DEFINE_boolean("follow", False, "Score each checkpoint as training writes it, until the last.")
flags.DEFINE_integer(
    "eval_every", 1, "With --follow: score the checkpoints at multiples of this step, and the last.", lower_bound=1
)


def _check() -> None:
    _flags.check_measured_run()
    if FLAGS.follow and (FLAGS.samples or FLAGS.checkpoint or FLAGS.out):
        raise InputError("--follow scores every checkpoint into evaluations.jsonl: no --samples, --checkpoint or --out")
    if FLAGS.eval_every != 1 and not FLAGS.follow:
        raise InputError("--eval_every goes with --follow")


_program.parse_flags(__name__, _check)

from diffusion_tf.evaluation.checkpoint_scoring import CheckpointScorer, Scorer
from diffusion_tf.evaluation.reference_statistics import Statistics, check_size, read_statistics
from diffusion_tf.evaluation.scores import (
    FeatureExtractor,
    Images,
    RunSamples,
    check_metrics,
    choose_best_by,
    choose_metrics,
    file_images,
    reference_path,
)
from diffusion_tf.reports.run_record import reference_name
from diffusion_tf.reports.run_record import scores as scores_in
from diffusion_tf.storage.json_files import write_json

from ._measured_run import MeasuredRun, print_notes

_ERROR = "_standard_error"


def _make_scorer(run: MeasuredRun, num_samples: int) -> tuple[Scorer, str]:
    """What compares samples with real images, and the score that chooses the best checkpoint."""
    features = FLAGS.features or ("digits" if run.preset.dataset == "digits" else "inception")
    if FLAGS.inception_resize and features != "inception":
        raise InputError(f"--inception_resize goes with Inception, and the features are --features={features}")
    network = run.feature_network(features, FLAGS.inception_resize)
    real: Images | Statistics
    if FLAGS.reference in ("train", "test"):
        real = run.split_images(FLAGS.reference, at_most=FLAGS.num_reference)
    else:
        statistics = read_statistics(FLAGS.reference)
        real = statistics or file_images(FLAGS.reference, run.preset.image_shape)
    if isinstance(real, Statistics):
        check_size(real, network, run.preset.image_shape)
    num_real = None if isinstance(real, Statistics) else real.count
    metrics = choose_metrics(FLAGS.metrics, network.name, moments=num_real is None)
    best_by = choose_best_by(FLAGS.best_by, metrics, network.name)
    check_metrics(metrics, network.name, num_samples, num_real)
    extractor = FeatureExtractor(network, run.strategy, FLAGS.batch_size, run.results.partial)
    cache = FLAGS.reference_cache or run.find(reference_path(run.workdir, network, real))
    return Scorer(extractor, metrics, real, cache), best_by


def _make_checkpoint_scorer(run: MeasuredRun) -> CheckpointScorer:
    settings = _flags.sampler_from_flags(run.preset)
    condition = _flags.condition_from_flags(run.preset, run.workdir.read_classes())
    num_samples = FLAGS.num_samples or (1000 if run.preset.dataset == "digits" else 50_000)
    scorer, best_by = _make_scorer(run, num_samples)
    samples = RunSamples(
        run.strategy, run.preset, num_samples=num_samples, batch_size=FLAGS.batch_size, seed=FLAGS.seed,
        settings=settings, condition=condition,
    )  # fmt: skip
    return CheckpointScorer(run.workdir, scorer, samples, best_by, run.results)


def _score_file(run: MeasuredRun, images: Images) -> dict[str, Any]:
    scorer, _ = _make_scorer(run, images.count)
    scores, notes = scorer.scores(images)
    scorer.forget(images)
    result = {"samples": FLAGS.samples, "num_samples": images.count, **scorer.description}
    return {**result, **scores, "notes": notes}


def _print(result: dict[str, Any]) -> None:
    print(f"\n{result['num_samples']} samples against {reference_name(result)}")
    scores = scores_in(result)
    for name, score in scores.items():
        if math.isfinite(score) and not name.endswith(_ERROR):
            error = scores.get(name + _ERROR, math.nan)
            print(f"  {name:<38}{score:.5g}" + (f" ± {error:.2g}" if math.isfinite(error) else ""))
    print_notes(result.get("notes", {}))  # older versions recorded none


def main() -> None:
    run = MeasuredRun.from_flags()
    if FLAGS.follow:
        for result in _make_checkpoint_scorer(run).follow(FLAGS.eval_every):
            _print(result)
        return
    out = _flags.out_path(os.path.join(run.results.path, "evaluation.json"), ".json")
    if FLAGS.samples:
        result = _score_file(run, file_images(FLAGS.samples, run.preset.image_shape))
    else:
        step, checkpoint = run.find_checkpoint()
        result = _make_checkpoint_scorer(run).score_once(step, checkpoint)
    _print(result)
    write_json(out, result)
    print(f"numbers: {out}")


if __name__ == "__main__":
    _program.run(main)
