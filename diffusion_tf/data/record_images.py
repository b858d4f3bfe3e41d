"""StyleGAN TFRecords, or the cache of a folder of pictures, read by Python alone and in any order.

The records of a file have one length, so the place of each follows from its index, and a process reads only those that
it trains on. A record of the file is its length (8 bytes), the CRC of the length (4), a `tf.train.Example`, and the CRC
of that (4); `data/tfrecords.py` tells what the example holds.
"""

import fnmatch
import functools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from google.protobuf.message import DecodeError

from diffusion_tf.data.order import EpochShuffle, shuffle_buffer_size
from diffusion_tf.errors import ConfigError, DamagedFileError, InputError
from diffusion_tf.storage import gfile
from diffusion_tf.storage.files import first_line

_FILES_AT_ONCE = 32
_THREADS = 8
_SMALL_IMAGE = 2**15  # bytes: to read smaller ones takes less time than threads lose to Python's global lock
_HEADER_BYTES, _CRC_BYTES = 12, 4
_CRC_ADDEND = 0xA282EAD8  # of the masked CRC of TFRecords
# tensorflow/core/example/example.proto without the lists of floats; the entries of its map are messages on the wire.
_SCHEMA = """
name: "example.proto"
message_type { name: "BytesList" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_BYTES } }
message_type { name: "Int64List" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_INT64 } }
message_type {
  name: "Feature"
  field { name: "bytes_list" number: 1 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: "BytesList" }
  field { name: "int64_list" number: 3 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: "Int64List" }
}
message_type {
  name: "Entry"
  field { name: "key" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING }
  field { name: "value" number: 2 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: "Feature" }
}
message_type {
  name: "Features"
  field { name: "feature" number: 1 label: LABEL_REPEATED type: TYPE_MESSAGE type_name: "Entry" }
}
message_type {
  name: "Example"
  field { name: "features" number: 1 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: "Features" }
}
"""


class _File(NamedTuple):
    """A TFRecord file of `num_records` records, each of `record_bytes` bytes in the file."""

    path: str
    record_bytes: int
    num_records: int


class RecordImages:
    """The images of TFRecord files.

    Args:
      paths: the files, in the order of their names.
      image_shape: (H, W, C) of the images.
      name: what they are, for messages.
      classes: the names of the classes, if the records have labels.

    Attributes:
      name: as given.
      classes: as given.
      shuffle: how `train` shuffles them.

    Raises:
      InputError: a file cannot be read, is cut off, or holds no images of this shape.
    """

    def __init__(
        self, paths: Sequence[str], image_shape: tuple[int, int, int], name: str, classes: tuple[str, ...] = ()
    ):
        self.name, self.classes = name, classes
        self._image_shape = image_shape
        with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
            self._files = list(pool.map(_measure, paths))
        sizes = tuple(file.num_records for file in self._files)
        self._firsts = np.cumsum(sizes) - sizes
        self.shuffle = EpochShuffle(sizes, shuffle_buffer_size(sum(sizes), image_shape))
        self._read(0)  # another shape is found now

    def take(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Reads images uint8 [..., H, W, C] by their indices, int [...], and their labels, int32 [...].

        Raises:
          InputError: a record cannot be read; the message names it.
        """
        images = np.empty((indices.size, *self._image_shape), np.uint8)
        labels = np.empty(indices.size, np.int32)

        def read(places: np.ndarray) -> None:
            for place in places:
                images[place], labels[place] = self._read(indices.flat[place])

        num_threads = _THREADS if np.prod(self._image_shape) >= _SMALL_IMAGE else 1
        with ThreadPoolExecutor(num_threads) as pool:
            for _ in pool.map(read, np.array_split(np.arange(indices.size), num_threads)):
                pass  # raises the errors
        images = images.reshape(*indices.shape, *self._image_shape)
        return images, labels.reshape(indices.shape) if self.classes else None

    def _read(self, index: int) -> tuple[np.ndarray, int]:
        """An image uint8 [H, W, C], and its label or -1."""
        place = int(np.searchsorted(self._firsts, index, "right")) - 1
        file, record = self._files[place], index - int(self._firsts[place])
        try:
            return _parse(_read_record(file, record), self._image_shape, with_label=bool(self.classes))
        except DamagedFileError as error:
            raise InputError(f"{file.path}: record {record} ({error}): repair the file, or leave it out") from error


def matching_files(pattern: str) -> list[str]:
    """Returns the local files that a pattern names; what exists under the name of the pattern is no pattern.

    Raises:
      ConfigError: there are none.
    """
    expanded = os.path.expanduser(pattern)
    folder, name = os.path.split(expanded)
    if gfile.exists(expanded):
        return [expanded]
    names = fnmatch.filter(gfile.listdir(folder or "."), name) if gfile.isdir(folder or ".") else []
    if not names:
        raise ConfigError("tfrecord", f"={pattern} matches no file")
    return sorted(os.path.join(folder, found) for found in names)


def _measure(path: str) -> _File:
    """Counts the records of a file by the length of the first.

    Raises:
      InputError: the file cannot be read, or its last record is cut off.
    """
    try:
        size = gfile.size(path)
        with gfile.open_binary(path, "rb") as file:
            header = memoryview(file.read(_HEADER_BYTES))
    except gfile.file_errors() as error:
        raise ConfigError("tfrecord", f"={path} cannot be read ({first_line(error)})") from error
    record_bytes = int.from_bytes(header[:8], "little") + _HEADER_BYTES + _CRC_BYTES
    if record_bytes > size or _masked_crc(header[:8]) != header[8:]:
        raise ConfigError("tfrecord", f"={path} is not a TFRecord file, or its first record is cut off")
    count, rest = divmod(size, record_bytes)
    if rest:
        raise ConfigError(
            "tfrecord",
            f"={path} is truncated: record {count} has {rest} of the {record_bytes} bytes of record 0",
        )
    return _File(path, record_bytes, count)


def _read_record(file: _File, index: int) -> memoryview:
    """The data of a record.

    Raises:
      DamagedFileError: its bytes do not match their CRC, or its length is not that of record 0.
      InputError: the file cannot be read.
    """
    try:
        with gfile.open_binary(file.path, "rb") as opened:
            opened.seek(index * file.record_bytes)
            record = memoryview(opened.read(file.record_bytes))
    except gfile.file_errors() as error:
        raise ConfigError("tfrecord", f"={file.path} cannot be read ({first_line(error)})") from error
    length, data = record[:8], record[_HEADER_BYTES:-_CRC_BYTES]
    if int.from_bytes(length, "little") != len(data):
        raise DamagedFileError("its length is not that of record 0")
    if _masked_crc(length) != record[8:_HEADER_BYTES] or _masked_crc(data) != record[-_CRC_BYTES:]:
        raise DamagedFileError("its bytes do not match their CRC")
    return data


def _masked_crc(data: memoryview) -> bytes:
    """The CRC-32C of some bytes, rotated by 15 bits and moved by a constant, as a TFRecord file stores it."""
    crc = google_crc32c.value(bytes(data))
    return ((((crc >> 15) | (crc << 17)) + _CRC_ADDEND) % 2**32).to_bytes(4, "little")


def _parse(data: memoryview, image_shape: tuple[int, int, int], *, with_label: bool) -> tuple[np.ndarray, int]:
    """The image uint8 [H, W, C] of a `tf.train.Example`, and its label or -1.

    Raises:
      DamagedFileError: it is not an image of this shape, or has no label.
    """
    height, width, channels = image_shape
    try:
        example = _example_class().FromString(bytes(data))
        features = {entry.key: entry.value for entry in example.features.feature}
        shape, pixels = tuple(features["shape"].int64_list.value), features["data"].bytes_list.value[0]
        label = int.from_bytes(features["label"].bytes_list.value[0], "little", signed=True) if with_label else -1
        image = np.frombuffer(pixels, np.uint8).reshape(channels, height, width)
    except (KeyError, IndexError, ValueError, DecodeError) as error:
        raise DamagedFileError(f"it is not an image of {height}x{width}x{channels}") from error
    if shape != (channels, height, width):
        raise DamagedFileError(f"its shape (C, H, W) is {shape}, and the run wants {(channels, height, width)}")
    return image.transpose(1, 2, 0), label


@functools.cache
def _example_class() -> Any:
    """The class of `tf.train.Example` messages."""
    pool = descriptor_pool.DescriptorPool()
    pool.Add(text_format.Parse(_SCHEMA, descriptor_pb2.FileDescriptorProto()))
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("Example"))
