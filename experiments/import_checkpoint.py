"""Makes a run of weights from elsewhere, to sample, measure, or train further; or writes a run for diffusers.

  python -m experiments.import_checkpoint --workdir=runs/cifar10 --dataset=cifar10 --format=tf1 \
      --source=diffusion_models_release/diffusion_cifar10_model/model.ckpt-790000
  python -m experiments.import_checkpoint --workdir=runs/church --dataset=lsun_church --format=diffusers \
      --source=ddpm-church-256
  python -m experiments.import_checkpoint --workdir=runs/cifar10 --export_diffusers=exported

tf1 is a checkpoint of the authors' program, with EMA; diffusers is a folder of a DDPMPipeline or a UNet2DModel in
safetensors. The preset, with its flags, says what they must be of. The workdir is new: whole afterwards, or absent.
"""

from absl import flags

from diffusion_tf.errors import InputError
from diffusion_tf.interop.diffusers import FORMATS, read_diffusers, write_diffusers
from diffusion_tf.interop.tf1 import read_tf1
from diffusion_tf.storage import checkpoints
from diffusion_tf.storage.files import new_folder
from diffusion_tf.storage.workdir import Workdir
from diffusion_tf.trained_model import load_ema
from diffusion_tf.unet import UNet
from experiments import common

FLAGS = flags.FLAGS
common.define_workdir_flag()
common.define_preset_flags()
flags.DEFINE_enum("format", None, FORMATS, "What --source is.")
flags.DEFINE_string("source", None, "The checkpoint's prefix (tf1), or the folder (diffusers).")
flags.DEFINE_string(
    "attention_head_dim",
    None,
    "Of a diffusers network whose configuration does not say: null for one head, which is all that there is here.",
)
flags.DEFINE_string("export_diffusers", None, "Write the EMA weights of --workdir into this new folder for diffusers.")
flags.DEFINE_integer("checkpoint", None, "With --export_diffusers: the step of the checkpoint. Default: the newest.")


def _import() -> None:
    common.require_flags("format")
    preset = common.preset_from_flags()
    with new_folder(FLAGS.workdir) as temporary:
        model = UNet.from_preset(preset)
        if FLAGS.format == "tf1":
            arrays = read_tf1(FLAGS.source, model)
        else:
            arrays = read_diffusers(FLAGS.source, preset, model, FLAGS.attention_head_dim)
        workdir = Workdir(temporary)
        # How many images it was trained on, no such file says.
        workdir.write_config(preset, None, FLAGS.flags_into_string())
        checkpoints.save(workdir.checkpoints, int(arrays["step"]), arrays)
    print(f"{FLAGS.source}, step {arrays['step']}: {FLAGS.workdir}")


def _export() -> None:
    workdir = Workdir(FLAGS.workdir)
    preset = workdir.read_preset()
    step, path = checkpoints.find(workdir.checkpoints, FLAGS.checkpoint)
    model = UNet.from_preset(preset)
    load_ema(model, path)
    weights = [v.numpy() for v in model.trainable_variables]
    write_diffusers(FLAGS.export_diffusers, preset, model.weight_names, weights)
    print(f"EMA weights of step {step} for diffusers: {FLAGS.export_diffusers}")


def main() -> None:
    common.require_flags("workdir")
    if bool(FLAGS.source) == bool(FLAGS.export_diffusers):
        raise InputError("give one of --source, to import, and --export_diffusers, to export")
    (_import if FLAGS.source else _export)()


if __name__ == "__main__":
    common.run(main)
