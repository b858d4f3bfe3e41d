"""Datasets of images that TensorFlow Datasets has prepared."""

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_tf.data.array_record_files import ArrayRecords
from diffusion_tf.data.fitting import ChooseShape, Fitting
from diffusion_tf.data.image_cache import cached_source
from diffusion_tf.data.image_folders import EncodedImages
from diffusion_tf.data.order import shuffle_buffer_size
from diffusion_tf.data.record_files import check_lengths, find_bad_records
from diffusion_tf.data.source import READ_ERRORS, ImageSource, check_shape, shuffled
from diffusion_tf.data_settings import PICTURES_SHAPE, DataSettings
from diffusion_tf.errors import ConfigError, InputError
from diffusion_tf.storage.files import first_line, is_local, list_folder
from diffusion_tf.storage.gfile import folder_of, is_bucket

TFDS_NAMES = {"cifar10": "cifar10", "cifar10_small": "cifar10", "celebahq256": "celeb_a_hq/256"}


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
    prepared = _Prepared(name, split, data_dir)
    check_shape(prepared.folder, prepared.shape, image_shape)
    return prepared.source(image_shape)


def any_tfds_source(data: DataSettings, split: str, choose_shape: ChooseShape) -> ImageSource:
    """Opens a split of any prepared TFDS dataset of images; those of another shape than the run's through the cache.

    Args:
      data: names the dataset by `tfds`.
      split: train or test; without a split of that name, validation is the test split.
      choose_shape: maps the images' (H, W, C), PICTURES_SHAPE if their sizes differ, to that of the run.

    Raises:
      InputError: the dataset is missing or incomplete, or its images cannot become those of the run.
    """
    assert data.tfds
    prepared = _Prepared(data.tfds, split, data.data_dir)
    height, width, channels = prepared.shape
    sizes = (height, width) if height and width else PICTURES_SHAPE[:2]
    image_shape = choose_shape((*sizes, channels or PICTURES_SHAPE[2]))
    if image_shape == prepared.shape:
        return prepared.source(image_shape)
    keys = [str(index) for index in range(prepared.num_examples)]
    return cached_source(
        _PreparedImages(prepared.folder, False, keys, setting="tfds", classes=prepared.classes, prepared=prepared),
        prepared.name,
        Fitting(image_shape, data.resize),
        cache_dir=data.cache_dir,
        skip_bad_images=data.skip_bad_records,
    )


class _Prepared:
    """A split of a prepared dataset of images.

    Attributes:
      name: the dataset with its version, and the split.
      folder: the folder of the version.
      shape: (H, W, C) of the images; None where they differ.
      classes: the names of the classes; none without labels.
      num_examples: the number of images.

    Raises:
      InputError: the dataset is missing or incomplete, or has no images or no such split.
    """

    def __init__(self, name: str, split: str, data_dir: str | None):
        import tensorflow_datasets as tfds  # takes seconds to import, and only TFDS data needs it

        self._builder, self.folder = _builder(name, data_dir)
        info = self._builder.info
        features, splits = dict((info.features or {}).items()), info.splits
        if "image" not in features or len(features["image"].shape) != 3 or features["image"].np_dtype != np.uint8:
            reason = f"{self.folder} has no images: this version of {name} is not for this program"
            raise ConfigError("data_dir", f": {reason}")
        if split == "test" and split not in splits and "validation" in splits:
            split = "validation"
        if split not in splits:
            raise ConfigError("split", f"={split}: {self.folder} has only {', '.join(splits)}")
        self.name = f"{name.partition(':')[0]}/{os.path.basename(self.folder)}, {split}"
        self.shape = features["image"].shape
        label = features.get("label")
        self.classes = tuple(label.names) if isinstance(label, tfds.features.ClassLabel) else ()
        self.num_examples = splits[split].num_examples
        self._split = split
        self._files = [os.fspath(file) for file in splits[split].filepaths]
        self._read_config = tfds.ReadConfig(try_autocache=False)  # a cache would not outlive the dataset of one epoch
        used = {"image": True, "label": True} if self.classes else {"image": True}
        self._decoders = tfds.decode.PartialDecoding(used, decoders={"image": tfds.decode.SkipDecoding()})
        self._array_records = None
        if info.file_format.value == "array_record":
            self._array_records = ArrayRecords(self._files)
        if info.file_format.value == "tfrecord":
            check_lengths(self._files, "prepare the dataset again")

    def examples(self, first: int = 0, stop: int | None = None) -> tf.data.Dataset:
        """The encoded `image`, and the `label` if there are labels, of examples first, ..., stop - 1; default: all."""
        if self._array_records:
            return self._array_records.dataset(first, stop).map(self._deserialize)
        split = self._split if stop is None else f"{self._split}[{first}:{stop}]"
        return self._builder.as_dataset(
            split=split, shuffle_files=False, decoders=self._decoders, read_config=self._read_config
        )

    def source(self, image_shape: tuple[int, int, int]) -> ImageSource:
        """The images as they are, of this shape."""
        buffer_size = shuffle_buffer_size(self.num_examples, image_shape)

        # A record is the encoded image, and with labels a pair of texts.
        def to_record(example: dict[str, tf.Tensor]) -> tf.Tensor:
            if not self.classes:
                return example["image"]
            return tf.stack([example["image"], tf.strings.as_string(example["label"])])

        def records(epoch_seed: tf.Tensor | None) -> tf.data.Dataset:
            return shuffled(self.examples().map(to_record), buffer_size, epoch_seed)

        def decode(record: tf.Tensor) -> tf.Tensor:
            encoded = record[0] if self.classes else record
            image = tf.io.decode_image(encoded, channels=image_shape[-1], expand_animations=False)
            return tf.ensure_shape(image, image_shape)

        def decode_serialized(record: tf.Tensor) -> tf.Tensor:
            return decode(to_record(self._deserialize(record)))

        def label(record: tf.Tensor) -> tf.Tensor:
            return tf.strings.to_number(record[1], tf.int32)

        def find_bad() -> str | None:
            if self._array_records:
                return self._array_records.find_bad(decode_serialized)
            for file in self._files:
                for text in find_bad_records(file, decode_serialized, limit=1).values():
                    return text
            return None

        return ImageSource(
            self.name,
            self.num_examples,
            records,
            decode,
            image_shape,
            label=label if self.classes else None,
            classes=self.classes,
            find_bad=find_bad,
            in_python=self._array_records is not None,
        )

    def _deserialize(self, record: tf.Tensor) -> dict[str, tf.Tensor]:
        features = self._decoders.extract_features(self._builder.info.features)
        return features.deserialize_example(record, decoders=self._decoders.decoders)


@dataclasses.dataclass(frozen=True)
class _PreparedImages(EncodedImages):
    """The encoded images of a prepared dataset; their keys are their numbers, and labels are read with them."""

    prepared: _Prepared | None = None

    def stamps(self) -> list[str]:
        """Returns nothing: a prepared dataset does not change, and its version is in its path."""
        return []

    @contextlib.contextmanager
    def reader(self) -> Iterator[Callable[[str], tuple[bytes, int | None]]]:
        """Opens the images, which are read in the order of their keys."""
        assert self.prepared
        first, last = int(self.keys[0]), int(self.keys[-1])
        examples = self.prepared.examples(first, last + 1).as_numpy_iterator()

        def read(_: str) -> tuple[bytes, int | None]:
            try:
                example = next(examples)
            except READ_ERRORS as error:
                raise InputError(first_line(error)) from error
            return example["image"], example.get("label")

        yield read


def _builder(name: str, data_dir: str | None) -> tuple[Any, str]:
    """Returns the builder of a prepared version, by default the newest, and its folder.

    Args:
      name: the dataset, NAME or NAME/CONFIG, and maybe :VERSION.
      data_dir: the folder of prepared datasets.
    """
    import tensorflow_datasets as tfds

    name, _, version = name.partition(":")
    data_dir = os.path.expanduser(data_dir or os.path.join("~", "tensorflow_datasets"))
    folders = _versions(data_dir, name)
    if not folders:
        near = next((place for place in _neighbors(data_dir) if _versions(place, name)), None)
        advice = (
            f", but {near} does: name that" if near else f": make it with `tfds build {name} --data_dir={data_dir}`"
        )
        raise ConfigError("data_dir", f"={data_dir} holds no prepared {name}{advice}")
    chosen = [folder for folder in folders if version in ("", os.path.basename(folder))]
    if not chosen:
        there = ", ".join(map(os.path.basename, folders))
        raise ConfigError("tfds", f"={name}:{version}: {data_dir} holds only version {there}")
    folder = max(chosen, key=_version)
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
        around = folder_of(around)
        if is_bucket(around):
            return
        yield around


def _version(folder: str) -> tuple[int, ...]:
    return tuple(map(int, os.path.basename(folder).split(".")))
