"""Draws samples from a trained run with its EMA weights: Algorithm 2, or DDIM or DPM-Solver++ in few steps.

  python -m experiments.sample --workdir=runs/digits --num_samples=100 --seed=1 --out=samples.npz --png=grid.png
  python -m experiments.sample --workdir=runs/digits --sampler=dpm_solver++ --sampler_steps=20 --out=samples.npz
  python -m experiments.sample --workdir=runs/digits --sampler=ddim --sampler_steps=200 --encode=a.npz --out=b.npz
  python -m experiments.sample --workdir=runs/classes --label=3 --guidance=2 --out=threes.npz --png=threes.png

Sample i depends only on --seed and i: another batch size or number of replicas gives the same images up to float
rounding. The file holds `samples`, uint8 [N, H, W, C].

The same command continues after an interruption: finished batches are kept until the file is written.

--encode runs DDIM from the `samples` of a file to their latents and back, and writes `latents`, float32, beside the
`samples` that they decode to.
"""

from typing import Any

import numpy as np
from absl import flags

from diffusion_tf.conditioning import NO_LABEL, Condition
from diffusion_tf.errors import InputError

from . import _flags, _program

FLAGS = flags.FLAGS
_flags.define_workdir_flag()
_flags.define_strategy_flags()
_flags.define_precision_flag()
_flags.define_sampler_flags()
_flags.define_condition_flags()
flags.DEFINE_integer("checkpoint", None, "Step of the checkpoint. Default: the newest.")
flags.DEFINE_integer("num_samples", 64, "Number of samples.", lower_bound=1)
flags.DEFINE_integer("batch_size", 64, "Samples drawn at once, over all replicas.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Seed of the samples.", lower_bound=0, upper_bound=2**32 - 1)
_flags.define_path("out", None, "The .npz file to write.")
_flags.define_path("encode", None, "With --sampler=ddim: an .npz of `samples` to encode and decode.")
_flags.define_path("png", None, "PNG to write a grid of the samples to.")


def _check() -> None:
    _flags.check_measured_run()
    _flags.require_flags("out")
    _flags.check_extension("out", ".npz")
    _flags.check_extension("png", ".png")
    if FLAGS.encode and (FLAGS.sampler != "ddim" or FLAGS.ddim_eta):
        raise InputError("--encode needs --sampler=ddim without --ddim_eta: only that can run backwards")


_program.parse_flags(__name__, _check)

from diffusion_tf import figures
from diffusion_tf.evaluation.scores import file_images
from diffusion_tf.reports import captions
from diffusion_tf.samplers import Sampler, ddim_inversion
from diffusion_tf.storage import checkpoints
from diffusion_tf.storage.files import check_writable, write_file
from diffusion_tf.storage.npz_files import write_npz
from diffusion_tf.storage.resumable import ResumableBatches
from diffusion_tf.trained_model import TrainedModel

from ._measured_run import MeasuredRun


def _encode(trained: TrainedModel, steps: int, condition: Condition) -> dict[str, np.ndarray]:
    """The latents of the images in --encode, and the samples that they decode to; without --label, without labels."""
    file = file_images(FLAGS.encode, trained.preset.image_shape)
    images = file.pixels(0, file.count)
    latents, samples = ddim_inversion(
        trained,
        images,
        steps=steps,
        spacing=FLAGS.sampler_spacing or "trailing",
        batch_size=FLAGS.batch_size,
        labels=NO_LABEL if FLAGS.label is None else condition.of_images(0, len(images)),
        guidance=condition.guidance,
    )
    rmse = np.sqrt(np.mean((samples.astype(np.float64) - images) ** 2))
    print(f"{len(images)} images to latents and back: RMSE {rmse:.3f} on [0, 255]")
    return {"samples": samples, "latents": latents}


def _sampled_batches(run: MeasuredRun, checkpoint: str, sampling: dict[str, Any]) -> ResumableBatches:
    """The finished batches of the samples that the flags ask for."""
    description = {"samples_of": checkpoints.load_digest(checkpoint), "compute_dtype": run.preset.precision, **sampling}
    return ResumableBatches(
        run.results.partial, description, num_examples=FLAGS.num_samples, batch_size=FLAGS.batch_size
    )


def main() -> None:
    run = MeasuredRun.from_flags()
    settings = _flags.sampler_from_flags(run.preset)
    classes = run.workdir.read_classes()
    condition = _flags.condition_from_flags(run.preset, classes)
    sampling = {"seed": FLAGS.seed, **settings.describe(run.preset), **condition.describe(run.preset)}
    step, checkpoint = run.find_checkpoint()
    for path in filter(None, (FLAGS.out, FLAGS.png)):
        check_writable(path)  # before the work, not after it
    trained = TrainedModel.from_checkpoint(run.preset, run.strategy, checkpoint)
    if FLAGS.encode:
        assert settings.steps
        arrays = _encode(trained, settings.steps, condition)
        write_npz(FLAGS.out, **arrays)
    else:
        batches = _sampled_batches(run, checkpoint, sampling)
        sampler = Sampler(trained, batch_size=FLAGS.batch_size, seed=FLAGS.seed, settings=settings, condition=condition)
        drawn = batches.compute(lambda first, count: {"samples": sampler.images(first, count)}, "sampling")
        arrays = {"samples": np.concatenate([batch["samples"] for batch in drawn])}
        write_npz(FLAGS.out, **arrays)
        batches.remove()
    samples = arrays["samples"]
    print(f"{len(samples)} samples of step {step}: {FLAGS.out}")
    if FLAGS.png:
        caption, grid = captions.caption(run.preset.dataset, step, sampling), figures.square_grid(samples)
        if FLAGS.encode:
            caption = (
                f"{run.preset.dataset}, checkpoint {step:,}, decoded from latents by ddim in {settings.steps} steps"
            )
        elif run.preset.num_classes:
            grid, legend = figures.class_grid(samples, condition.of_images(0, len(samples)), classes)
            caption += f"\n{legend}"
        write_file(FLAGS.png, figures.captioned_grids({caption: grid}))
        print(f"grid: {FLAGS.png}")


if __name__ == "__main__":
    _program.run(main)
