"""Exports the programs of one replica as StableHLO, the sampler and the denoiser also as SavedModels.

  python -m experiments.export --dataset=cifar10 --what=train_step --per_replica_batch=16 --precision=bfloat16 --out=DIR
  python -m experiments.export --dataset=cifar10 --what=train_loop --replicas=8 --precision=bfloat16 --out=DIR
  python -m experiments.export --workdir=runs/cifar10 --what=denoiser --out=DIR

The folder gets WHAT.stablehlo.mlir, the weights as safetensors, and a manifest.json of arguments and results: names,
shapes, dtypes, the initial value of each argument, and which result feeds which argument. The weights are the EMA
weights of the run's checkpoint, or with --dataset initial ones. train_loop takes many training steps in a call; the
program train_exported trains with it, on as many devices as --replicas says. A SavedModel needs only TensorFlow: its
serving_default takes x_t [B, H, W, C] and t [B] (denoiser), or first_image (sampler).
"""

import os

from absl import flags

from diffusion_tf.errors import InputError
from diffusion_tf.interop import ANY_DEVICE, DEVICES, PROGRAMS, STEPS_PER_CALL

from . import _flags, _program

_BATCH_SIZE = 16  # of a replica

FLAGS = flags.FLAGS
_flags.define_workdir_flag()
_flags.define_preset_flags()
flags.DEFINE_integer("checkpoint", None, "With --workdir: step of the checkpoint. Default: the newest.")
flags.DEFINE_enum("what", None, PROGRAMS, "Program to export.")
flags.DEFINE_integer(
    "per_replica_batch",
    None,
    "Images that the program computes. Default: 16; for train_loop, the batch of the recipe divided by --replicas.",
    lower_bound=1,
)
flags.DEFINE_integer(
    "replicas",
    1,
    "train_loop: the devices that share the batch, over all machines, each with this program.",
    lower_bound=1,
)
flags.DEFINE_integer(
    "steps_per_call", STEPS_PER_CALL, "train_loop: the most training steps in a call of the program.", lower_bound=1
)
flags.DEFINE_enum(
    "device",
    ANY_DEVICE,
    DEVICES,
    "Device that the StableHLO is for; `tpu`: computed in ways that take fewer cycles there.",
)
_flags.define_path("out", None, "Folder to write.")


def _check() -> None:
    _flags.require_flags("what", "out")
    if FLAGS.batch_size is not None:
        raise InputError("--batch_size is for all replicas: give --per_replica_batch instead")
    for name in ("steps_per_call", "replicas"):
        if FLAGS[name].present and FLAGS.what != "train_loop":
            raise InputError(f"--{name} goes with --what=train_loop")
    if FLAGS.checkpoint is not None and FLAGS.workdir is None:
        raise InputError("--checkpoint goes with --workdir")
    if FLAGS.workdir is None:
        _flags.preset_from_flags()
    elif not FLAGS["dataset"].using_default_value:
        raise InputError("--dataset does not go with --workdir, whose run has its own preset")


_program.parse_flags(__name__, _check)

from diffusion_tf.interop import export
from diffusion_tf.storage import checkpoints
from diffusion_tf.storage.files import is_local
from diffusion_tf.storage.workdir import Workdir
from diffusion_tf.trained_model import load_ema
from diffusion_tf.unet import UNet


def main() -> None:
    if FLAGS.per_replica_batch or FLAGS.what != "train_loop":
        FLAGS["batch_size"].value = (FLAGS.per_replica_batch or _BATCH_SIZE) * FLAGS.replicas
    init_from = None
    if FLAGS.workdir is None:
        preset = _flags.preset_from_flags()
        model = UNet.from_preset(preset)
    else:
        workdir = Workdir(FLAGS.workdir)
        preset = _flags.preset_from_flags(workdir.read_preset())
        model = UNet.from_preset(preset)
        checkpoint = checkpoints.find(workdir.checkpoints, FLAGS.checkpoint)[1]
        load_ema(model, checkpoint)
        path = os.path.abspath(checkpoint) if is_local(checkpoint) else checkpoint
        init_from = {"path": path, "sha256": checkpoints.load_digest(checkpoint)}
    for path in export.write(
        FLAGS.out,
        FLAGS.what,
        preset,
        model,
        steps_per_call=FLAGS.steps_per_call,
        replicas=FLAGS.replicas,
        device=FLAGS.device,
        init_from=init_from,
    ):
        print(path)


if __name__ == "__main__":
    _program.run(main)
