"""Trains a diffusion model (Algorithm 1), or resumes a run.

  python -m experiments.train --workdir=runs/digits
  python -m experiments.train --workdir=runs/mine --images=FOLDER --image_size=64
  python -m experiments.train --workdir=gs://bucket/cifar10 --dataset=cifar10 --data_dir=gs://bucket/tfds --tpu=local

On a TPU slice of several hosts, run serve_tpu on every worker, and on worker 0 also this program, with --tpu=slice and
with gs:// for workdir and data.

The same command resumes from the newest checkpoint. A folder with a run of another recipe is refused.
"""

import dataclasses
import json

from absl import flags

from diffusion_tf.budgets import Choices, parse_budget
from diffusion_tf.data_settings import PICTURES_SHAPE, DataSettings
from diffusion_tf.interop.tpu_slices import TOPOLOGIES
from diffusion_tf.presets import CHANGEABLE, PRETRAINED
from diffusion_tf.recipes import choose_preset
from diffusion_tf.runtime.slices import check_shared_paths, slice_workers

from . import _flags, _program

FLAGS = flags.FLAGS
_flags.define_workdir_flag()
_flags.define_strategy_flags()
_flags.define_preset_flags(" Without it, a recipe is chosen for the images of --images, --npz, --tfds or --tfrecord.")
_flags.define_data_flags()
_flags.define_path(
    "init_from",
    None,
    "Start a new run with the EMA weights of another run, by its folder or a checkpoint, or of a diffusers folder, or"
    f" with weights that ship with the package: {', '.join(PRETRAINED)}. Without --dataset, network and recipe are"
    " those of the source.",
)
flags.DEFINE_boolean(
    "allow_recipe_change",
    False,
    f"Let a run that is resumed go on with another {', '.join(CHANGEABLE)}; config.json records the change.",
)
flags.DEFINE_boolean(
    "conditional", False, "Condition the network on the classes of the images, which need labels. Sets --num_classes."
)
flags.DEFINE_string(
    "fit",
    None,
    "What a new run must fit in: cpu, minutes:30, the memory of a GPU as gpu24g, or a TPU slice"
    f" ({', '.join(TOPOLOGIES)}). Network, batch and steps without flags shrink until they do, and memory and time are"
    " predicted before training.",
)
flags.DEFINE_boolean(
    "dry_run", False, "Print the resolved configuration, the parameter count and what --fit predicts, and exit."
)


def _check() -> None:
    data = _flags.data_from_flags()
    if _chooses(data):
        choose_preset(_flags.image_shape(PICTURES_SHAPE), 1, **_flags.preset_overrides())
    elif FLAGS.init_from is None:
        _flags.preset_from_flags()
    if FLAGS.fit is not None:
        parse_budget(FLAGS.fit, list(TOPOLOGIES))
    if not FLAGS.dry_run:
        _flags.require_flags("workdir")
        check_shared_paths(slice_workers(FLAGS.tpu), {"workdir": FLAGS.workdir, "tfrecord": data.tfrecord})


def _chooses(data: DataSettings) -> bool:
    """Whether the recipe is to be chosen by the images."""
    return data.names_images and not (FLAGS["dataset"].present or FLAGS.init_from)


_program.parse_flags(__name__, _check)

from diffusion_tf.data import conditional_preset, open_images, open_source
from diffusion_tf.data.source import ImageSource
from diffusion_tf.diffusion_utils import GaussianDiffusion
from diffusion_tf.interop.fine_tuning import fine_tuning_preset, initial_weights
from diffusion_tf.pretrained import resolve
from diffusion_tf.runtime.strategies import make_strategy
from diffusion_tf.storage.workdir import Workdir
from diffusion_tf.training.loop import train_in_workdir
from diffusion_tf.unet import UNet

from ._fit import describe, fit


def main() -> None:
    # With several hosts, this must precede every other use of TensorFlow.
    strategy = None if FLAGS.dry_run and not FLAGS.fit else make_strategy(FLAGS.strategy, FLAGS.tpu)
    workdir = Workdir(FLAGS.workdir or "")
    if FLAGS.init_from:
        FLAGS["init_from"].value = resolve(FLAGS.init_from)
    run = workdir if FLAGS.workdir and workdir.holds_run() else None
    data = _data(run)
    choices, source = _choices(data, run)
    fitted = None
    if FLAGS.fit and not run:
        fitted = fit(choices, parse_budget(FLAGS.fit, list(TOPOLOGIES)), strategy)
    preset = fitted.preset if fitted else choices.choose()
    if source is None and (FLAGS.conditional or not FLAGS.dry_run):
        source = open_source(preset, "train", data)
    if FLAGS.conditional and source:
        preset = conditional_preset(preset, source)
    if FLAGS.dry_run:
        GaussianDiffusion.from_preset(preset)  # raises for settings that training would refuse
        print(json.dumps(dataclasses.asdict(preset), indent=2))
        print(f"parameters: {UNet.from_preset(preset).count_params():,}")
    if fitted or _chooses(data):
        print(describe(preset, source.num_examples if source else None, fitted), flush=True)
    if FLAGS.dry_run or not source:
        return
    train_in_workdir(
        preset,
        strategy,
        source,
        FLAGS.workdir,
        command=FLAGS.flags_into_string(),
        data=data,
        initial=initial_weights(workdir, FLAGS.init_from, preset),
        allow_recipe_change=FLAGS.allow_recipe_change,
    )


def _data(run: Workdir | None) -> DataSettings:
    """Where the images are; without a flag that names them, where a run that goes on has them."""
    if run and not FLAGS["dataset"].present:
        return _flags.data_from_flags(run.read_data())
    return _flags.data_from_flags()


def _choices(data: DataSettings, run: Workdir | None) -> tuple[Choices, ImageSource | None]:
    """The recipes to choose from, and the images if these decide.

    Without --dataset, it is the recipe of the run that is there, or else of --init_from, or else one for the images.
    """
    overrides = _flags.preset_overrides()
    if not FLAGS["dataset"].present:
        if run:
            return Choices.of(_flags.preset_from_flags(run.read_preset()), overrides), None
        if FLAGS.init_from:
            return Choices.of(fine_tuning_preset(FLAGS.init_from, overrides), overrides), None
    if not _chooses(data):
        return Choices.of(_flags.preset_from_flags(), overrides), None
    source = open_images(data, "train", _flags.image_shape)
    shape, num_images = source.image_shape, source.num_examples
    return Choices(lambda **changes: choose_preset(shape, num_images, **{**changes, **overrides}), overrides), source


if __name__ == "__main__":
    _program.run(main)
