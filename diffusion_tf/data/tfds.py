"""Datasets that TensorFlow Datasets has prepared: CIFAR-10 and CelebA-HQ."""

import os
import re
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from diffusion_tf.data.array_record_files import ArrayRecords
from diffusion_tf.data.record_files import check_lengths, find_bad_records
from diffusion_tf.data.source import ImageSource, check_shape, shuffle_buffer_size, shuffled
from diffusion_tf.errors import ConfigError
from diffusion_tf.storage.files import first_line, is_local, list_folder

TFDS_NAMES = {"cifar10": "cifar10", "celebahq256": "celeb_a_hq/256"}


def tfds_source(name: str, split: str, data_dir: str | None, image_shape: tuple[int, int, int]) -> ImageSource:
    """Opens a split of the newest prepared version of a TFDS dataset; downloads nothing.

    Args:
      name: the dataset, one of the values of TFDS_NAMES.
      split: the split.
      data_dir: the folder of prepared datasets; default ~/tensorflow_datasets.
      image_shape: (H, W, C) of the images.

    Raises:
      InputError: the dataset is missing or incomplete, or its images have another shape.
    """
    import tensorflow_datasets as tfds  # takes seconds to import, and only TFDS data needs it

    builder, folder = _newest_builder(name, data_dir)
    if "image" not in (builder.info.features or ()):
        raise ConfigError("data_dir", f": {folder} has no images: this version of {name} is not for this program")
    check_shape(folder, builder.info.features["image"].shape, image_shape)
    if split not in builder.info.splits:
        raise ConfigError("split", f"={split}: {folder} has only {', '.join(builder.info.splits)}")
    num_examples = builder.info.splits[split].num_examples
    files = [os.fspath(file) for file in builder.info.splits[split].filepaths]
    file_format = builder.info.file_format.value
    if file_format == "tfrecord":
        check_lengths(files, "prepare the dataset again")
    buffer_size = shuffle_buffer_size(num_examples, image_shape)
    encoded_images = {"image": tfds.decode.SkipDecoding()}
    array_records = ArrayRecords(files) if file_format == "array_record" else None

    def deserialize(record: tf.Tensor) -> dict[str, tf.Tensor]:
        return builder.info.features.deserialize_example(record, decoders=encoded_images)

    def examples() -> tf.data.Dataset:
        if array_records:
            return array_records.dataset().map(deserialize)
        return builder.as_dataset(
            split=split,
            shuffle_files=False,
            decoders=encoded_images,
            read_config=tfds.ReadConfig(try_autocache=False),  # a cache would not outlive the dataset of one epoch
        )

    def records(epoch_seed: tf.Tensor | None) -> tf.data.Dataset:
        return shuffled(examples().map(lambda example: example["image"]), buffer_size, epoch_seed)

    def decode(encoded: tf.Tensor) -> tf.Tensor:
        image = tf.io.decode_image(encoded, channels=image_shape[-1], expand_animations=False)
        return tf.ensure_shape(image, image_shape)

    def decode_record(record: tf.Tensor) -> tf.Tensor:
        return decode(deserialize(record)["image"])

    def find_bad() -> str | None:
        if array_records:
            return array_records.find_bad(decode_record)
        for file in files:
            for text in find_bad_records(file, decode_record, limit=1).values():
                return text
        return None

    label = f"{name}/{os.path.basename(folder)}, {split}"
    return ImageSource(label, num_examples, records, decode, image_shape, find_bad=find_bad)


def _newest_builder(name: str, data_dir: str | None) -> tuple[Any, str]:
    """Returns the builder of the newest prepared version, and its folder."""
    import tensorflow_datasets as tfds

    data_dir = os.path.expanduser(data_dir or os.path.join("~", "tensorflow_datasets"))
    folders = _versions(data_dir, name)
    if not folders:
        near = next((place for place in _neighbors(data_dir) if _versions(place, name)), None)
        advice = (
            f", but {near} does: name that" if near else f": make it with `tfds build {name} --data_dir={data_dir}`"
        )
        raise ConfigError("data_dir", f"={data_dir} holds no prepared {name}{advice}")
    folder = max(folders, key=_version)
    try:
        return tfds.builder_from_directory(folder), folder
    except (OSError, ValueError, tf.errors.OpError, tfds.core.DatasetNotFoundError) as error:
        raise ConfigError("data_dir", f": {folder} is not a complete TFDS dataset ({first_line(error)})") from error


def _versions(data_dir: str, name: str) -> list[str]:
    """The folders of the prepared versions of a dataset."""
    folder = os.path.join(data_dir, name)
    versions = [name.rstrip("/") for name in list_folder(folder)]
    return [os.path.join(folder, version) for version in versions if re.fullmatch(r"\d+\.\d+\.\d+", version)]


def _neighbors(data_dir: str) -> Iterator[str]:
    """Yields folders that a user may have meant: those in and around `data_dir`."""
    for name in sorted(list_folder(data_dir)):
        yield os.path.join(data_dir, name.rstrip("/"))
    around = os.path.abspath(data_dir) if is_local(data_dir) else data_dir.rstrip("/")
    for _ in range(3):  # DATASET/CONFIG/VERSION
        around = os.path.dirname(around)
        yield around


def _version(folder: str) -> tuple[int, ...]:
    return tuple(map(int, os.path.basename(folder).split(".")))
