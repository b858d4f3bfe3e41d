"""Trains the digits preset, or a small network on your pictures, on this machine; draws samples, and scores them.

  python -m experiments.demo --workdir=runs/digits
  python -m experiments.demo --workdir=runs/mine --images=FOLDER

With pictures it also writes the report of the run.
"""

import contextlib

from absl import flags

from diffusion_tf.errors import InputError
from diffusion_tf.presets import get_preset

from . import _flags, _program

FLAGS = flags.FLAGS
_flags.define_workdir_flag()
_flags.define_data_flags()
flags.DEFINE_integer("image_size", 32, "Height and width of the images that pictures become.", lower_bound=4)
flags.DEFINE_integer("channels", 3, "Their channels: 1 is grey, 3 is RGB, 4 is RGB and alpha.", lower_bound=1)
flags.DEFINE_integer("num_steps", 500, "Training steps on pictures.", lower_bound=1)
flags.DEFINE_integer("num_samples", 256, "Number of samples, at least 100.", lower_bound=100)


def _check() -> None:
    _flags.require_flags("workdir")
    data = _flags.data_from_flags()
    for name in ("image_size", "channels", "num_steps"):
        if FLAGS[name].present and not data.names_images:
            raise InputError(f"--{name} is for pictures: name them by --images=FOLDER")


_program.parse_flags(__name__, _check)

import tensorflow as tf

from diffusion_tf.data import open_source
from diffusion_tf.data.digits import load_digits
from diffusion_tf.evaluation.feature_networks import digits_network
from diffusion_tf.evaluation.metrics import classifier_score
from diffusion_tf.evaluation.scores import check_metrics
from diffusion_tf.runtime.strategies import make_strategy
from diffusion_tf.solvers import SamplerSettings
from diffusion_tf.storage import checkpoints
from diffusion_tf.storage.event_files import EventFile
from diffusion_tf.storage.workdir import Workdir
from diffusion_tf.trained_model import TrainedModel
from diffusion_tf.training.loop import train_in_workdir
from diffusion_tf.training.reporter import report_samples, samples_path

from . import _demo_images
from ._demo_scores import draw_samples, record_scores, write_picture

_METRICS = ("fid", "inception_score", "precision_recall")
_SUMMARY = """
Results
  {parameters:,} parameters, trained for {step:,} steps of {batch_size} images from {num_examples:,} scanned digits.
  {precision_pixels:.0%} of {num_samples} samples look like real digits (precision), and the samples cover
  {recall_pixels:.0%} of the real digits (recall; k = 3 in pixel space, against all 1,797 digits).
  With the features of a small digit classifier: Fréchet distance {frechet_digits:.2f}, classifier score
  {classifier_score_digits:.2f} of at most 10; the real digits have {real_score:.2f}.

Files
  {picture}   samples beside real digits: look here first
  {samples}   the samples, uint8 [N, 8, 8, 1]
  {checkpoints}   weights, EMA weights, optimizer state, step
  {workdir}/metrics.jsonl   one line per {steps_per_loop} steps

Next
  tensorboard --logdir={workdir}   training curves
  python -m experiments.sample --workdir={workdir} --out=more.npz --png=more.png --seed=1   more samples
  python -m experiments.likelihood --workdir={workdir} --num_timesteps_estimate=20   bits/dim of held-out digits
  python -m experiments.report --workdir={workdir}   all of it on one page
"""


def main() -> None:
    if _flags.data_from_flags().names_images:
        _demo_images.main()
    else:
        _demo_digits()


def _demo_digits() -> None:
    network = digits_network()
    check_metrics(_METRICS, network.name, FLAGS.num_samples, len(load_digits()))  # before the work, not after it
    preset = get_preset("digits", sample_every=0)  # samples are drawn below
    workdir = Workdir(FLAGS.workdir)
    strategy = make_strategy("auto")
    source = open_source(preset)
    train_in_workdir(preset, strategy, source, workdir.path, command=FLAGS.flags_into_string())

    step, checkpoint = checkpoints.find(workdir.checkpoints)
    num_samples = FLAGS.num_samples
    trained = TrainedModel.from_checkpoint(preset, strategy, checkpoint)
    settings = SamplerSettings().resolve(preset)
    samples, drawn = draw_samples(workdir, trained, step, settings, num_samples=num_samples, batch_size=num_samples)
    if not tf.io.gfile.exists(samples_path(workdir, step)):  # TensorBoard shows them once
        with contextlib.closing(EventFile(workdir.tensorboard)) as events:
            report_samples(workdir, events, step, samples[:100], preset)
    real = load_digits()
    picture = write_picture(workdir, step, samples, real, "real digits")
    scores, real_features = record_scores(
        workdir, trained, step, checkpoint, settings, network, _METRICS,
        samples=samples, real=real, images="all scikit-learn digits",
    )  # fmt: skip
    print(
        _program.command_lines(_SUMMARY).format(
            **scores,
            real_score=classifier_score(real_features["logits"]),
            parameters=trained.model.count_params(),
            step=step,
            batch_size=preset.batch_size,
            num_examples=source.num_examples,
            num_samples=num_samples,
            picture=picture,
            samples=drawn,
            checkpoints=workdir.checkpoints,
            workdir=workdir.path,
            steps_per_loop=preset.steps_per_loop,
        )
    )


if __name__ == "__main__":
    _program.run(main)
