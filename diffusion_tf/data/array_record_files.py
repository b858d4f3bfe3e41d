"""Reads array_record files, a format in which TensorFlow Datasets may have prepared a dataset."""

import os
from collections.abc import Callable, Sequence

import tensorflow as tf

from diffusion_tf.data.source import READ_ERRORS
from diffusion_tf.errors import ConfigError
from diffusion_tf.storage.files import first_line


class ArrayRecords:
    """The records of array_record files, in their order.

    Args:
      files: the files.

    Raises:
      ConfigError: a file is damaged, or the package that reads them is not installed.
    """

    def __init__(self, files: Sequence[str]):
        try:
            from array_record.python.array_record_data_source import ArrayRecordDataSource

            self._records = ArrayRecordDataSource(files)
        except ImportError as error:
            raise ConfigError(
                "data_dir",
                f": {files[0]} needs the package array_record: `pip install array_record`, or prepare the dataset"
                " with `tfds build --file_format=tfrecord`",
            ) from error
        except (RuntimeError, ValueError, OSError) as error:
            folder = os.path.dirname(files[0])
            raise ConfigError("data_dir", f": a file in {folder} is damaged ({first_line(error)})") from error

    def dataset(self, first: int = 0, stop: int | None = None) -> tf.data.Dataset:
        """Returns the serialized records first, ..., stop - 1, by default all; a damaged one raises a READ_ERROR."""

        def read(index: int) -> bytes:
            try:
                return self._records[int(index)]
            except RuntimeError as error:
                raise ValueError(first_line(error)) from error  # TensorFlow makes it an InvalidArgumentError

        return tf.data.Dataset.range(first, len(self._records) if stop is None else stop).map(
            lambda index: tf.ensure_shape(tf.numpy_function(read, [index], tf.string), [])
        )

    def find_bad(self, decode: Callable[[tf.Tensor], tf.Tensor]) -> str | None:
        """Reads records until `decode` raises one of READ_ERRORS, and returns which one and why."""
        for index in range(len(self._records)):
            try:
                decode(self._records[index])
            except (RuntimeError, *READ_ERRORS) as error:
                return f"record {index} ({first_line(error)})"
        return None
