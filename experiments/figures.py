"""Makes the paper's figures from a trained run, each as a picture and as JSON with its numbers.

  python -m experiments.figures --workdir=runs/digits --figure=interpolation --out=interpolation.png
  python -m experiments.figures --workdir=runs/digits --figure=all --out=figures

samples (Figs. 11, 13, 16-19), progressive (Figs. 6, 14), shared_latents (Fig. 7), interpolation (Fig. 8),
coarse_to_fine (Fig. 9), progressive_quality (Fig. 10), neighbors (Figs. 12, 15) and animation (a GIF of a sampling
run); `all` writes them into a folder with an index.html. The same seed gives the same picture.
"""

import os
from typing import Any

import numpy as np
from absl import flags

from diffusion_tf.conditioning import UNLABELLED
from diffusion_tf.errors import InputError
from diffusion_tf.evaluation import MAX_REFERENCE
from diffusion_tf.reports import FIGURES, SCORED_FIGURES, file_name

from . import _flags, _program

FLAGS = flags.FLAGS
_flags.define_measurement_flags(batch_size=64, out="Picture to write (.png; .gif for animation), or folder for all.")
flags.DEFINE_enum("figure", None, (*FIGURES, *SCORED_FIGURES, "all"), "The figure.")
flags.DEFINE_integer("count", 64, "Samples in samples and animation.", lower_bound=1)
flags.DEFINE_integer("num_samples", 256, "Samples that progressive_quality scores.", lower_bound=10)
flags.DEFINE_integer(
    "chains", 6, "Rows of progressive and of neighbors; chains that shared_latents measures.", lower_bound=1
)
flags.DEFINE_integer("crop", None, "neighbors: compare only the central CROP x CROP pixels.", lower_bound=1)
flags.DEFINE_integer(
    "t",
    None,
    "interpolation: steps of noise before mixing, 0 to T. Default: by schedule and image size, T / 4 for digits.",
)
flags.DEFINE_integer("index_a", 0, "Index of the first source image in the test split.", lower_bound=0)
flags.DEFINE_integer("index_b", 1, "Index of the second source image.", lower_bound=0)
_flags.define_path("source_a", None, "A picture of the run's size as the first source image, instead of --index_a.")
_flags.define_path("source_b", None, "A picture of the run's size as the second source image, instead of --index_b.")
_flags.define_condition_flags()
_flags.define_path("inception", None, "Inception, as experiments.evaluate takes it; digits need none.")


def _check() -> None:
    _flags.check_measured_run()
    _flags.require_flags("figure", "out")
    if FLAGS.figure != "all":
        _flags.check_extension("out", os.path.splitext(file_name(FLAGS.figure))[1])


_program.parse_flags(__name__, _check)

from diffusion_tf.data.fitting import read_picture
from diffusion_tf.data.source import ImageReader
from diffusion_tf.evaluation.feature_networks import DIGITS_SHAPE, FeatureNetwork
from diffusion_tf.evaluation.scores import (
    FeatureExtractor,
    check_metrics,
    reference_features,
    reference_path,
)
from diffusion_tf.reports import captions, paper_figures
from diffusion_tf.reports.figure_files import to_page, write_figure
from diffusion_tf.reports.paper_figures import PaperFigure
from diffusion_tf.reports.run_record import read_run
from diffusion_tf.solvers import SamplerSettings
from diffusion_tf.storage import checkpoints
from diffusion_tf.storage.files import check_writable, write_file
from diffusion_tf.trained_model import TrainedModel

from ._measured_run import MeasuredRun


def _source_image(run: MeasuredRun, path: str | None, index: int) -> np.ndarray:
    """A source image, uint8 [H, W, C]."""
    if path is not None:
        return read_picture(path, run.preset.image_shape)
    source = run.open_source("test")
    if index >= source.num_examples:
        raise InputError(f"there is no image {index} in {source.name}: it has {source.num_examples}")
    return ImageReader(source)(index, 1)[0]


def _feature_network(run: MeasuredRun) -> FeatureNetwork | None:
    if FLAGS.inception:
        return run.feature_network("inception")
    return run.feature_network("digits") if run.preset.image_shape == DIGITS_SHAPE else None


def _quality(
    run: MeasuredRun, trained: TrainedModel, network: FeatureNetwork | None, shared: dict[str, Any]
) -> PaperFigure:
    if network is None:
        raise InputError("--figure=progressive_quality needs --inception")
    real = run.split_images("train", at_most=MAX_REFERENCE)
    check_metrics(("fid", "inception_score"), network.name, FLAGS.num_samples, real.count)
    extractor = FeatureExtractor(network, run.strategy, FLAGS.batch_size, run.results.partial)
    features = reference_features(extractor, real, run.find(reference_path(run.workdir, network, real)))
    return paper_figures.progressive_quality(trained, network, features, count=FLAGS.num_samples, **shared)


def _interpolation(run: MeasuredRun, trained: TrainedModel, times: list[int], shared: dict[str, Any]) -> PaperFigure:
    images = _source_image(run, FLAGS.source_a, FLAGS.index_a), _source_image(run, FLAGS.source_b, FLAGS.index_b)
    return paper_figures.interpolation(trained, *images, times=times, **shared)


def _make(figure: str, run: MeasuredRun, step: int, checkpoint: str, trained: TrainedModel) -> PaperFigure:
    classes = run.workdir.read_classes()
    condition = _flags.condition_from_flags(run.preset, classes)
    if FLAGS.label is None and figure in ("interpolation", "coarse_to_fine"):
        condition = UNLABELLED  # two images need not be of one class
    sampling = {"seed": FLAGS.seed, "compute_dtype": run.preset.precision}
    sampling |= {**SamplerSettings().describe(run.preset), **condition.describe(run.preset)}
    subject = captions.caption(run.preset.dataset, step, sampling)
    shared = {"batch_size": FLAGS.batch_size, "seed": FLAGS.seed, "subject": subject, "condition": condition}
    num_timesteps = run.preset.num_timesteps
    match figure:
        case "samples":
            record = read_run(run.workdir)
            digest = checkpoints.load_digest(checkpoint)
            scores = captions.measured(step, digest, sampling, record.evaluations, record.likelihood)
            shared["subject"] = "\n".join(filter(None, (subject, scores)))
            return paper_figures.samples(trained, count=FLAGS.count, classes=classes, **shared)
        case "progressive":
            return paper_figures.progressive(trained, chains=FLAGS.chains, **shared)
        case "shared_latents":
            return paper_figures.shared_latents(trained, _feature_network(run), chains=FLAGS.chains, **shared)
        case "animation":
            return paper_figures.animation(trained, count=FLAGS.count, frames=50, **shared)
        case "neighbors":
            least = min(run.preset.image_shape[:2])
            if FLAGS.crop and FLAGS.crop > least:
                raise InputError(f"--crop={FLAGS.crop} is more than the {least} pixels of an image")
            network, source = _feature_network(run), run.open_source("train")
            return paper_figures.neighbors(trained, source, network, count=FLAGS.chains, crop=FLAGS.crop, **shared)
        case "progressive_quality":
            return _quality(run, trained, _feature_network(run), shared)
        case "coarse_to_fine":
            return _interpolation(run, trained, [num_timesteps * eighth // 8 for eighth in range(8, -1, -1)], shared)
        case _:
            default = paper_figures.interpolation_time(trained.diffusion.schedule, run.preset.image_shape)
            return _interpolation(run, trained, [default if FLAGS.t is None else FLAGS.t], shared)


def main() -> None:
    run = MeasuredRun.from_flags()
    if FLAGS.t is not None and not 0 <= FLAGS.t <= run.preset.num_timesteps:
        raise InputError(f"--t={FLAGS.t} must be from 0 to the run's {run.preset.num_timesteps} steps")
    step, checkpoint = run.find_checkpoint()
    if FLAGS.figure == "all":
        scored = SCORED_FIGURES if FLAGS.inception or run.preset.image_shape == DIGITS_SHAPE else ()
        paths = {figure: os.path.join(FLAGS.out, file_name(figure)) for figure in (*FIGURES, *scored)}
        check_writable(os.path.join(FLAGS.out, "index.html"))
    else:
        paths = {FLAGS.figure: _flags.out_path(FLAGS.out, os.path.splitext(file_name(FLAGS.figure))[1])}
    trained = TrainedModel.from_checkpoint(run.preset, run.strategy, checkpoint)
    made = {}
    for figure, path in paths.items():
        made[figure] = _make(figure, run, step, checkpoint, trained)
        write_figure(path, figure, step, made[figure])
        print(f"{figure}: {path}")
    if FLAGS.figure == "all":
        index = os.path.join(FLAGS.out, "index.html")
        write_file(index, to_page(f"{run.preset.dataset}, step {step:,}", made))
        print(f"all: {index}")


if __name__ == "__main__":
    _program.run(main)
