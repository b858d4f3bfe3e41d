"""TFRecords in the format of StyleGAN's dataset_tool.

A record holds `shape`, int64 [3] = (C, H, W), and `data`, the bytes of uint8 [C, H, W]. Records of this program may
also hold `label`, the index of the class as the bytes of a little-endian int32: the length of an integer would depend
on its value, and the records of a file have one length.
"""

import fnmatch
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from diffusion_tf.data.order import shuffle_buffer_size
from diffusion_tf.data.record_files import (
    OVERHEAD_BYTES,
    check_lengths,
    find_bad_records,
    other_lengths,
    read_runs,
)
from diffusion_tf.data.source import ImageSource, check_shape, shuffled
from diffusion_tf.errors import ConfigError

_FEATURES = {"shape": tf.io.FixedLenFeature([3], tf.int64), "data": tf.io.FixedLenFeature([], tf.string)}
_LABEL = {"label": tf.io.FixedLenFeature([], tf.string)}

_ADVICE = "repair the file, or tolerate bad records by `skip_bad_records=N`"


class _File(NamedTuple):
    """A TFRecord file whose records all have the length of the first.

    Attributes:
      path: the file.
      num_whole: complete records.
      record_bytes: bytes of a record in the file.
      rest_bytes: bytes of a last record that is cut off; 0 if there is none.
    """

    path: str
    num_whole: int
    record_bytes: int
    rest_bytes: int

    @property
    def num_records(self) -> int:
        return self.num_whole + (self.rest_bytes > 0)


def serialize(image: np.ndarray, label: int | None = None) -> bytes:
    """Returns a uint8 [C, H, W] image, and its label if it has one, as a record.

    Images of one shape give records of one length.
    """
    feature = {
        "shape": tf.train.Feature(int64_list=tf.train.Int64List(value=image.shape)),
        "data": tf.train.Feature(bytes_list=tf.train.BytesList(value=[image.tobytes()])),
    }
    if label is not None:
        encoded = np.array(label, "<i4").tobytes()
        feature["label"] = tf.train.Feature(bytes_list=tf.train.BytesList(value=[encoded]))
    example = tf.train.Example(features=tf.train.Features(feature=feature))
    return example.SerializeToString(deterministic=True)  # otherwise the order of the features is random


def tfrecord_source(
    pattern: str,
    image_shape: tuple[int, int, int],
    skip_bad_records: int,
    *,
    classes: tuple[str, ...] = (),
    advice: str = _ADVICE,
) -> ImageSource:
    """Opens the images of all files that match `pattern`.

    Args:
      pattern: a file, or a glob of files.
      image_shape: (H, W, C) of the images.
      skip_bad_records: the number of unreadable records to tolerate; each is replaced by the last good one before it.
        If it is not 0, all records are read now to find them.
      classes: the names of the classes, if the records have labels.
      advice: what to do about a damaged record, for messages.

    Raises:
      InputError: no file matches, a file is not such a TFRecord, or too many records are bad.
    """
    paths = _matching(pattern)
    decode = _decoder(image_shape)
    files = [_open(path, image_shape) for path in paths]
    bad = _tolerated(files, decode, skip_bad_records, advice)
    num_examples = sum(file.num_records for file in files)
    buffer_size = shuffle_buffer_size(num_examples, image_shape)
    runs = [
        (file.path, begin * file.record_bytes, count)
        for file, bad_here in zip(files, bad, strict=True)
        for begin, count in _runs(file.num_records, bad_here)
    ]

    def records(epoch_seed: tf.Tensor | None) -> tf.data.Dataset:
        shuffled_paths = shuffled(tf.data.Dataset.from_tensor_slices(paths), len(paths), epoch_seed)
        if not any(bad):
            return shuffled(tf.data.TFRecordDataset(shuffled_paths), buffer_size, epoch_seed)
        all_runs = tf.data.Dataset.from_tensor_slices(tuple(map(list, zip(*runs, strict=True))))
        in_order = shuffled_paths.flat_map(lambda path: read_runs(all_runs.filter(lambda of, *_: of == path)))
        return shuffled(in_order, buffer_size, epoch_seed)

    # What `records` gives, without reading: the number of each record among those of all files.
    starts = np.cumsum([0, *(file.num_records for file in files)])

    def places(epoch_seed: tf.Tensor | None) -> tf.data.Dataset:
        numbers = tf.data.Dataset.range(len(files))
        in_order = shuffled(numbers, len(files), epoch_seed).flat_map(
            lambda file: tf.data.Dataset.range(tf.gather(starts, file), tf.gather(starts, file + 1))
        )
        return shuffled(in_order, buffer_size, epoch_seed)

    def find_bad() -> str | None:
        for path in paths:
            for text in find_bad_records(path, decode, limit=1).values():
                return f"{text}: {advice}"
        return None

    num_bad = sum(map(len, bad))
    return ImageSource(
        pattern,
        num_examples,
        records,
        decode,
        image_shape,
        label=_decode_label if classes else None,
        classes=classes,
        find_bad=find_bad,
        bad_records=num_bad,
        places=places,
        read=_reader(files, bad, starts),
    )


def _reader(
    files: Sequence[_File], bad: Sequence[Collection[int]], starts: np.ndarray
) -> Callable[[tf.Tensor], tf.Tensor]:
    """The function from the number of a record, among those of all files, to the record or what replaces a bad one.

    Args:
      files: the files.
      bad: the indices of the bad records of each file.
      starts: the number of each file's first record, and that of all records.
    """
    replaced = {}
    for file, bad_here, start in zip(files, bad, starts, strict=False):
        index = 0
        for begin, count in _runs(file.num_records, bad_here):
            if begin != index:
                replaced[start + index] = start + begin
            index += count
    paths, record_bytes = [file.path for file in files], [file.record_bytes for file in files]

    def read(number: tf.Tensor) -> tf.Tensor:
        for one, other in replaced.items():
            number = tf.where(number == one, other, number)
        file = tf.searchsorted(starts, [number], side="right")[0] - 1
        offset = (number - tf.gather(starts, file)) * tf.gather(np.array(record_bytes, np.int64), file)
        run = tf.data.Dataset.from_tensors((tf.gather(paths, file), offset, 1))
        return read_runs(run).get_single_element()

    return read


def first_shape(pattern: str) -> tuple[int, int, int]:
    """(H, W, C) of the first image of the files that match `pattern`.

    Raises:
      InputError: no file matches, or the first is not such a TFRecord.
    """
    return _first_record(_matching(pattern)[0])[1]


def _matching(pattern: str) -> list[str]:
    """The files that a pattern names; what exists under the name of the pattern, or of its folder, is no pattern.

    Raises:
      ConfigError: there are none.
    """
    expanded = os.path.expanduser(pattern)
    folder, name = os.path.split(expanded)
    if tf.io.gfile.exists(expanded):
        return [expanded]
    if tf.io.gfile.isdir(folder):
        paths = [os.path.join(folder, file) for file in fnmatch.filter(tf.io.gfile.listdir(folder), name)]
    else:
        paths = tf.io.gfile.glob(expanded)
    if not paths:
        raise ConfigError("tfrecord", f"={pattern} matches no file")
    return sorted(paths)


def _decoder(image_shape: tuple[int, int, int]) -> Callable[[tf.Tensor], tf.Tensor]:
    """Returns the function from a record to its image, uint8 [H, W, C]."""
    height, width, channels = image_shape

    def decode(record: tf.Tensor) -> tf.Tensor:
        example = tf.io.parse_single_example(record, _FEATURES)
        wanted = tf.constant([channels, height, width], tf.int64)
        with tf.control_dependencies([tf.debugging.assert_equal(example["shape"], wanted, "its shape is another")]):
            image = tf.reshape(tf.io.decode_raw(example["data"], tf.uint8), [channels, height, width])
        return tf.transpose(image, [1, 2, 0])

    return decode


def _decode_label(record: tf.Tensor) -> tf.Tensor:
    """The label of a record, int32."""
    return tf.io.decode_raw(tf.io.parse_single_example(record, _LABEL)["label"], tf.int32)[0]


def _open(path: str, image_shape: tuple[int, int, int]) -> _File:
    """Checks the first record of a file, and counts the records by its length.

    Raises:
      InputError: the file is not a StyleGAN TFRecord of images of this shape.
    """
    record_bytes, shape, num_pixel_bytes = _first_record(path)
    check_shape(f"`tfrecord={path}`", shape, image_shape)
    if num_pixel_bytes != np.prod(image_shape):
        raise ConfigError("tfrecord", f"={path}: record 0 holds {num_pixel_bytes} bytes, not uint8 pixels")
    num_whole, rest_bytes = divmod(tf.io.gfile.stat(path).length, record_bytes)
    return _File(path, num_whole, record_bytes, rest_bytes)


def _first_record(path: str) -> tuple[int, tuple[int, int, int], int]:
    """The first record of a file: its bytes in the file, the (H, W, C) that it states, and the bytes of its pixels.

    Raises:
      InputError: the file is not a StyleGAN TFRecord.
    """
    if tf.io.gfile.isdir(path):
        raise ConfigError(
            "tfrecord", f"={path} is a folder: name the .tfrecords files that StyleGAN's dataset_tool makes of it"
        )
    try:
        size = tf.io.gfile.stat(path).length
        with tf.io.gfile.GFile(path, "rb") as start:
            stated = int.from_bytes(start.read(8), "little")
        # TensorFlow would allocate as many bytes as the record states.
        if size and stated + OVERHEAD_BYTES > size:
            raise tf.errors.DataLossError(None, None, "longer than its file")
        with tf.device(None):  # in this process, and not on a TPU slice's worker 0
            first = next(iter(tf.data.TFRecordDataset(path).take(1)), None)
        if first is None:
            raise ConfigError("tfrecord", f"={path} holds no records")
        example = tf.io.parse_single_example(first, _FEATURES)
    except (tf.errors.DataLossError, tf.errors.InvalidArgumentError, UnicodeDecodeError) as error:
        raise ConfigError(
            "tfrecord", f"={path} is not a StyleGAN TFRecord (its first record is cut off, or lacks `shape` and `data`)"
        ) from error
    channels, height, width = map(int, example["shape"].numpy())
    return len(first.numpy()) + OVERHEAD_BYTES, (height, width, channels), len(example["data"].numpy())


def _tolerated(
    files: Sequence[_File], decode: Callable[[tf.Tensor], tf.Tensor], skip_bad_records: int, advice: str
) -> list[dict[int, str]]:
    """Returns the bad records of each file as {index: description}; none if none are tolerated.

    Raises:
      InputError: there are more than `skip_bad_records`.
    """
    if not skip_bad_records:
        for file in files:
            if file.rest_bytes:
                raise ConfigError(
                    "tfrecord",
                    f"={file.path} is truncated: record {file.num_whole} has {file.rest_bytes} of the"
                    f" {file.record_bytes} bytes of record 0",
                )
        check_lengths([file.path for file in files], advice)
        return [{} for _ in files]
    bad = [
        find_bad_records(
            file.path,
            decode,
            limit=skip_bad_records + 1,
            record_bytes=file.record_bytes,
            num_records=file.num_records,
            known=other_lengths(file.path, file.record_bytes),
        )
        for file in files
    ]
    texts = [text for bad_here in bad for text in bad_here.values()]
    if len(texts) > skip_bad_records:
        raise ConfigError(
            "skip_bad_records", f"={skip_bad_records}: there are more bad records: {'; '.join(texts[:5])}"
        )
    return bad


def _runs(num_records: int, bad: Collection[int]) -> Iterator[tuple[int, int]]:
    """Yields (first, count) of the records to read: a bad one is replaced by the last good one before it, if any."""
    good = next((i for i in range(num_records) if i not in bad), 0)
    begin = 0
    for index in sorted(bad):
        if index > begin:
            yield begin, index - begin
            good = index - 1
        yield good, 1
        begin = index + 1
    if begin < num_records:
        yield begin, num_records - begin
