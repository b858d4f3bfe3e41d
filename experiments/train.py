"""Trains a diffusion model (Algorithm 1), or goes on with a run that was stopped.

  python -m experiments.train --workdir=runs/digits
  python -m experiments.train --workdir=gs://bucket/cifar10 --dataset=cifar10 --data_dir=gs://bucket/tfds --tpu=local

The same command again goes on from the newest checkpoint. A folder that holds a run of another recipe is refused.
"""

import contextlib
import dataclasses
import json

from absl import flags

from diffusion_tf.data import open_source
from diffusion_tf.diffusion_utils import GaussianDiffusion
from diffusion_tf.runtime.strategies import make_strategy
from diffusion_tf.runtime.workers import is_chief
from diffusion_tf.storage.workdir import Workdir
from diffusion_tf.training.loop import train
from diffusion_tf.training.trainer import Trainer
from diffusion_tf.unet import UNet
from experiments import common

FLAGS = flags.FLAGS
common.define_workdir_flag()
common.define_strategy_flags()
common.define_preset_flags()
common.define_data_flags()
flags.DEFINE_integer(
    "skip_bad_records", 0, "So many records of --tfrecord may be bad: each has another in its place.", lower_bound=0
)
flags.DEFINE_boolean("dry_run", False, "Print the resolved configuration and the parameter count, and stop.")


def main() -> None:
    preset = common.preset_from_flags()
    if FLAGS.dry_run:
        GaussianDiffusion.from_preset(preset)  # refuses what training would
        print(json.dumps(dataclasses.asdict(preset), indent=2))
        print(f"parameters: {UNet.from_preset(preset).count_params():,}")
        return
    common.require_flags("workdir")
    # Before anything else touches TensorFlow, as several hosts need.
    strategy = make_strategy(FLAGS.strategy, FLAGS.tpu)
    source = open_source(
        preset, data_dir=FLAGS.data_dir, tfrecord=FLAGS.tfrecord, skip_bad_records=FLAGS.skip_bad_records
    )
    workdir = Workdir(FLAGS.workdir)
    workdir.refuse_other_run(preset, source.num_examples)
    trainer = Trainer(preset, strategy)
    with workdir.lock() if is_chief(strategy) else contextlib.nullcontext():
        if is_chief(strategy):
            workdir.write_config(preset, source.num_examples, FLAGS.flags_into_string())
        train(trainer, workdir, source)


if __name__ == "__main__":
    common.run(main)
