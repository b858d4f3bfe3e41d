"""Trains a diffusion model (Algorithm 1), or resumes a run.

  python -m experiments.train --workdir=runs/digits
  python -m experiments.train --workdir=gs://bucket/cifar10 --dataset=cifar10 --data_dir=gs://bucket/tfds --tpu=local

The same command resumes from the newest checkpoint. A folder with a run of another recipe is refused.
"""

import dataclasses
import json

from absl import flags

from diffusion_tf.presets import CHANGEABLE, Preset

from . import _flags, _program

FLAGS = flags.FLAGS
_flags.define_workdir_flag()
_flags.define_strategy_flags()
_flags.define_preset_flags()
_flags.define_data_flags()
flags.DEFINE_integer(
    "skip_bad_records", 0, "Number of bad records of --tfrecord to tolerate; others replace them.", lower_bound=0
)
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
flags.DEFINE_boolean("dry_run", False, "Print the resolved configuration and the parameter count, and exit.")


def _check() -> None:
    if FLAGS.init_from is None:
        _flags.preset_from_flags()
    _flags.data_from_flags()
    if not FLAGS.dry_run:
        _flags.require_flags("workdir")


_program.parse_flags(__name__, _check)

from diffusion_tf.data import open_source
from diffusion_tf.diffusion_utils import GaussianDiffusion
from diffusion_tf.interop.fine_tuning import fine_tuning_preset, initial_weights
from diffusion_tf.runtime.strategies import make_strategy
from diffusion_tf.storage.workdir import Workdir
from diffusion_tf.training.loop import train_in_workdir
from diffusion_tf.unet import UNet


def main() -> None:
    preset = _preset()
    if FLAGS.dry_run:
        GaussianDiffusion.from_preset(preset)  # raises for settings that training would refuse
        print(json.dumps(dataclasses.asdict(preset), indent=2))
        print(f"parameters: {UNet.from_preset(preset).count_params():,}")
        return
    # With several hosts, this must precede every other use of TensorFlow.
    strategy = make_strategy(FLAGS.strategy, FLAGS.tpu)
    data = _flags.data_from_flags()
    source = open_source(preset, "train", data)
    train_in_workdir(
        preset,
        strategy,
        source,
        FLAGS.workdir,
        command=FLAGS.flags_into_string(),
        data=data,
        initial=initial_weights(Workdir(FLAGS.workdir), FLAGS.init_from, preset),
        allow_recipe_change=FLAGS.allow_recipe_change,
    )


def _preset() -> Preset:
    """The flags over the preset that --dataset names; without it, over that of a fine-tuned run or of its source."""
    if not FLAGS["dataset"].present:
        workdir = Workdir(FLAGS.workdir or "")
        if FLAGS.workdir and workdir.holds_run() and workdir.read_init_from():
            return _flags.preset_from_flags(workdir.read_preset())
        if FLAGS.init_from:
            return fine_tuning_preset(FLAGS.init_from, _flags.preset_overrides())
    return _flags.preset_from_flags()


if __name__ == "__main__":
    _program.run(main)
