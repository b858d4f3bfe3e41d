"""Exports what training and sampling run, for one replica, as StableHLO; sampler and denoiser also as a SavedModel.

  python -m experiments.export --dataset=cifar10 --what=train_step --per_replica_batch=16 --precision=bfloat16 --out=DIR
  python -m experiments.export --workdir=runs/cifar10 --what=denoiser --out=DIR

The folder then holds WHAT.stablehlo.mlir, the weights as safetensors, and a manifest.json that names arguments and
results, with their shapes and dtypes, what each argument starts as, and which result feeds which argument. Weights are
the EMA weights of the run's checkpoint, or with --dataset the initial ones. A SavedModel is loaded by TensorFlow alone:
its serving_default takes x_t [B, H, W, C] and t [B] (denoiser), or first_image (sampler).
"""

from absl import flags

from diffusion_tf.errors import InputError
from diffusion_tf.interop import export
from diffusion_tf.storage import checkpoints
from diffusion_tf.storage.workdir import Workdir
from diffusion_tf.trained_model import load_ema
from diffusion_tf.unet import UNet
from experiments import common

FLAGS = flags.FLAGS
common.define_workdir_flag()
common.define_preset_flags()
flags.DEFINE_integer("checkpoint", None, "With --workdir: the step of the checkpoint to use. Default: the newest.")
flags.DEFINE_enum("what", None, export.PROGRAMS, "The program.")
flags.DEFINE_integer("per_replica_batch", 16, "Images that it computes.", lower_bound=1)
flags.DEFINE_string("out", None, "The folder to write.")


def main() -> None:
    common.require_flags("what", "out")
    if FLAGS.batch_size is not None:
        raise InputError("--batch_size is of a whole run: the replica's images are --per_replica_batch")
    if FLAGS.checkpoint is not None and FLAGS.workdir is None:
        raise InputError("--checkpoint goes with --workdir")
    FLAGS.batch_size = FLAGS.per_replica_batch
    if FLAGS.workdir is None:
        preset = common.preset_from_flags()
        model = UNet.from_preset(preset)
    else:
        if not FLAGS["dataset"].using_default_value:
            raise InputError("--dataset is for a network without a run: leave it out with --workdir")
        workdir = Workdir(FLAGS.workdir)
        preset = common.preset_from_flags(workdir.read_preset())
        model = UNet.from_preset(preset)
        load_ema(model, checkpoints.find(workdir.checkpoints, FLAGS.checkpoint)[1])
    for path in export.write(FLAGS.out, FLAGS.what, preset, model):
        print(path)


if __name__ == "__main__":
    common.run(main)
