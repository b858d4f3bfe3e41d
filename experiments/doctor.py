"""Says why samples of a run are noise: what is wrong with its data, network, EMA or sampler, and what to do.

  python -m experiments.doctor --workdir=runs/digits
  python -m experiments.doctor --workdir=runs/cifar10 --num_images=16 --sampler=dpm_solver++

It examines the EMA weights of a checkpoint on training pictures. Each finding is one line: what is wrong, with its
numbers, and what to do. The exit code is 1 if a finding is an error, and 0 if there are only warnings or none.

doctor.json in the workdir has the findings and all numbers, doctor.md and doctor.png show them with the loss by
timestep beside that of the best linear denoiser, the calibration, the drift, and samples.
"""

import os
import sys

import numpy as np
from absl import flags

from . import _flags, _program

FLAGS = flags.FLAGS
_flags.define_measurement_flags(
    batch_size=32, out="JSON file to write, with a page beside it. Default: in the workdir."
)
_flags.define_sampler_flags()
FLAGS.set_default("sampler", "sde_dpm_solver++")  # the default of few steps
flags.DEFINE_integer(
    "num_images",
    None,
    "Training pictures that the network denoises. Default: 256 for images of up to 16x16 pixels, else 32.",
    lower_bound=2,
)
flags.DEFINE_integer(
    "num_samples",
    None,
    "Samples of Algorithm 2 and of --sampler. Default: 64 for images of up to 16x16 pixels, else 8.",
    lower_bound=2,
)
flags.DEFINE_integer(
    "algorithm_2_steps",
    100,
    "Steps of Algorithm 2, with which --sampler is compared. All T steps are the paper's, and take longer.",
    lower_bound=1,
)


def _check() -> None:
    _flags.check_measured_run()
    _flags.check_extension("out", ".json")


_program.parse_flags(__name__, _check)

from diffusion_tf.calibration import Calibration
from diffusion_tf.conditioning import NO_LABEL
from diffusion_tf.data.source import ImageReader, label_reader
from diffusion_tf.diffusion_utils import GaussianDiffusion
from diffusion_tf.evaluation import diagnosis
from diffusion_tf.evaluation.checkup import Checkup, Pictures, statistics
from diffusion_tf.evaluation.diagnosis import ERROR, Finding
from diffusion_tf.reports.doctor_page import NOTHING, Examination, to_markdown, to_png
from diffusion_tf.storage import checkpoints
from diffusion_tf.storage.files import write_file
from diffusion_tf.storage.json_files import write_json
from diffusion_tf.trained_model import TrainedModel

from ._measured_run import MeasuredRun

_SMALL = 16 * 16  # pixels
_PICTURES, _BYTES = 2000, 2**28  # at most, to estimate the spectrum of the pictures


def _pictures(run: MeasuredRun) -> Pictures:
    source = run.open_source("train")
    count = min(_PICTURES, source.num_examples, max(2, _BYTES // int(np.prod(run.preset.image_shape))))
    labels = np.full(count, NO_LABEL, np.int32)
    if run.preset.num_classes and source.label:
        labels = label_reader(source)(0, count)
    return Pictures.of(ImageReader(source)(0, count), labels)


def _file_findings(run: MeasuredRun, checkpoint: str, pictures: Pictures) -> list[Finding]:
    """What the run's pictures, configuration and log tell."""
    preset = run.workdir.read_preset()
    recipes = [recipe.recipe_sha256() for recipe in (preset, *run.workdir.earlier_recipes())]
    mean_square = float(np.square(pictures.images / 127.5 - 1.0).mean())
    predicts_noise = (preset.model_mean_type, preset.loss_type) == ("eps", "mse")
    return [
        *diagnosis.check_pictures(pictures.images),
        *diagnosis.check_recipe(checkpoints.load_manifest(checkpoint).get("config_sha256"), recipes),
        *diagnosis.check_schedule(GaussianDiffusion.from_preset(preset).schedule, mean_square),
        *diagnosis.check_training(run.workdir.read_metrics(), loss_of_zero=1.0 if predicts_noise else None),
    ]


def _raw_weights(run: MeasuredRun, checkpoint: str) -> TrainedModel | None:
    """The network with the raw weights; None if they are the EMA weights, as after an import."""
    arrays = checkpoints.load(checkpoint)
    names = [name.removeprefix("ema/") for name in arrays if name.startswith("ema/")]
    if all(np.array_equal(arrays[f"params/{name}"], arrays[f"ema/{name}"]) for name in names):
        return None
    return TrainedModel.from_checkpoint(run.preset, run.strategy, checkpoint, group="params")


def _ema_findings(run: MeasuredRun, step: int, ema: Calibration, raw: Calibration) -> list[Finding]:
    decays = {recipe.ema_decay for recipe in (run.preset, *run.workdir.earlier_recipes())}
    trained_here = bool(run.workdir.read_metrics()) and run.workdir.read_init_from() is None
    return diagnosis.check_ema(
        ema.loss,
        raw.loss,
        decay=run.preset.ema_decay,
        steps=step,
        started_random=trained_here and len(decays) == 1,
    )


def _examine(run: MeasuredRun, pictures: Pictures) -> Examination:
    preset = run.preset
    step, checkpoint = run.find_checkpoint()
    small = preset.image_pixels <= _SMALL
    steps = min(FLAGS.algorithm_2_steps, preset.num_timesteps)
    settings = _flags.sampler_from_flags(preset)
    checkup = Checkup(
        TrainedModel.from_checkpoint(preset, run.strategy, checkpoint),
        pictures,
        num_images=FLAGS.num_images or (256 if small else 32),
        num_samples=FLAGS.num_samples or (64 if small else 8),
        steps=steps,
        batch_size=FLAGS.batch_size,
        seed=FLAGS.seed,
    )
    findings = _file_findings(run, checkpoint, pictures)
    drift, raw = None, None
    of_ema: list[Finding] = []
    ema = checkup.calibration(checkup.trained)
    if raw_weights := _raw_weights(run, checkpoint):
        raw = checkup.calibration(raw_weights)
        of_ema = _ema_findings(run, step, ema, raw)
        findings += of_ema
    if not of_ema:  # which explain a poor loss
        poor = checkup.loss_findings(ema)
        unexplained = all(finding.check == "loss" for finding in poor)
        findings += (unexplained and checkup.channel_findings()) or poor
    sound = not any(finding.severity == ERROR for finding in findings)
    theirs, ours, fast = "training pictures", f"Algorithm 2, {steps} steps", f"{settings.name}, {settings.steps} steps"
    images = {theirs: pictures.images, ours: checkup.algorithm_2()}
    if sound:
        findings += diagnosis.check_calibration(ema)
        drift = checkup.drift()
        findings += diagnosis.check_drift(*drift)
        images[fast] = checkup.samples(settings)
    measured = statistics(images)
    findings += diagnosis.check_samples(measured[ours], measured[theirs])
    if sound:
        findings += diagnosis.check_sampler(fast, measured[fast], measured[ours])
    return Examination(
        title=f"{preset.dataset}, step {step:,}",
        findings=findings,
        linear=checkup.linear,
        ema=ema,
        raw=raw,
        drift=drift,
        statistics=measured,
        images=images,
    )


def main() -> None:
    run = MeasuredRun.from_flags()
    out = _flags.out_path(os.path.join(run.results.path, "doctor.json"), ".json")
    examined = _examine(run, _pictures(run))
    base = os.path.splitext(out)[0]
    write_json(out, examined.to_json())
    write_file(f"{base}.png", to_png(examined))
    write_file(f"{base}.md", to_markdown(examined, f"{os.path.basename(base)}.png").encode())
    for finding in examined.findings:
        print(finding)
    if not examined.findings:
        print(NOTHING)
    print(f"page: {base}.md {base}.png\nnumbers: {out}")
    if any(finding.severity == ERROR for finding in examined.findings):
        sys.exit(1)


if __name__ == "__main__":
    _program.run(main)
