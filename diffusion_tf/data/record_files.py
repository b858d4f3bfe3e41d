"""Reads parts of TFRecord files, and finds the records that cannot be read."""

from collections.abc import Callable

import tensorflow as tf

from diffusion_tf.data.source import READ_ERRORS

_BUFFER_BYTES = 2**18  # read from a file at once


def read_runs(runs: tf.data.Dataset) -> tf.data.Dataset:
    """Returns the records of runs (file, offset, count): `count` records from byte `offset` on, all if it is -1."""

    def read(file: tf.Tensor, offset: tf.Tensor, count: tf.Tensor) -> tf.data.Dataset:
        # The public tf.data.TFRecordDataset takes no offset.
        variant = tf.raw_ops.TFRecordDatasetV2(
            filenames=[file], compression_type="", buffer_size=_BUFFER_BYTES, byte_offsets=[tf.cast(offset, tf.int64)]
        )
        records = tf.data.experimental.from_variant(variant, tf.TensorSpec([], tf.string))
        return records.take(tf.cast(count, tf.int64))

    return runs.flat_map(read)


def find_bad_records(
    file: str,
    decode: Callable[[tf.Tensor], tf.Tensor],
    *,
    limit: int,
    record_bytes: int | None = None,
    num_records: int = 0,
) -> dict[int, str]:
    """Reads a TFRecord file until `limit` records are bad; returns {index: file, record and reason}.

    Args:
      file: the file.
      decode: maps a record to an image, or raises one of READ_ERRORS.
      limit: the number of bad records to stop after.
      record_bytes: bytes of each record in the file; without it, reading stops at the first bad record, as nothing
        tells where the next one begins.
      num_records: the number of expected records: TensorFlow silently ignores a last record of a few bytes.
    """
    bad: dict[int, str] = {}
    index = 0
    while len(bad) < limit:
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
    if isinstance(error, tf.errors.DataLossError):
        return "its bytes do not match their CRC, or are cut off"
    return "it is not an image of the preset's shape"
