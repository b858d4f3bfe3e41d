"""Trains by an exported train_loop under JAX, without TensorFlow, or resumes a run: for GPUs and TPUs.

  python -m experiments.export --dataset=cifar10 --what=train_loop --replicas=8 --precision=bfloat16 --out=DIR
  python -m experiments.train_exported DIR --workdir=runs/cifar10 --npz=cifar10.npz
  python -m experiments.train_exported DIR --workdir=runs/lsun --tfrecord='lsun/*.tfrecords' --distributed

The first argument is the folder that `export` wrote; its program takes many steps in a call, on as many devices as
export's --replicas says. The run's folder is as `train` writes it: either program goes on from the other's checkpoints,
and every other program reads them. The images come in the order in which `train` takes them. The same command resumes.
How often a run reports and saves is set when it is exported.

With --distributed, every machine runs the same command, and reads its own share of the images. On a TPU slice and under
Slurm JAX finds the other processes; elsewhere --coordinator, --num_processes and --process_id name them. Process 0
writes the run's folder.
"""

import re

from absl import flags

from diffusion_tf.data_settings import PRESETS_OWN
from diffusion_tf.errors import InputError

from . import _flags, _program

_CLUSTER = ("coordinator", "num_processes", "process_id")

FLAGS = flags.FLAGS
_flags.define_workdir_flag()
_flags.define_data_flags(without_tensorflow=True)
flags.DEFINE_integer("num_steps", None, "Training steps in total. Default: as in the export.", lower_bound=1)
flags.DEFINE_bool(
    "distributed", False, "Train with the processes on other machines: those of --coordinator, a TPU slice or Slurm."
)
flags.DEFINE_string("coordinator", None, "With --distributed: HOST:PORT at which process 0 listens.")
flags.DEFINE_integer("num_processes", None, "With --distributed: the number of processes.", lower_bound=1)
flags.DEFINE_integer("process_id", None, "With --distributed: the number of this process, from 0.", lower_bound=0)


def _check(_: str) -> None:
    _flags.require_flags("workdir")
    _flags.data_from_flags()
    given = [name for name in _CLUSTER if FLAGS[name].value is not None]
    if given and not FLAGS.distributed:
        raise InputError(f"--{given[0]} goes with --distributed")
    if given:
        _flags.require_flags(*_CLUSTER)
        if FLAGS.process_id >= FLAGS.num_processes:
            raise InputError(f"--process_id={FLAGS.process_id} must be below --num_processes={FLAGS.num_processes}")
        if not re.fullmatch(r".+:\d{1,5}", FLAGS.coordinator):
            raise InputError(f"--coordinator={FLAGS.coordinator} must be HOST:PORT")


_program.parse_flags(__name__, _check, argument="the folder that `export --what=train_loop` wrote")

import contextlib
import dataclasses

from diffusion_tf.data.training_images import open_training_images
from diffusion_tf.interop.exported_training import train_in_workdir
from diffusion_tf.interop.processes import joined
from diffusion_tf.interop.train_loop import TrainLoop
from diffusion_tf.progress_bar import print_line
from diffusion_tf.storage.workdir import Workdir


def main(folder: str) -> None:
    loop = TrainLoop(folder)
    preset = dataclasses.replace(loop.preset, num_steps=FLAGS.num_steps or loop.preset.num_steps)
    workdir = Workdir(FLAGS.workdir)
    data = _flags.data_from_flags(workdir.read_data() if workdir.holds_run() else PRESETS_OWN)
    cluster = [FLAGS[name].value for name in _CLUSTER]
    with joined(*cluster) if FLAGS.distributed else contextlib.nullcontext():
        images = open_training_images(preset, data)
        count = images.shuffle.num_examples
        print_line(f"{images.name}: {count:,} images; compiling the program, which may take minutes")
        print_line(f"training on {loop.compile()}")
        train_in_workdir(loop, images, FLAGS.workdir, preset=preset, command=FLAGS.flags_into_string(), data=data)


if __name__ == "__main__":
    _program.run(main)
