"""Draws samples from a trained run with its EMA weights: by Algorithm 2, or in few steps by DDIM or DPM-Solver++.

  python -m experiments.sample --workdir=runs/digits --num_samples=100 --seed=1 --out=samples.npz --png=grid.png
  python -m experiments.sample --workdir=runs/digits --sampler=dpm_solver++ --sampler_steps=20 --out=samples.npz
  python -m experiments.sample --workdir=runs/digits --sampler=ddim --sampler_steps=200 --encode=a.npz --out=b.npz

Sample i depends on --seed and i alone: another batch size or number of replicas gives the same pictures, up to float
rounding. The file holds `samples`, uint8 [N, H, W, C].

--encode takes the `samples` of a file instead, runs DDIM from them to the latents that they would be drawn from and
back again, and writes `latents`, float32, beside the `samples` that they give.
"""

import numpy as np
from absl import flags

from diffusion_tf import figures
from diffusion_tf.errors import InputError
from diffusion_tf.evaluation.scores import file_images
from diffusion_tf.samplers import ddim_inversion, draw_samples
from diffusion_tf.storage.files import check_writable, write_file, write_npz
from diffusion_tf.trained_model import TrainedModel
from experiments import common

FLAGS = flags.FLAGS
common.define_workdir_flag()
common.define_strategy_flags()
common.define_precision_flag()
common.define_sampler_flags()
flags.DEFINE_integer("checkpoint", None, "The step of the checkpoint to sample from. Default: the newest.")
flags.DEFINE_integer("num_samples", 64, "How many samples to draw.", lower_bound=1)
flags.DEFINE_integer("batch_size", 64, "Samples drawn at once, over all replicas.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Seed of the samples.", lower_bound=0, upper_bound=2**32 - 1)
flags.DEFINE_string("out", None, "The .npz file to write.")
flags.DEFINE_string("encode", None, "With --sampler=ddim: an .npz of `samples` to run to latents and back.")
flags.DEFINE_string("png", None, "Also write a grid of the samples here.")


def _encode(trained: TrainedModel, steps: int) -> dict[str, np.ndarray]:
    """The images of --encode as latents, and what those decode to."""
    file = file_images(FLAGS.encode, trained.preset.image_shape)
    images = file.pixels(0, file.count)
    latents, samples = ddim_inversion(
        trained, images, steps=steps, spacing=FLAGS.sampler_spacing or "trailing", batch_size=FLAGS.batch_size
    )
    rmse = np.sqrt(np.mean((samples.astype(np.float64) - images) ** 2))
    print(f"{len(images)} images to latents and back: RMSE {rmse:.3f} on [0, 255]")
    return {"samples": samples, "latents": latents}


def main() -> None:
    common.require_flags("workdir", "out")
    if FLAGS.encode and (FLAGS.sampler != "ddim" or FLAGS.ddim_eta):
        raise InputError("--encode goes with --sampler=ddim and no --ddim_eta: only that can be run backwards")
    run = common.Run.from_flags()
    settings = common.sampler_from_flags(run)
    step, checkpoint = run.find_checkpoint()
    for path in filter(None, (FLAGS.out, FLAGS.png)):
        check_writable(path)  # before the work, not after it
    trained = TrainedModel.from_checkpoint(run.preset, run.strategy, checkpoint)
    if FLAGS.encode:
        assert settings.steps
        arrays = _encode(trained, settings.steps)
    else:
        samples = draw_samples(
            trained, num_samples=FLAGS.num_samples, batch_size=FLAGS.batch_size, seed=FLAGS.seed, settings=settings
        )
        arrays = {"samples": samples}
    write_npz(FLAGS.out, **arrays)
    samples = arrays["samples"]
    print(f"{len(samples)} samples of step {step}: {FLAGS.out}")
    if FLAGS.png:
        caption = f"{run.preset.dataset}, {len(samples)} samples of step {step}"
        write_file(FLAGS.png, figures.captioned_grids({caption: figures.square_grid(samples)}))
        print(f"grid: {FLAGS.png}")


if __name__ == "__main__":
    common.run(main)
