"""The training images of a run, opened without TensorFlow."""

import os
from typing import Protocol

import numpy as np

from diffusion_tf.data.cache_layout import cache_digest, cache_root, cached_files
from diffusion_tf.data.fitting import Fitting
from diffusion_tf.data.in_memory import digit_images, npz_images, read_pictures
from diffusion_tf.data.order import EpochShuffle
from diffusion_tf.data.picture_folder import find_split
from diffusion_tf.data.record_images import RecordImages, matching_files
from diffusion_tf.data_settings import DataSettings
from diffusion_tf.errors import ConfigError
from diffusion_tf.presets import Preset


class TrainingImages(Protocol):
    """Images of one shape that are read by their indices, in memory or from files."""

    @property
    def name(self) -> str:
        """What they are, for messages."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes; none without labels."""

    @property
    def shuffle(self) -> EpochShuffle:
        """How `train` shuffles them."""

    def take(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns images uint8 [..., H, W, C] by their indices, int [...], and their labels, int32 [...], if any.

        Raises:
          InputError: an image cannot be read; the message names it.
        """


def open_training_images(preset: Preset, data: DataSettings) -> TrainingImages:
    """Opens the training images of a run; pictures are read from the cache of `train`, if it is there, or into memory.

    Args:
      preset: the recipe, which states their shape and their classes.
      data: where they are: `images`, `npz` or `tfrecord`, or none of them for the digits.

    Raises:
      InputError: they cannot be read, do not fit the recipe or in memory, or need TensorFlow.
    """
    found = _open(preset, data)
    if preset.num_classes and len(found.classes) != preset.num_classes:
        raise ConfigError(
            "num_classes", f"={preset.num_classes} in the export, and {found.name} has {len(found.classes)} classes"
        )
    return found


def _open(preset: Preset, data: DataSettings) -> TrainingImages:
    if data.tfrecord:
        return RecordImages(matching_files(data.tfrecord), preset.image_shape, data.tfrecord)
    if data.npz:
        return npz_images(data.npz, "train", data.held_out, data.resize, lambda _: preset.image_shape)
    if data.images:
        fitting = Fitting(preset.image_shape, data.resize)
        pictures, name = find_split(data.images, "train", data.held_out), f"{data.images}, train"
        folder = os.path.join(cache_root(data.cache_dir), cache_digest(pictures, fitting))
        if files := cached_files(folder, len(pictures.keys)):
            return RecordImages(files, preset.image_shape, f"{name}, in the cache {folder}", pictures.classes)
        return read_pictures(pictures, name, fitting)
    if preset.dataset == "digits" and not data.names_images:
        return digit_images()
    raise ConfigError("images", ": name the training images by `images=FOLDER`, `npz=FILE` or `tfrecord=FILE_OR_GLOB`")
