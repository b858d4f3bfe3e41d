"""Draws samples from a trained run by ancestral sampling (Algorithm 2) with its EMA weights.

  python -m experiments.sample --workdir=runs/digits --num_samples=100 --seed=1 --out=samples.npz --png=grid.png

Sample i depends on --seed and i alone: another batch size or number of replicas gives the same pictures, up to float
rounding. The file holds `samples`, uint8 [N, H, W, C].
"""

import io

import numpy as np
import tqdm
from absl import flags

from diffusion_tf import checkpoints, figures
from diffusion_tf.diffusion_utils import GaussianDiffusion
from diffusion_tf.distribution import make_strategy
from diffusion_tf.errors import InputError
from diffusion_tf.presets import Preset
from diffusion_tf.samplers import Sampler
from diffusion_tf.train_state import load_ema
from diffusion_tf.unet import UNet
from diffusion_tf.workdir import Workdir, write_file
from experiments import common

FLAGS = flags.FLAGS


def define_flags() -> None:
    """The flags of this program."""
    common.define_workdir_flag()
    common.define_strategy_flags()
    flags.DEFINE_integer("checkpoint", None, "The step of the checkpoint to sample from. Default: the newest.")
    flags.DEFINE_integer("num_samples", 64, "How many samples to draw.")
    flags.DEFINE_integer("batch_size", 64, "Samples drawn at once, over all replicas.")
    flags.DEFINE_integer("seed", 0, "Seed of the samples, in [0, 2^32).")
    flags.DEFINE_string("out", None, "The .npz file to write.")
    flags.DEFINE_string("png", None, "Also write a grid of the samples here.")


def draw_samples(strategy, preset: Preset, checkpoint: str, *, num_samples: int, batch_size: int, seed: int) -> np.ndarray:
    """Samples uint8 [num_samples, H, W, C] from the EMA weights of a checkpoint, with a progress bar."""
    with strategy.scope():
        model = UNet.from_preset(preset)
    load_ema(model, checkpoint)
    sampler = Sampler(
        strategy,
        model,
        [v.value for v in model.trainable_variables],
        GaussianDiffusion.from_preset(preset),
        image_shape=preset.image_shape,
        batch_size=batch_size,
        seed=seed,
    )
    batches = []
    with tqdm.tqdm(total=num_samples, unit="sample", desc="sampling") as bar:
        for first in range(0, num_samples, batch_size):
            batches.append(sampler(first)[: num_samples - first])
            bar.update(len(batches[-1]))
    return np.concatenate(batches)


def find_checkpoint(workdir: Workdir, step: int | None) -> tuple[int, str]:
    """(step, path) of the checkpoint of `step`, or of the newest.

    Raises:
      InputError: there is none; the message lists those that there are.
    """
    steps = checkpoints.all_steps(workdir.checkpoints)
    if not steps or (step is not None and step not in steps):
        wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        raise InputError(f"--workdir={workdir.path} has {wanted}; there are: {', '.join(map(str, steps)) or 'none'}")
    step = steps[-1] if step is None else step
    return step, checkpoints.checkpoint_path(workdir.checkpoints, step)


def write_samples(path: str, samples: np.ndarray) -> None:
    """Writes an .npz whose key `samples` is uint8 [N, H, W, C]."""
    buffer = io.BytesIO()
    np.savez(buffer, samples=samples)
    write_file(path, buffer.getvalue())


def main() -> None:
    common.require_flags("workdir", "out")
    for name in ("num_samples", "batch_size"):
        if FLAGS[name].value <= 0:
            raise InputError(f"--{name}={FLAGS[name].value}: must be greater than 0")
    if not 0 <= FLAGS.seed < 2**32:
        raise InputError(f"--seed={FLAGS.seed}: must be in [0, 2^32)")
    workdir = Workdir(FLAGS.workdir)
    preset = workdir.read_preset()
    step, checkpoint = find_checkpoint(workdir, FLAGS.checkpoint)
    samples = draw_samples(
        make_strategy(FLAGS.strategy, FLAGS.tpu),
        preset,
        checkpoint,
        num_samples=FLAGS.num_samples,
        batch_size=FLAGS.batch_size,
        seed=FLAGS.seed,
    )
    write_samples(FLAGS.out, samples)
    print(f"{len(samples)} samples of step {step}: {FLAGS.out}")
    if FLAGS.png:
        caption = f"{preset.dataset}, {len(samples)} samples of step {step}"
        figures.write_png(FLAGS.png, figures.captioned_grids({caption: figures.square_grid(samples)}))
        print(f"grid: {FLAGS.png}")


if __name__ == "__main__":
    define_flags()
    common.run(main)
