"""The demo on a folder of pictures: trains a small network, samples, compares with the pictures, writes the report."""

import os

from absl import flags

from diffusion_tf.data import open_images
from diffusion_tf.data.source import ImageReader, ImageSource
from diffusion_tf.evaluation.feature_networks import pixels_network
from diffusion_tf.evaluation.scores import check_metrics
from diffusion_tf.presets import Preset
from diffusion_tf.recipes import choose_preset
from diffusion_tf.reports.run_page import to_markdown
from diffusion_tf.reports.run_picture import to_png
from diffusion_tf.reports.run_record import read_run
from diffusion_tf.runtime.strategies import make_strategy
from diffusion_tf.solvers import SamplerSettings
from diffusion_tf.storage import checkpoints
from diffusion_tf.storage.files import write_file
from diffusion_tf.storage.workdir import Workdir
from diffusion_tf.trained_model import TrainedModel
from diffusion_tf.training.loop import train_in_workdir

from . import _flags, _program
from ._demo_scores import draw_samples, record_scores, write_picture

FLAGS = flags.FLAGS
_METRICS = ["precision_recall"]
_BATCH_SIZE = 64  # samples drawn at once
_MAX_REFERENCE = 5000  # pictures to compare with
_SUMMARY = """
Results
  {parameters:,} parameters, trained for {step:,} steps of {batch_size} images from {num_examples:,} pictures.
  {precision_pixels:.0%} of {num_samples} samples are as near to training pictures as these are to each other
  (precision), and the samples cover {recall_pixels:.0%} of the training pictures (recall; k = 3 in pixel space).
  A demo is short: `train` with the same --images trains a larger network for longer.

Files
  {picture}   samples beside training pictures: look here first
  {report}   the run on one page
  {samples}   the samples, uint8 [N, H, W, C]
  {checkpoints}   weights, EMA weights, optimizer state, step

Next
  python -m experiments.sample --workdir={workdir} --out=more.npz --png=more.png --seed=1   more samples
  python -m experiments.train --workdir=runs/mine --images={images}   a run of its own
"""


def main() -> None:
    """Runs the demo on --images."""
    data = _flags.data_from_flags()
    workdir, strategy = Workdir(FLAGS.workdir), make_strategy("auto")
    source = open_images(data, "train", lambda _: (FLAGS.image_size, FLAGS.image_size, FLAGS.channels))
    preset = _small_preset(source)
    network = pixels_network(preset.image_shape)
    # Before the work, not after it.
    check_metrics(_METRICS, network.name, FLAGS.num_samples, source.num_examples)
    train_in_workdir(preset, strategy, source, workdir.path, command=FLAGS.flags_into_string(), data=data)

    step, checkpoint = checkpoints.find(workdir.checkpoints)
    settings = SamplerSettings("sde_dpm_solver++").resolve(preset)
    trained = TrainedModel.from_checkpoint(preset, strategy, checkpoint)
    samples, drawn = draw_samples(
        workdir, trained, step, settings, num_samples=FLAGS.num_samples, batch_size=_BATCH_SIZE
    )
    real = ImageReader(source)(0, min(source.num_examples, _MAX_REFERENCE))
    picture = write_picture(workdir, step, samples, real, "training pictures")
    scores, _ = record_scores(
        workdir, trained, step, checkpoint, settings, network, _METRICS,
        samples=samples, real=real, images=source.name,
    )  # fmt: skip
    print(
        _program.command_lines(_SUMMARY).format(
            **scores,
            parameters=trained.model.count_params(),
            step=step,
            batch_size=preset.batch_size,
            num_examples=source.num_examples,
            num_samples=FLAGS.num_samples,
            picture=picture,
            report=_write_report(workdir),
            samples=drawn,
            checkpoints=workdir.checkpoints,
            workdir=workdir.path,
            images=FLAGS.images,
        )
    )


def _small_preset(source: ImageSource) -> Preset:
    """A recipe that two cores train in minutes."""
    return choose_preset(
        source.image_shape,
        source.num_examples,
        ch=32,
        num_res_blocks=1,
        attn_resolutions=(),
        learning_rate=1e-3,
        batch_size=16,
        num_steps=FLAGS.num_steps,
        sample_every=0,
    )


def _write_report(workdir: Workdir) -> str:
    """Writes the run's page, and returns its path."""
    record, path = read_run(workdir), os.path.join(workdir.path, "report")
    write_file(f"{path}.png", to_png(record))
    write_file(f"{path}.md", _program.command_lines(to_markdown(record, "report.png")).encode())
    return f"{path}.md"
