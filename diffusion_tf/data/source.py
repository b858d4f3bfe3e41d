"""The interface of image sources, and the batches and images that are read from one."""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_tf.errors import ConfigError, InputError
from diffusion_tf.storage.files import first_line

# tf.data raises these for damaged, missing or malformed records; the last, because TensorFlow's message quotes bytes.
READ_ERRORS = (
    tf.errors.DataLossError,
    tf.errors.InvalidArgumentError,
    tf.errors.NotFoundError,
    UnicodeDecodeError,
)

_MAX_EPOCHS = 2**31


@dataclasses.dataclass(frozen=True)
class ImageSource:
    """A set of images of one shape.

    Attributes:
      name: the images' name in messages.
      num_examples: images in one epoch.
      records: records(epoch_seed) is a dataset of the encoded images of one epoch, shuffled by `epoch_seed`, an int64
        scalar, or in order if it is None.
      decode: maps an encoded image to uint8 [H, W, C].
      image_shape: (H, W, C).
      label: maps an encoded image to the index of its class, an int32 scalar; None: the images have no labels.
      classes: the names of the classes; none without labels.
      find_bad: reads all records and returns the name of the first one that cannot be read, with the reason; None if
        all can.
      bad_records: the number of unreadable records that are replaced by others.
      places: where each record is that `records` gives for the same seed, in the same order, as int64 scalars; None if
        records can only be read one after the other.
      read: maps a place to its record.
      in_python: whether Python reads the records, so that no other process can.
    """

    name: str
    num_examples: int
    records: Callable[[tf.Tensor | None], tf.data.Dataset]
    decode: Callable[[tf.Tensor], tf.Tensor]
    image_shape: tuple[int, int, int]
    label: Callable[[tf.Tensor], tf.Tensor] | None = None
    classes: tuple[str, ...] = ()
    find_bad: Callable[[], str | None] = lambda: None
    bad_records: int = 0
    places: Callable[[tf.Tensor | None], tf.data.Dataset] | None = None
    read: Callable[[tf.Tensor], tf.Tensor] = tf.identity
    in_python: bool = False

    def decode_with_label(self, record: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Maps an encoded image to uint8 [H, W, C] and its label, an int32 scalar."""
        assert self.label
        return self.decode(record), self.label(record)

    def require_classes(self, num_classes: int) -> None:
        """Checks that the images have labels of `num_classes` classes.

        Raises:
          ConfigError: they have none, or of another number of classes.
        """
        if self.label is None:
            raise ConfigError("num_classes", f"={num_classes}: {self.name} has no labels")
        if len(self.classes) != num_classes:
            raise ConfigError("num_classes", f"={num_classes}: {self.name} has {len(self.classes)} classes")

    def read_error(self, error: Exception) -> InputError:
        """Returns the error to raise for one of READ_ERRORS; it names the file and the record."""
        return InputError(f"{self.name} cannot be read: {self.find_bad() or first_line(error)}")


def training_batches(
    source: ImageSource,
    *,
    batch_size: int,
    per_replica: int,
    seed: int,
    start_step: int,
    worker: int = 0,
    workers: int = 1,
    with_labels: bool = False,
) -> tf.data.Dataset:
    """Returns endless batches for one worker: uint8 [per_replica, H, W, C], or pairs of these and labels int32.

    The global batch of step s is records s * batch_size, ... of the shuffled stream, however many workers and replicas
    share it: worker w takes the w-th of `workers` equal slices. Several workers read only their own records, if the
    source knows the places of all; then resuming reads none again. Otherwise each reads every record, and resuming
    reads, but does not decode, up to one epoch.

    Args:
      source: the images.
      batch_size: images in a global batch, divisible by `workers` * `per_replica`.
      per_replica: images in a batch of the dataset.
      seed: determines the order of the images.
      start_step: the training step of the first global batch.
      worker: the index of this worker.
      workers: the number of workers.
      with_labels: whether to pair the images with their labels, int32 [per_replica].
    """
    decode = source.decode_with_label if with_labels else source.decode
    first = start_step * batch_size
    share = batch_size // workers
    records, read = source.records, tf.identity
    if workers > 1 and source.places:
        records, read = source.places, source.read
    epochs = tf.data.Dataset.range(first // source.num_examples, _MAX_EPOCHS)
    return (
        epochs.flat_map(lambda epoch: records((seed << 31) + epoch))
        .skip(first % source.num_examples)
        .batch(batch_size)
        .map(lambda batch: batch[worker * share : (worker + 1) * share])
        .unbatch()
        .map(lambda record: decode(read(record)), num_parallel_calls=tf.data.AUTOTUNE)
        .batch(per_replica, drop_remainder=True, num_parallel_calls=tf.data.AUTOTUNE)
        .prefetch(tf.data.AUTOTUNE)
    )


class ImageReader:
    """Reads images of a source in the order of their records; consecutive calls read every record once."""

    def __init__(self, source: ImageSource):
        self._source = source
        self._images: Iterator[np.ndarray] = iter(())
        self._position = -1

    def __call__(self, first: int, count: int) -> np.ndarray:
        """Returns images first .. first + count - 1, uint8 [count, H, W, C].

        Raises:
          InputError: an image cannot be read, or there are too few.
        """
        if first != self._position:
            with tf.device(None):  # in this process, and not where a TPU slice's worker 0 computes
                images = self._source.records(None).skip(first).map(self._source.decode, tf.data.AUTOTUNE)
                self._images = images.prefetch(tf.data.AUTOTUNE).as_numpy_iterator()
        try:
            images = list(itertools.islice(self._images, count))
        except READ_ERRORS as error:
            raise self._source.read_error(error) from error
        if len(images) < count:
            raise InputError(f"{self._source.name} ends after {first + len(images)} images, but more were expected")
        self._position = first + count
        return np.stack(images)


def label_reader(source: ImageSource) -> ImageReader:
    """Reads the labels of a source, int32 [count], as `ImageReader` reads its images."""
    assert source.label
    return ImageReader(dataclasses.replace(source, decode=source.label))


def identity(source: ImageSource) -> dict[str, Any]:
    """Returns what distinguishes `source` from others of the same name, as JSON values: its size and first image."""
    first = hashlib.sha256(ImageReader(source)(0, 1).tobytes()).hexdigest()
    return {"images": source.name, "num_examples": source.num_examples, "first_image_sha256": first}


def shuffled(dataset: tf.data.Dataset, buffer_size: int, seed: tf.Tensor | None) -> tf.data.Dataset:
    """Returns the dataset shuffled by `seed`, or in order if `seed` is None."""
    return dataset if seed is None else dataset.shuffle(buffer_size, seed=seed)


def check_shape(where: str, found: Sequence[int], wanted: tuple[int, int, int]) -> None:
    """Raises InputError, which begins with `where`, if images [H, W, C] do not have the preset's shape."""
    if tuple(found) != tuple(wanted):
        raise InputError(
            f"{where}: images are {tuple(found)}, the preset wants {tuple(wanted)} (height, width, channels)"
        )
