"""Imports weights from the authors' program or from diffusers as a run; or exports a run for diffusers.

  python -m experiments.import_checkpoint --workdir=runs/cifar10 --dataset=cifar10 --format=tf1 \
      --source=diffusion_models_release/diffusion_cifar10_model/model.ckpt-790000
  python -m experiments.import_checkpoint --workdir=runs/church --dataset=lsun_church --format=diffusers \
      --source=ddpm-church-256
  python -m experiments.import_checkpoint --workdir=runs/butterflies --format=diffusers --source=ddpm-butterflies-128
  python -m experiments.import_checkpoint --workdir=runs/cifar10 --export_diffusers=exported

tf1 is a checkpoint of the authors' program with EMA weights; diffusers is a folder with a DDPMPipeline or a UNet2DModel
in safetensors. The weights must fit the network of the preset; without --dataset, it is that of the diffusers folder.
The new run can be sampled, measured and trained on. The workdir must not exist; a failed import leaves none behind.
"""

from absl import flags

from diffusion_tf.errors import InputError
from diffusion_tf.interop import DTYPES, FORMATS
from diffusion_tf.presets import Preset

from . import _flags, _program

FLAGS = flags.FLAGS
_flags.define_workdir_flag()
_flags.define_preset_flags()
flags.DEFINE_enum("format", None, FORMATS, "Format of --source.")
_flags.define_path("source", None, "A checkpoint by its prefix, a file or its folder (tf1), or a folder (diffusers).")
_flags.define_path("export_diffusers", None, "New folder to write the EMA weights of --workdir to, for diffusers.")
flags.DEFINE_enum(
    "export_dtype",
    "float32",
    DTYPES,
    "With --export_diffusers: dtype of the kernels; half precision takes half the space.",
)
flags.DEFINE_integer("checkpoint", None, "With --export_diffusers: step of the checkpoint. Default: the newest.")


def _check() -> None:
    _flags.require_flags("workdir")
    if bool(FLAGS.source) == bool(FLAGS.export_diffusers):
        raise InputError("give one of --source, to import, and --export_diffusers, to export")
    if FLAGS["export_dtype"].present and not FLAGS.export_diffusers:
        raise InputError("--export_dtype goes with --export_diffusers")
    if FLAGS.source:
        _flags.require_flags("format")
        if FLAGS.format == "tf1" or FLAGS["dataset"].present:
            _flags.preset_from_flags()


_program.parse_flags(__name__, _check)

from diffusion_tf.interop.diffusers import check_size, read_diffusers, write_diffusers
from diffusion_tf.interop.diffusers_config import preset_from_folder
from diffusion_tf.interop.tf1 import read_tf1
from diffusion_tf.storage import checkpoints
from diffusion_tf.storage.files import new_folder
from diffusion_tf.storage.workdir import Workdir
from diffusion_tf.trained_model import load_ema
from diffusion_tf.unet import UNet


def _import() -> None:
    preset = _preset()
    with new_folder(FLAGS.workdir) as temporary:
        model = UNet.from_preset(preset)
        is_tf1 = FLAGS.format == "tf1"
        arrays = read_tf1(FLAGS.source, model) if is_tf1 else read_diffusers(FLAGS.source, preset, model)
        workdir = Workdir(temporary)
        # The files do not record the number of training images.
        workdir.write_config(preset, None, FLAGS.flags_into_string())
        checkpoints.save(workdir.checkpoints, int(arrays["step"]), arrays)
    print(f"{FLAGS.source}, step {arrays['step']}: {FLAGS.workdir}")


def _preset() -> Preset:
    """The preset that --dataset names; without it, that of the diffusers folder."""
    if FLAGS.format == "tf1" or FLAGS["dataset"].present:
        return _flags.preset_from_flags()
    preset = preset_from_folder(FLAGS.source, FLAGS.image_size or 0, FLAGS.image_width or 0)
    check_size(FLAGS.source, preset)
    return _flags.preset_from_flags(preset)


def _export() -> None:
    workdir = Workdir(FLAGS.workdir)
    preset = workdir.read_preset()
    step, path = checkpoints.find(workdir.checkpoints, FLAGS.checkpoint)
    model = UNet.from_preset(preset)
    load_ema(model, path)
    weights = [v.numpy() for v in model.trainable_variables]
    write_diffusers(FLAGS.export_diffusers, preset, model.weight_names, weights, FLAGS.export_dtype)
    print(f"EMA weights of step {step} for diffusers: {FLAGS.export_diffusers}")


def main() -> None:
    (_import if FLAGS.source else _export)()


if __name__ == "__main__":
    _program.run(main)
