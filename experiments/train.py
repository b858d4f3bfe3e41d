"""Trains a diffusion model (Algorithm 1), or resumes a run.

  python -m experiments.train --workdir=runs/digits
  python -m experiments.train --workdir=gs://bucket/cifar10 --dataset=cifar10 --data_dir=gs://bucket/tfds --tpu=local

The same command resumes from the newest checkpoint. A folder with a run of another recipe is refused.
"""

import dataclasses
import json

from absl import flags

from diffusion_tf.presets import CHANGEABLE

from . import _flags, _program

FLAGS = flags.FLAGS
_flags.define_workdir_flag()
_flags.define_strategy_flags()
_flags.define_preset_flags()
_flags.define_data_flags()
flags.DEFINE_integer(
    "skip_bad_records", 0, "Number of bad records of --tfrecord to tolerate; others replace them.", lower_bound=0
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
    _flags.preset_from_flags()
    _flags.data_from_flags()
    if not FLAGS.dry_run:
        _flags.require_flags("workdir")


_program.parse_flags(__name__, _check)

from diffusion_tf.data import conditional_preset, open_source
from diffusion_tf.diffusion_utils import GaussianDiffusion
from diffusion_tf.runtime.strategies import make_strategy
from diffusion_tf.training.loop import train_in_workdir
from diffusion_tf.unet import UNet


def main() -> None:
    preset, data = _flags.preset_from_flags(), _flags.data_from_flags()
    if FLAGS.dry_run:
        if FLAGS.conditional:
            preset = conditional_preset(preset, open_source(preset, "train", data))
        GaussianDiffusion.from_preset(preset)  # raises for settings that training would refuse
        print(json.dumps(dataclasses.asdict(preset), indent=2))
        print(f"parameters: {UNet.from_preset(preset).count_params():,}")
        return
    # With several hosts, this must precede every other use of TensorFlow.
    strategy = make_strategy(FLAGS.strategy, FLAGS.tpu)
    source = open_source(preset, "train", data)
    if FLAGS.conditional:
        preset = conditional_preset(preset, source)
    train_in_workdir(
        preset,
        strategy,
        source,
        FLAGS.workdir,
        command=FLAGS.flags_into_string(),
        data=data,
        allow_recipe_change=FLAGS.allow_recipe_change,
    )


if __name__ == "__main__":
    _program.run(main)
