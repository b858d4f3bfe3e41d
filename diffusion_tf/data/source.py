"""Images as tf.data of uint8 [H, W, C]: the digits of scikit-learn, TFDS, and StyleGAN's TFRecords.

The order of the training images is a function of the seed and the step: each epoch is shuffled with a seed of its own,
while the records are still encoded, and a resumed run skips to its place. (Flips belong to the training step.)
Measurements read the images of a split in the order of their records.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_tf.errors import InputError
from diffusion_tf.storage.files import first_line

# What tf.data raises of damaged, missing or malformed records.
READ_ERRORS = (tf.errors.DataLossError, tf.errors.InvalidArgumentError, tf.errors.NotFoundError)

# Bounds the memory of shuffling; the encoded records are no larger than their pixels.
_SHUFFLE_BYTES = 2**30


@dataclasses.dataclass(frozen=True)
class ImageSource:
    """Where images come from.

    Attributes:
      name: what they are, for people to read.
      num_examples: images in one epoch.
      records: records(epoch_seed) is a dataset of one epoch's encoded images, shuffled by `epoch_seed`, an int64 scalar
        tensor, or in their order where it is None.
      decode: one encoded image to uint8 [H, W, C].
      image_shape: (H, W, C).
      find_bad: names the first record that cannot be read, and why; None where all can. It reads them all.
      bad_records: how many records cannot be read, and have others in their place.
    """

    name: str
    num_examples: int
    records: Callable[[tf.Tensor | None], tf.data.Dataset]
    decode: Callable[[tf.Tensor], tf.Tensor]
    image_shape: tuple[int, int, int]
    find_bad: Callable[[], str | None] = lambda: None
    bad_records: int = 0

    def read_error(self, error: Exception) -> InputError:
        """What to tell of one of READ_ERRORS: the file and the record."""
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
) -> tf.data.Dataset:
    """Endless batches uint8 [per_replica, H, W, C] of one worker, from training step `start_step` on.

    The global batch of step s is records s * batch_size ... of the shuffled stream, whatever the number of workers
    and replicas; worker w takes the w-th of its `workers` equal slices. Resuming reads, but does not decode, the part
    of one epoch that was already seen.
    """
    first = start_step * batch_size
    share = batch_size // workers
    epochs = tf.data.Dataset.range(first // source.num_examples, 2**31)
    return (
        epochs.flat_map(lambda epoch: source.records((seed << 31) + epoch))
        .skip(first % source.num_examples)
        .batch(batch_size)
        .map(lambda records: records[worker * share : (worker + 1) * share])
        .unbatch()
        .map(source.decode, num_parallel_calls=tf.data.AUTOTUNE)
        .batch(per_replica, drop_remainder=True, num_parallel_calls=tf.data.AUTOTUNE)
        .prefetch(tf.data.AUTOTUNE)
    )


class ImageReader:
    """Reads the images of a source in the order of their records; to go on from the last call, none is read twice."""

    def __init__(self, source: ImageSource):
        self._source = source
        self._images: Iterator[np.ndarray] = iter(())
        self._position = -1

    def __call__(self, first: int, count: int) -> np.ndarray:
        """Images first .. first + count - 1, uint8 [count, H, W, C].

        Raises:
          InputError: they cannot be read.
        """
        if first != self._position:
            images = self._source.records(None).skip(first).map(self._source.decode, tf.data.AUTOTUNE)
            self._images = images.prefetch(tf.data.AUTOTUNE).as_numpy_iterator()
        try:
            images = list(itertools.islice(self._images, count))
        except READ_ERRORS as error:
            raise self._source.read_error(error) from error
        if len(images) < count:
            raise InputError(f"{self._source.name} ends after {first + len(images)} images, and promised more")
        self._position = first + count
        return np.stack(images)


def identity(source: ImageSource) -> dict[str, Any]:
    """What tells the images of `source` from others of the same name: their number, and a digest of the first."""
    first = hashlib.sha256(ImageReader(source)(0, 1).tobytes()).hexdigest()
    return {"images": source.name, "num_examples": source.num_examples, "first_image_sha256": first}


def shuffled(dataset: tf.data.Dataset, buffer: int, seed: tf.Tensor | None) -> tf.data.Dataset:
    return dataset if seed is None else dataset.shuffle(buffer, seed=seed)


def shuffle_buffer(num_examples: int, image_shape: tuple[int, int, int]) -> int:
    return min(num_examples, _SHUFFLE_BYTES // int(np.prod(image_shape)))


def require_shape(where: str, found, wanted: tuple[int, int, int]) -> None:
    if tuple(found) != tuple(wanted):
        raise InputError(
            f"{where}: images are {tuple(found)}, the preset wants {tuple(wanted)} (height, width, channels)"
        )


def read_runs(runs: tf.data.Dataset) -> tf.data.Dataset:
    """The records of (file, offset, count): `count` of a TFRecord file from a byte on; -1 is all that follow."""

    def read(file, offset, count):
        # tf.data.TFRecordDataset has no offset.
        variant = tf.raw_ops.TFRecordDatasetV2(
            filenames=[file], compression_type="", buffer_size=2**18, byte_offsets=[tf.cast(offset, tf.int64)]
        )
        records = tf.data.experimental.from_variant(variant, tf.TensorSpec([], tf.string))
        return records.take(tf.cast(count, tf.int64))

    return runs.flat_map(read)


def bad_records(
    file: str, decode: Callable, *, at_most: int, record_bytes: int | None = None, num_records: int = 0
) -> dict[int, str]:
    """What is wrong with the records of a file, by their index: the first `at_most`, or one where lengths differ.

    Args:
      file: a TFRecord file.
      decode: makes a picture of a record, or raises one of READ_ERRORS.
      at_most: how many to look for.
      record_bytes: of each record in the file, if all have as many; it is what leads past a bad one.
      num_records: how many there should be: TensorFlow ends at a last one of a few bytes without a word.
    """
    bad: dict[int, str] = {}
    index = 0
    while len(bad) < at_most:
        rest = tf.data.Dataset.from_tensors((file, index * (record_bytes or 0), -1))
        images = read_runs(rest).map(decode, tf.data.AUTOTUNE).as_numpy_iterator()
        try:
            for _ in images:
                index += 1
            if index >= num_records:
                return bad
            bad[index] = f"{file}: record {index} (it is cut off)"
        except READ_ERRORS as error:
            bad[index] = f"{file}: record {index} ({_reason(error)})"
        if record_bytes is None:
            return bad
        index += 1
    return bad


def _reason(error: Exception) -> str:
    """What a reading error says, without TensorFlow's own places in it."""
    if isinstance(error, tf.errors.DataLossError):
        return "its bytes do not match their CRC, or are cut off"
    return "no picture of the wanted shape can be made of it"
