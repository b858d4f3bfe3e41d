"""Trains a diffusion model (Algorithm 1), or resumes a run.

  python -m experiments.train --workdir=runs/digits
  python -m experiments.train --workdir=runs/mine --images=FOLDER --image_size=64
  python -m experiments.train --workdir=gs://bucket/cifar10 --dataset=cifar10 --data_dir=gs://bucket/tfds --tpu=local

The same command resumes from the newest checkpoint. A folder with a run of another recipe is refused.
"""

import dataclasses
import json

from absl import flags

from diffusion_tf.data_settings import DataSettings
from diffusion_tf.presets import CHANGEABLE, Preset
from diffusion_tf.recipes import choose_preset

from . import _flags, _program

FLAGS = flags.FLAGS
_flags.define_workdir_flag()
_flags.define_strategy_flags()
_flags.define_preset_flags(" Without it, a recipe is chosen for the images of --images, --npz, --tfds or --tfrecord.")
_flags.define_data_flags()
_flags.define_path(
    "init_from",
    None,
    "Start a new run with the EMA weights of another run, by its folder or a checkpoint, or of a diffusers folder."
    " Without --dataset, network and recipe are those of the source.",
)
flags.DEFINE_boolean(
    "allow_recipe_change",
    False,
    f"Let a run that is resumed go on with another {', '.join(CHANGEABLE)}; config.json records the change.",
)
flags.DEFINE_boolean(
    "conditional", False, "Condition the network on the classes of the images, which need labels. Sets --num_classes."
)
flags.DEFINE_boolean("dry_run", False, "Print the resolved configuration and the parameter count, and exit.")


def _check() -> None:
    data = _flags.data_from_flags()
    if _chooses(data):
        choose_preset(_flags.image_shape((64, 64, 3)), 1, **_flags.preset_overrides())
    elif FLAGS.init_from is None:
        _flags.preset_from_flags()
    if not FLAGS.dry_run:
        _flags.require_flags("workdir")


def _chooses(data: DataSettings) -> bool:
    """Whether the recipe is to be chosen by the images."""
    return data.names_images and not (FLAGS["dataset"].present or FLAGS.init_from)


_program.parse_flags(__name__, _check)

from diffusion_tf.data import conditional_preset, open_images, open_source
from diffusion_tf.data.source import ImageSource
from diffusion_tf.diffusion_utils import GaussianDiffusion
from diffusion_tf.interop.fine_tuning import fine_tuning_preset, initial_weights
from diffusion_tf.runtime.strategies import make_strategy
from diffusion_tf.storage.workdir import Workdir
from diffusion_tf.training.loop import train_in_workdir
from diffusion_tf.unet import UNet


def main() -> None:
    data = _data()
    if FLAGS.dry_run:
        preset, _ = _preset_and_source(data)
        GaussianDiffusion.from_preset(preset)  # raises for settings that training would refuse
        print(json.dumps(dataclasses.asdict(preset), indent=2))
        print(f"parameters: {UNet.from_preset(preset).count_params():,}")
        return
    # With several hosts, this must precede every other use of TensorFlow.
    strategy = make_strategy(FLAGS.strategy, FLAGS.tpu)
    preset, source = _preset_and_source(data)
    train_in_workdir(
        preset,
        strategy,
        source or open_source(preset, "train", data),
        FLAGS.workdir,
        command=FLAGS.flags_into_string(),
        data=data,
        initial=initial_weights(Workdir(FLAGS.workdir), FLAGS.init_from, preset),
        allow_recipe_change=FLAGS.allow_recipe_change,
    )


def _data() -> DataSettings:
    """Where the images are; without a flag that names them, where a run that goes on has them."""
    workdir = Workdir(FLAGS.workdir or "")
    goes_on = FLAGS.workdir and not FLAGS["dataset"].present and workdir.holds_run()
    return _flags.data_from_flags(workdir.read_data()) if goes_on else _flags.data_from_flags()


def _preset_and_source(data: DataSettings) -> tuple[Preset, ImageSource | None]:
    """The recipe, and the images if it depends on them."""
    preset, source = _recipe(data)
    if FLAGS.conditional:
        source = source or open_source(preset, "train", data)
        preset = conditional_preset(preset, source)
    return preset, source


def _recipe(data: DataSettings) -> tuple[Preset, ImageSource | None]:
    """The flags over the recipe to start from, and the images if it was chosen by them.

    Without --dataset, it is the recipe of the run that is there, or else of --init_from, or else one for the images.
    """
    workdir = Workdir(FLAGS.workdir or "")
    if not FLAGS["dataset"].present:
        if FLAGS.workdir and workdir.holds_run():
            return _flags.preset_from_flags(workdir.read_preset()), None
        if FLAGS.init_from:
            return fine_tuning_preset(FLAGS.init_from, _flags.preset_overrides()), None
    if not _chooses(data):
        return _flags.preset_from_flags(), None
    source = open_images(data, "train", _flags.image_shape)
    return choose_preset(source.image_shape, source.num_examples, **_flags.preset_overrides()), source


if __name__ == "__main__":
    _program.run(main)
