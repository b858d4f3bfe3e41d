"""Makes the paper's figures from a trained run, each as a picture and a JSON of what it shows.

  python -m experiments.figures --workdir=runs/digits --figure=interpolation --out=interpolation.png
  python -m experiments.figures --workdir=runs/digits --figure=all --out=figures

samples (Figs. 11, 13, 16-19), progressive (Figs. 6, 14), shared_latents (Fig. 7), interpolation (Fig. 8),
coarse_to_fine (Fig. 9), progressive_quality (Fig. 10), neighbors (Figs. 12, 15), animation (a GIF of a sampling run),
or all of them in a folder with an index.html. The same seed gives the same picture.
"""

import html
import os

import numpy as np
from absl import flags

from diffusion_tf.data import open_source
from diffusion_tf.data.source import ImageReader
from diffusion_tf.errors import InputError
from diffusion_tf.evaluation.feature_networks import DIGITS_SHAPE, FeatureNetwork
from diffusion_tf.evaluation.scores import (
    MAX_REFERENCE,
    FeatureExtractor,
    check_metrics,
    reference_features,
    reference_path,
)
from diffusion_tf.reports import paper_figures
from diffusion_tf.reports.paper_figures import PaperFigure
from diffusion_tf.reports.run_record import read_run
from diffusion_tf.storage.files import Arrays, check_writable, write_file, write_json
from diffusion_tf.trained_model import TrainedModel
from experiments import common

FLAGS = flags.FLAGS
_FIGURES = ("samples", "progressive", "shared_latents", "interpolation", "coarse_to_fine", "neighbors", "animation")
_WITH_NETWORK = ("progressive_quality",)
common.define_measurement_flags(batch_size=64, out="The picture to write (.png, .gif for animation), or all's folder.")
flags.DEFINE_enum("figure", None, (*_FIGURES, *_WITH_NETWORK, "all"), "Which figure.")
flags.DEFINE_integer("count", 64, "Samples in samples, animation; chains behind shared_latents' numbers.")
flags.DEFINE_integer("num_samples", 1000, "Samples behind progressive_quality.", lower_bound=10)
flags.DEFINE_integer("chains", 8, "Rows of progressive and of neighbors.", lower_bound=1)
flags.DEFINE_integer("crop", None, "For neighbors: compare pixels of the central CROP x CROP only.", lower_bound=1)
flags.DEFINE_integer("t", None, "For interpolation: the steps of noise before mixing, 0 to T. Default: T / 2.")
flags.DEFINE_integer("index_a", 0, "The first source image, by its place in the test split.", lower_bound=0)
flags.DEFINE_integer("index_b", 1, "The second source image.", lower_bound=0)
flags.DEFINE_string("source_a", None, "The first source image as a file, in place of --index_a.")
flags.DEFINE_string("source_b", None, "The second source image as a file.")
flags.DEFINE_string("inception", None, "An Inception network as experiments.evaluate takes it; digits need none.")
flags.register_validator("count", lambda count: count >= 1, "must be 1 or more")


def _source(run: common.Run, path: str | None, index: int) -> np.ndarray:
    """A source image, uint8 [H, W, C]."""
    if path is None:
        source = open_source(run.preset, "test", data_dir=FLAGS.data_dir, tfrecord=FLAGS.tfrecord)
        if index >= source.num_examples:
            raise InputError(f"there is no image {index} in {source.name}: it has {source.num_examples}")
        return ImageReader(source)(index, 1)[0]
    return common.read_image(path, run.preset.image_shape)


def _has_network(run: common.Run) -> bool:
    return bool(FLAGS.inception) or run.preset.image_shape == DIGITS_SHAPE


def _network(run: common.Run) -> FeatureNetwork | None:
    if not _has_network(run):
        return None
    return common.feature_network(run, "inception" if FLAGS.inception else "digits")


def _real_features(run: common.Run) -> tuple[FeatureNetwork, Arrays]:
    """A network, and its features of the training images."""
    network = _network(run)
    if network is None:
        raise InputError("--figure=progressive_quality needs --inception")
    images = common.split_images(run, "train", at_most=MAX_REFERENCE)
    check_metrics(("fid", "inception_score"), network.name, FLAGS.num_samples, images.count)
    extractor = FeatureExtractor(network, run.strategy, FLAGS.batch_size, run.workdir.partial)
    return network, reference_features(extractor, images, reference_path(run.workdir, network, images))


def _samples_caption(run: common.Run, step: int) -> str:
    """Preset, step, and what was measured of it."""
    lines = [line for line in run.workdir.read_evaluations() if line["step"] == step]
    scores = [f"{name} {line[name]:.3g}" for line in lines for name in ("fid", "frechet_digits") if name in line]
    bits = [
        f"{result['bits_per_dim']:.2f} bits/dim ({split})"
        for split, result in read_run(run.workdir).likelihood.items()
        if result["step"] == step
    ]
    return ", ".join([run.preset.dataset, f"step {step:,}", *scores[-1:], *bits])


def _make(figure: str, run: common.Run, step: int, trained: TrainedModel) -> PaperFigure:
    common_args = {"batch_size": FLAGS.batch_size, "seed": FLAGS.seed}
    num_timesteps = run.preset.num_timesteps
    if figure == "samples":
        caption = _samples_caption(run, step)
        return paper_figures.samples(trained, count=FLAGS.count, caption=caption, **common_args)
    if figure == "progressive":
        return paper_figures.progressive(trained, chains=FLAGS.chains, **common_args)
    if figure == "shared_latents":
        return paper_figures.shared_latents(trained, _network(run), chains=FLAGS.count, **common_args)
    if figure == "animation":
        return paper_figures.animation(trained, count=FLAGS.count, frames=50, **common_args)
    if figure == "neighbors":
        source = open_source(run.preset, "train", data_dir=FLAGS.data_dir, tfrecord=FLAGS.tfrecord)
        if FLAGS.crop and FLAGS.crop > run.preset.image_size:
            raise InputError(f"--crop={FLAGS.crop} is more than the images' {run.preset.image_size} pixels")
        return paper_figures.neighbors(
            trained, source, _network(run), count=FLAGS.chains, crop=FLAGS.crop, **common_args
        )
    if figure == "progressive_quality":
        network, real = _real_features(run)
        return paper_figures.progressive_quality(trained, network, real, count=FLAGS.num_samples, **common_args)
    times = [num_timesteps // 2 if FLAGS.t is None else FLAGS.t]
    if figure == "coarse_to_fine":
        times = [num_timesteps * eighth // 8 for eighth in range(8, -1, -1)]
    sources = _source(run, FLAGS.source_a, FLAGS.index_a), _source(run, FLAGS.source_b, FLAGS.index_b)
    return paper_figures.interpolation(trained, *sources, times=times, **common_args)


def _write(figure: str, run: common.Run, step: int, trained: TrainedModel, path: str) -> PaperFigure:
    made = _make(figure, run, step, trained)
    write_file(path, made.picture)
    write_json(f"{os.path.splitext(path)[0]}.json", {"figure": figure, "step": step, **made.numbers})
    print(f"{figure}: {path}")
    return made


def _extension(figure: str) -> str:
    return ".gif" if figure == "animation" else ".png"


def main() -> None:
    common.require_flags("workdir", "figure", "out")
    run = common.Run.from_flags()
    if FLAGS.t is not None and not 0 <= FLAGS.t <= run.preset.num_timesteps:
        raise InputError(f"--t={FLAGS.t} must be from 0 to the run's {run.preset.num_timesteps} steps")
    step, checkpoint = run.find_checkpoint()
    if FLAGS.figure != "all":
        out = common.out_path(FLAGS.out, _extension(FLAGS.figure))
        _write(FLAGS.figure, run, step, TrainedModel.from_checkpoint(run.preset, run.strategy, checkpoint), out)
        return
    index = os.path.join(FLAGS.out, "index.html")
    check_writable(index)
    trained = TrainedModel.from_checkpoint(run.preset, run.strategy, checkpoint)
    page = [f"<title>{run.preset.dataset}</title><h1>{run.preset.dataset}, step {step:,}</h1>"]
    for figure in (*_FIGURES, *(_WITH_NETWORK if _has_network(run) else ())):
        name = f"{figure}{_extension(figure)}"
        made = _write(figure, run, step, trained, os.path.join(FLAGS.out, name))
        page.append(f'<h2>{figure}</h2><p>{html.escape(made.explanation)}</p><img src="{name}" alt="{figure}">')
    write_file(index, "\n".join(page).encode())
    print(f"all: {index}")


if __name__ == "__main__":
    common.run(main)
