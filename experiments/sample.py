"""Draws samples from a trained run with its EMA weights, changes pictures, or paints a part of them.

  python -m experiments.sample --workdir=runs/digits --num_samples=100 --seed=1 --out=samples.npz --png=grid.png
  python -m experiments.sample --pretrained=cifar10_small --png=grid.png
  python -m experiments.sample --workdir=runs/digits --num_samples=50000 --out=samples
  python -m experiments.sample --workdir=runs/digits --sampler_steps=20 --out=samples.npz
  python -m experiments.sample --workdir=runs/digits --inpaint=digit.png --mask=mask.png --num_samples=8 --out=new
  python -m experiments.sample --workdir=runs/digits --start_from=digit.png --strength=0.6 --num_samples=8 --out=new
  python -m experiments.sample --workdir=runs/digits --sampler=ddim --sampler_steps=200 --encode=a.npz --out=b.npz
  python -m experiments.sample --workdir=runs/classes --label=3 --guidance=2 --out=threes.npz --png=threes.png

Sample i depends only on --seed and i: another batch size or number of replicas gives the same images up to float
rounding. The file holds `samples`, uint8 [N, H, W, C]; a folder holds a PNG for each sample, and samples.npz.

Without --sampler and --sampler_steps, a run is sampled in all T steps, and --pretrained weights in 20.

The same command continues after an interruption, and --resume adds samples to a folder.

--inpaint paints what is white in --mask and keeps every other pixel (RePaint). --start_from adds noise to a picture and
removes it (SDEdit): the more --strength, the less of the picture is left. Both take a picture of the run's size, or an
.npz of `samples`; sample i is made from picture i modulo their number.

--encode runs DDIM from the `samples` of a file to their latents and back, and writes `latents`, float32, beside the
`samples` that they decode to.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import flags

from diffusion_tf.conditioning import NO_LABEL, Condition
from diffusion_tf.errors import InputError
from diffusion_tf.presets import Preset
from diffusion_tf.solvers import JUMP_LENGTH, RESAMPLINGS, SamplerSettings, repaint_settings

from . import _flags, _program

FLAGS = flags.FLAGS
_QUICK_STEPS = 20  # of pretrained weights, which are there to try
_flags.define_run_flags()
_flags.define_strategy_flags()
_flags.define_precision_flag()
_flags.define_sampler_flags()
flags.DEFINE_boolean(
    "calibrate",
    False,
    "Multiply the predicted noise by E[eps eps_hat] / E[eps_hat^2] at each t, which is measured once on the run's"
    " training images and kept in its folder.",
)
_flags.define_condition_flags()
flags.DEFINE_integer("checkpoint", None, "Step of the checkpoint. Default: the newest.")
flags.DEFINE_integer(
    "num_samples", None, "Number of samples. Default: 64; with --inpaint or --start_from one of each picture.",
    lower_bound=1,
)  # fmt: skip
flags.DEFINE_integer("batch_size", 64, "Samples drawn at once, over all replicas.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Seed of the samples.", lower_bound=0, upper_bound=2**32 - 1)
_flags.define_path(
    "out", None, "The .npz file to write, or a folder for a PNG of each sample and samples.npz. Required without --png."
)
flags.DEFINE_boolean("resume", False, "Add to the samples in the folder --out, up to --num_samples.")
_flags.define_path("inpaint", None, "A picture to paint a part of, or an .npz of `samples`.")
_flags.define_path("mask", None, "With --inpaint: a picture that is white (128 of 255 or more) where to paint.")
flags.DEFINE_integer(
    "resamplings", RESAMPLINGS, "With --inpaint: how often each stretch of steps is taken. The time grows with it.",
    lower_bound=1,
)  # fmt: skip
flags.DEFINE_integer("jump_length", JUMP_LENGTH, "With --inpaint: steps in a stretch.", lower_bound=1)
_flags.define_path("start_from", None, "A picture to change, or an .npz of `samples`.")
flags.DEFINE_float(
    "strength", 0.6, "With --start_from: the share of the steps to take, in (0, 1]; near 0 the picture returns."
)
_flags.define_path("encode", None, "With --sampler=ddim: an .npz of `samples` to encode and decode.")
_flags.define_path("png", None, "PNG to write a grid of the samples to.")


def _check() -> None:
    _flags.check_measured_run()
    if not (FLAGS.out or FLAGS.png):
        raise InputError("--out is required, or --png")
    _flags.check_extension("png", ".png")
    if FLAGS.encode and (FLAGS.sampler != "ddim" or FLAGS.ddim_eta):
        raise InputError("--encode needs --sampler=ddim without --ddim_eta: only that can run backwards")
    if FLAGS.encode and (FLAGS.clip_sample != "static" or FLAGS.use_clipped_model_output is not None):
        raise InputError("--encode never clips: leave out --clip_sample and --use_clipped_model_output")
    if len([name for name in ("encode", "inpaint", "start_from") if FLAGS[name].value]) > 1:
        raise InputError("give one of --encode, --inpaint and --start_from")
    if FLAGS.inpaint and not FLAGS.mask:
        raise InputError("--inpaint needs --mask, a picture that is white where to paint")
    for name, with_name in (
        ("mask", "inpaint"), ("resamplings", "inpaint"), ("jump_length", "inpaint"), ("strength", "start_from"),
    ):  # fmt: skip
        if FLAGS[name].present and not FLAGS[with_name].value:
            raise InputError(f"--{name} goes with --{with_name}")
    if FLAGS.out and not _writes_folder() and not FLAGS.out.lower().endswith(".npz"):
        raise InputError(f"--out={FLAGS.out} must end in .npz, or name a folder: end it in /")
    if FLAGS.encode and (not FLAGS.out or _writes_folder()):
        raise InputError("--encode writes an .npz file: --out must end in .npz")
    if FLAGS.resume and not _writes_folder():
        raise InputError("--resume goes with a folder --out; the same command with an .npz file goes on by itself")


def _writes_folder() -> bool:
    """Whether --out names a folder: it ends in / or has no extension."""
    return bool(FLAGS.out) and (FLAGS.out.endswith("/") or not os.path.splitext(FLAGS.out)[1])


_program.parse_flags(__name__, _check)

from diffusion_tf import figures
from diffusion_tf.calibration import calibrated, run_calibration
from diffusion_tf.evaluation.scores import file_images
from diffusion_tf.inpainting import Inpainter
from diffusion_tf.reports import captions
from diffusion_tf.samplers import Sampler, ddim_inversion
from diffusion_tf.storage import checkpoints
from diffusion_tf.storage.files import check_writable, write_file
from diffusion_tf.storage.npz_files import write_npz
from diffusion_tf.trained_model import TrainedModel

from ._given_pictures import GivenPictures
from ._measured_run import MeasuredRun
from ._sample_folder import SampleFolder


def _read_given(image_shape: tuple[int, int, int]) -> GivenPictures | None:
    path = FLAGS.inpaint or FLAGS.start_from
    return GivenPictures.read(path, FLAGS.mask, image_shape) if path else None


def _settings(preset: Preset) -> SamplerSettings:
    settings = _flags.unresolved_sampler_from_flags()
    if FLAGS.pretrained and not (settings.name or settings.steps or FLAGS.inpaint):
        settings = dataclasses.replace(settings, steps=_QUICK_STEPS)
    if FLAGS.start_from:
        settings = dataclasses.replace(settings, strength=FLAGS.strength)
    if FLAGS.inpaint:
        settings = repaint_settings(settings, preset)
    return settings.resolve(preset)


def _sampling(
    run: MeasuredRun, settings: SamplerSettings, condition: Condition, given: GivenPictures | None
) -> dict[str, Any]:
    """What samples of a checkpoint depend on, as JSON values."""
    sampling = {"seed": FLAGS.seed, **settings.describe(run.preset), **condition.describe(run.preset)}
    if FLAGS.calibrate:
        sampling["calibrated"] = True
    if given:
        sampling |= given.describe()
    if FLAGS.inpaint:
        sampling |= {"resamplings": FLAGS.resamplings, "jump_length": FLAGS.jump_length}
    return sampling


def _trained(run: MeasuredRun, step: int, checkpoint: str) -> TrainedModel:
    trained = TrainedModel.from_checkpoint(run.preset, run.strategy, checkpoint)
    if not FLAGS.calibrate:
        return trained
    folder, digest = os.path.join(run.results.path, "calibration"), checkpoints.load_digest(checkpoint)
    return calibrated(trained, run_calibration(folder, trained, digest, step, lambda: run.open_source("train")))


def _draw_function(
    trained: TrainedModel, settings: SamplerSettings, condition: Condition, given: GivenPictures | None
) -> Callable[[int, int], np.ndarray]:
    """A function of (first, count) that returns samples first, ..., first + count - 1, uint8 [count, H, W, C]."""
    if given is None or given.painted is None:
        sampler = Sampler(
            trained, batch_size=FLAGS.batch_size, seed=FLAGS.seed, settings=settings, condition=condition
        )  # fmt: skip
        if given is None:
            return sampler.images
        return lambda first, count: sampler.images(first, count, given.of_samples(first, count))
    painted = given.painted
    inpainter = Inpainter(
        trained, batch_size=FLAGS.batch_size, seed=FLAGS.seed, settings=settings, condition=condition,
        resamplings=FLAGS.resamplings, jump_length=FLAGS.jump_length,
    )  # fmt: skip
    return lambda first, count: inpainter(given.of_samples(first, count), painted.repeat(count, 0), first_image=first)


def _encode(trained: TrainedModel, steps: int, condition: Condition) -> dict[str, np.ndarray]:
    """The latents of the images in --encode, and the samples that they decode to; without --label, without labels."""
    file = file_images(FLAGS.encode, trained.preset.image_shape)
    images = file.pixels(0, file.count)
    latents, samples = ddim_inversion(
        trained,
        images,
        steps=steps,
        spacing=FLAGS.sampler_spacing,
        batch_size=FLAGS.batch_size,
        labels=NO_LABEL if FLAGS.label is None else condition.of_images(0, len(images)),
        guidance=condition.guidance,
    )
    rmse = np.sqrt(np.mean((samples.astype(np.float64) - images) ** 2))
    print(f"{len(images)} images to latents and back: RMSE {rmse:.3f} on [0, 255]")
    return {"samples": samples, "latents": latents}


def _caption(run: MeasuredRun, step: int, settings: SamplerSettings, sampling: dict[str, Any]) -> str:
    if FLAGS.encode:
        return f"{run.preset.dataset}, checkpoint {step:,}, decoded from latents by ddim in {settings.steps} steps"
    lines = [captions.caption(run.preset.dataset, step, sampling)]
    if FLAGS.start_from:
        lines.append(f"started from {os.path.basename(FLAGS.start_from)} at strength {settings.strength:g}")
    if FLAGS.inpaint:
        lines.append(
            f"{os.path.basename(FLAGS.inpaint)} inpainted, {FLAGS.resamplings} times {FLAGS.jump_length} steps"
        )
    return "\n".join(lines)


def _write_grid(run: MeasuredRun, caption: str, samples: np.ndarray, condition: Condition) -> None:
    grid = figures.square_grid(samples)
    if run.preset.num_classes and not FLAGS.encode:
        labels = condition.of_images(0, len(samples))
        grid, legend = figures.class_grid(samples, labels, run.workdir.read_classes())
        caption += f"\n{legend}"
    write_file(FLAGS.png, figures.captioned_grids({caption: grid}))
    print(f"grid: {FLAGS.png}")


def main() -> None:
    run = MeasuredRun.from_flags()
    settings = _settings(run.preset)
    default_labels = (NO_LABEL,) if FLAGS.inpaint or FLAGS.start_from else ()
    condition = _flags.condition_from_flags(run.preset, run.workdir.read_classes(), default_labels)
    step, checkpoint = run.find_checkpoint()
    given = _read_given(run.preset.image_shape)
    num_samples = FLAGS.num_samples or (len(given.images) if given else 64)
    sampling = _sampling(run, settings, condition, given)
    description = {"samples_of": checkpoints.load_digest(checkpoint), "compute_dtype": run.preset.precision, **sampling}
    folder = SampleFolder(FLAGS.out, description, run.preset.image_shape) if _writes_folder() else None
    # Before the work, not after it.
    if folder:
        folder.check(num_samples, resume=FLAGS.resume)
    for path in filter(None, (None if folder else FLAGS.out, FLAGS.png)):
        check_writable(path)
    trained = _trained(run, step, checkpoint)
    if FLAGS.encode:
        assert settings.steps
        arrays = _encode(trained, settings.steps, condition)
        write_npz(FLAGS.out, **arrays)
        samples = arrays["samples"]
    elif folder:
        draw = _draw_function(trained, settings, condition, given)
        samples = folder.fill(draw, num_samples, FLAGS.batch_size)
    else:
        draw = _draw_function(trained, settings, condition, given)
        batches = run.sampled_batches(checkpoint, sampling, num_samples)
        drawn = batches.compute(lambda first, count: {"samples": draw(first, count)}, "sampling")
        samples = np.concatenate([batch["samples"] for batch in drawn])
        if FLAGS.out:
            write_npz(FLAGS.out, samples=samples)
        batches.remove()
    if FLAGS.out:
        print(f"{len(samples)} samples of step {step}: {FLAGS.out}")
    if FLAGS.png:
        _write_grid(run, _caption(run, step, settings, sampling), samples, condition)


if __name__ == "__main__":
    _program.run(main)
