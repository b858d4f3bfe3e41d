"""A trained run as the flags of a measurement name it."""

import dataclasses
import functools
import math
import os
from typing import Any

import tensorflow as tf
from absl import flags, logging

from diffusion_tf.data import open_source
from diffusion_tf.data.source import ImageReader, ImageSource, identity, label_reader
from diffusion_tf.errors import InputError
from diffusion_tf.evaluation.feature_networks import (
    DIGITS_SHAPE,
    FeatureNetwork,
    digits_network,
    inception_network,
    pixels_network,
)
from diffusion_tf.evaluation.scores import Images, source_images
from diffusion_tf.likelihood import Bound, count_levels, describe_levels, measure_bound
from diffusion_tf.presets import Preset
from diffusion_tf.pretrained import run_folder
from diffusion_tf.runtime.strategies import make_strategy
from diffusion_tf.storage import checkpoints
from diffusion_tf.storage.files import check_writable
from diffusion_tf.storage.resumable import ResumableBatches
from diffusion_tf.storage.workdir import Workdir
from diffusion_tf.trained_model import TrainedModel

from . import _flags

FLAGS = flags.FLAGS


@dataclasses.dataclass(frozen=True)
class MeasuredRun:
    """A run's folder and configuration, and where to compute."""

    workdir: Workdir
    preset: Preset
    strategy: tf.distribute.Strategy

    @classmethod
    def from_flags(cls) -> "MeasuredRun":
        """Reads --workdir or --pretrained, --precision, --strategy and --tpu.

        Raises:
          InputError: the folder holds no run, or that of pretrained weights cannot be made.
        """
        workdir = Workdir(run_folder(FLAGS.pretrained) if FLAGS.pretrained else FLAGS.workdir)
        preset = workdir.read_preset()
        if FLAGS.precision:
            preset = dataclasses.replace(preset, precision=FLAGS.precision)
        return cls(workdir, preset, make_strategy(FLAGS.strategy, FLAGS.tpu))

    @functools.cached_property
    def results(self) -> Workdir:
        """Where measurements keep their results: the run's folder, or a folder beside --out if that cannot be written.

        Raises:
          InputError: the run's folder cannot be written, and there is no --out.
        """
        try:
            check_writable(os.path.join(self.workdir.path, "results"))
            return self.workdir
        except InputError as error:
            if not FLAGS.out:
                raise InputError(f"{error}: --out puts the results elsewhere") from error
            name = os.path.basename(os.path.abspath(self.workdir.path))
            results = Workdir(os.path.join(os.path.dirname(FLAGS.out.rstrip("/")), f"{name}.results"))
            logging.warning("%s: %s keeps what belongs there", error, results.path)
            return results

    def find(self, path: str) -> str:
        """`path` in the run's folder if it exists, else the same in `results`."""
        return path if tf.io.gfile.exists(path) else self.results.path + path.removeprefix(self.workdir.path)

    def find_checkpoint(self) -> tuple[int, str]:
        """(step, path) of the checkpoint that --checkpoint names; by default of the newest.

        Raises:
          InputError: there is none, or the file is not a checkpoint.
        """
        step, path = checkpoints.find(self.workdir.checkpoints, FLAGS.checkpoint)
        checkpoints.load_manifest(path)  # before the work, not after it
        return step, path

    def sampled_batches(self, checkpoint: str, sampling: dict[str, Any], num_samples: int) -> ResumableBatches:
        """The finished batches of samples of a checkpoint; `sampling` is what else they depend on."""
        description = {"samples_of": checkpoints.load_digest(checkpoint), "compute_dtype": self.preset.precision}
        return ResumableBatches(
            self.results.partial, description | sampling, num_examples=num_samples, batch_size=FLAGS.batch_size
        )

    def open_source(self, split: str) -> ImageSource:
        """The images of a split of the run's data, from where the flags or the run say."""
        return open_source(self.preset, split, _flags.data_from_flags(self.workdir.read_data()))

    def split_images(self, split: str, at_most: int) -> Images:
        """The first `at_most` images of a split, to compare samples with."""
        source = self.open_source(split)
        return source_images(source, self.preset.dataset, split, min(at_most, source.num_examples))

    def feature_network(self, name: str, resize: str | None = None) -> FeatureNetwork:
        """The network whose features compare images: `inception` (--inception), `digits` or `pixels`.

        Args:
          name: the network.
          resize: what `inception_network` takes.

        Raises:
          InputError: it cannot be loaded, or does not take images of this shape.
        """
        if name == "inception":
            return inception_network(FLAGS.inception, self.strategy, resize)
        if name == "digits" and self.preset.image_shape != DIGITS_SHAPE:
            raise InputError(f"--features=digits takes 8x8 digits, not images {self.preset.image_shape}")
        return digits_network() if name == "digits" else pixels_network(self.preset.image_shape)

    def measure_bound(self, num_timesteps_estimate: int | None = None) -> tuple[Bound, dict[str, Any]]:
        """The bound that `define_bound_flags` asks for, and what it was measured on, as JSON values."""
        step, checkpoint = self.find_checkpoint()
        source = self.open_source(FLAGS.split)
        num_images = min(FLAGS.num_images or source.num_examples, source.num_examples)
        reader, read_labels = ImageReader(source), None
        if self.preset.num_classes and FLAGS.labels:
            if source.label is None:
                raise InputError(f"{source.name} has no labels, which the run is conditioned on: give --nolabels")
            read_labels = label_reader(source)
        bound = measure_bound(
            TrainedModel.from_checkpoint(self.preset, self.strategy, checkpoint),
            reader,
            num_images=num_images,
            batch_size=FLAGS.batch_size,
            seed=FLAGS.seed,
            partial=self.results.partial,
            subject={"checkpoint": checkpoints.load_digest(checkpoint), **identity(source)},
            read_labels=read_labels,
            num_timesteps_estimate=num_timesteps_estimate,
        )
        levels = count_levels(reader, num_images)
        subject = {"dataset": self.preset.dataset, "images": source.name, "split": FLAGS.split}
        sizes = {"num_images": num_images, "levels": levels, "uniform_code_bits_per_dim": math.log2(levels)}
        notes = {"bits_per_dim": describe_levels(levels)} if levels < 256 else {}
        if read_labels:
            subject["given"] = "labels"
        return bound, {**subject, **sizes, "step": step, "seed": FLAGS.seed, "notes": notes}


def print_notes(notes: dict[str, str]) -> None:
    """Prints what to know about numbers, below their table."""
    for name, note in notes.items():
        print(f"  {name}: {note}")
