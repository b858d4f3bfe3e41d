"""Draws samples from a trained run with its EMA weights: by Algorithm 2, or in few steps by DDIM or DPM-Solver++.

  python -m experiments.sample --workdir=runs/digits --num_samples=100 --seed=1 --out=samples.npz --png=grid.png
  python -m experiments.sample --workdir=runs/digits --sampler=dpm_solver++ --sampler_steps=20 --out=samples.npz

Sample i depends on --seed and i alone: another batch size or number of replicas gives the same pictures, up to float
rounding. The file holds `samples`, uint8 [N, H, W, C].
"""

from absl import flags

from diffusion_tf import figures
from diffusion_tf.files import check_writable, write_file, write_npz
from diffusion_tf.samplers import draw_samples
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
flags.DEFINE_string("png", None, "Also write a grid of the samples here.")


def main() -> None:
    common.require_flags("workdir", "out")
    run = common.Run.from_flags()
    settings = common.sampler_from_flags(run)
    step, checkpoint = run.find_checkpoint()
    for path in filter(None, (FLAGS.out, FLAGS.png)):
        check_writable(path)  # before the work, not after it
    trained = TrainedModel.from_checkpoint(run.preset, run.strategy, checkpoint)
    samples = draw_samples(
        trained, num_samples=FLAGS.num_samples, batch_size=FLAGS.batch_size, seed=FLAGS.seed, settings=settings
    )
    write_npz(FLAGS.out, samples=samples)
    print(f"{len(samples)} samples of step {step}: {FLAGS.out}")
    if FLAGS.png:
        caption = f"{run.preset.dataset}, {len(samples)} samples of step {step}"
        write_file(FLAGS.png, figures.captioned_grids({caption: figures.square_grid(samples)}))
        print(f"grid: {FLAGS.png}")


if __name__ == "__main__":
    common.run(main)
