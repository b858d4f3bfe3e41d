"""Training and test images as tf.data datasets of uint8 [H, W, C].

The order of the training images is a function of the seed and the step: each epoch is shuffled with its own seed while
the records are still encoded, and a resumed run skips to its place. Flips belong to the training step. Measurements
read the images of a split in the order of their records.

TensorFlow is imported when a source is opened: `data/in_memory.py` and `data/order.py` work without it.
"""

import dataclasses
from typing import TYPE_CHECKING

from diffusion_tf.data.digits import digits_source
from diffusion_tf.data.fitting import ChooseShape, Fitting
from diffusion_tf.data.picture_folder import find_split
from diffusion_tf.data_settings import PICTURES_SHAPE, PRESETS_OWN, DataSettings
from diffusion_tf.errors import ConfigError
from diffusion_tf.presets import OWN_IMAGES, Preset

if TYPE_CHECKING:
    from diffusion_tf.data.source import ImageSource


def open_source(
    preset: Preset,
    split: str = "train",
    data: DataSettings = PRESETS_OWN,
) -> "ImageSource":
    """Opens the images of a run.

    Args:
      preset: names the dataset and the shape of its images.
      split: train or test; ignored for StyleGAN TFRecords, where the files are the split.
      data: where the images are; default: the preset's own. If it tolerates bad records, all records are read now to
        find them.

    Raises:
      InputError: the data is missing, damaged or of another shape; the message names the setting and the file.
    """
    from diffusion_tf.data.tfds import TFDS_NAMES, tfds_source

    if data.names_images:
        return open_images(data, split, lambda _: preset.image_shape)
    if preset.dataset == "digits":
        return digits_source(split, preset.image_shape)
    if preset.dataset in TFDS_NAMES:
        return tfds_source(TFDS_NAMES[preset.dataset], split, data.data_dir, preset.image_shape)
    if preset.dataset == OWN_IMAGES:
        raise ConfigError(
            "dataset", f"={OWN_IMAGES} has no images of its own: name a folder of pictures by `images=FOLDER`"
        )
    raise ConfigError(
        "dataset", f"={preset.dataset} is read from StyleGAN TFRecords: name them by `tfrecord=FILE_OR_GLOB`"
    )


def open_images(data: DataSettings, split: str, choose_shape: ChooseShape) -> "ImageSource":
    """Opens the images that a setting names; prints a line about pictures and their cache.

    Args:
      data: names a folder of pictures, an .npz file, a TFDS dataset, or TFRecords.
      split: as for `open_source`.
      choose_shape: maps the images' own (H, W, C), PICTURES_SHAPE if their sizes differ, to that of the run.

    Raises:
      InputError: as `open_source`.
    """
    from diffusion_tf.data.arrays import npz_source
    from diffusion_tf.data.image_cache import cached_source
    from diffusion_tf.data.tfds import any_tfds_source
    from diffusion_tf.data.tfrecords import first_shape, tfrecord_source

    if data.tfrecord:
        return tfrecord_source(data.tfrecord, choose_shape(first_shape(data.tfrecord)), data.skip_bad_records)
    if data.npz:
        return npz_source(data.npz, split, data.held_out, data.resize, choose_shape)
    if data.tfds:
        return any_tfds_source(data, split, choose_shape)
    assert data.images
    return cached_source(
        find_split(data.images, split, data.held_out),
        f"{data.images}, {split}",
        Fitting(choose_shape(PICTURES_SHAPE), data.resize),
        cache_dir=data.cache_dir,
        skip_bad_images=data.skip_bad_records,
    )


def data_paths(preset: Preset, data: DataSettings) -> dict[str, str | None]:
    """The paths from which the images of a run are read, by the settings that name them; None where there is none."""
    from diffusion_tf.data.tfds import TFDS_NAMES

    in_tfds = data.tfds or (preset.dataset in TFDS_NAMES and not data.names_images)
    return {
        "npz": data.npz,
        "tfrecord": data.tfrecord,
        "data_dir": (data.data_dir or "~/tensorflow_datasets") if in_tfds else None,
        "cache_dir": (data.cache_dir or "~/.cache/diffusion_tf") if data.images else None,
    }


def conditional_preset(preset: Preset, source: "ImageSource") -> Preset:
    """`preset` with the classes of the images.

    Raises:
      ConfigError: the images have no labels, or the preset has another number of classes.
    """
    if source.label is None:
        raise ConfigError("conditional", f": {source.name} has no labels")
    if preset.num_classes:
        source.require_classes(preset.num_classes)
    return dataclasses.replace(preset, num_classes=len(source.classes))
