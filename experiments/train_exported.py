"""Trains by an exported train_loop under JAX, without TensorFlow, or resumes a run: for GPUs.

  python -m experiments.export --dataset=cifar10 --what=train_loop --precision=bfloat16 --out=DIR
  python -m experiments.train_exported DIR --workdir=runs/cifar10 --npz=cifar10.npz
  python -m experiments.train_exported DIR --workdir=runs/cifar10 --images=FOLDER

The first argument is the folder that `export` wrote; its program takes many steps in a call. The run's folder is as
`train` writes it: either program goes on from the other's checkpoints, and every other program reads them. The images
stay in memory; those of --npz come in the order in which `train` takes them. The same command resumes. How often a run
reports and saves is set when it is exported.
"""

from absl import flags

from diffusion_tf.data_settings import PRESETS_OWN

from . import _flags, _program

FLAGS = flags.FLAGS
_flags.define_workdir_flag()
_flags.define_data_flags(in_memory=True)
flags.DEFINE_integer("num_steps", None, "Training steps in total. Default: as in the export.", lower_bound=1)


def _check(_: str) -> None:
    _flags.require_flags("workdir")
    _flags.data_from_flags()


_program.parse_flags(__name__, _check, argument="the folder that `export --what=train_loop` wrote")

import dataclasses

from diffusion_tf.data.in_memory import load_images
from diffusion_tf.interop.exported_training import train_in_workdir
from diffusion_tf.interop.train_loop import TrainLoop
from diffusion_tf.progress_bar import print_line
from diffusion_tf.storage.workdir import Workdir


def main(folder: str) -> None:
    loop = TrainLoop(folder)
    preset = dataclasses.replace(loop.preset, num_steps=FLAGS.num_steps or loop.preset.num_steps)
    workdir = Workdir(FLAGS.workdir)
    data = _flags.data_from_flags(workdir.read_data() if workdir.holds_run() else PRESETS_OWN)
    images = load_images(preset, data)
    print_line(f"{images.name}: {len(images.images):,} images; compiling the program, which may take minutes")
    print_line(f"training on {loop.compile()}")
    train_in_workdir(loop, images, FLAGS.workdir, preset=preset, command=FLAGS.flags_into_string(), data=data)


if __name__ == "__main__":
    _program.run(main)
