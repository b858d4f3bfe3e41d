"""Reads parts of TFRecord files, and finds the records that cannot be read.

A record is its length (8 bytes), the CRC of the length (4), the data, and the CRC of the data (4). TensorFlow allocates
as many bytes as a length with a matching CRC says, and the process dies if there are not as many.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import tensorflow as tf
from tensorboard.summary.writer.record_writer import masked_crc32c

from diffusion_tf.data.source import READ_ERRORS
from diffusion_tf.errors import InputError
from diffusion_tf.storage.files import is_local

OVERHEAD_BYTES = 16  # of a record, beside its data
_HEADER_BYTES = 12  # its length and the CRC of the length
_FILES_AT_ONCE = 32
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


def check_lengths(files: Sequence[str], advice: str) -> None:
    """Checks, before TensorFlow reads the files, that no record claims to be longer than the rest of its file.

    Reads a few bytes of each record, of 32 files at once: 2 us a record if the files are in memory, 0.1 ms from an SSD.
    Files in an object store are not checked.

    Args:
      files: TFRecord files.
      advice: what to do about a damaged one, for the message.

    Raises:
      InputError: a record does; the message names it.
    """
    with ThreadPoolExecutor(_FILES_AT_ONCE) as executor:
        for file, index in zip(files, executor.map(_overlong_record, files), strict=True):
            if index is not None:
                raise InputError(f"{file}: record {index} (its bytes claim to be more than the file has): {advice}")


def _overlong_record(file: str) -> int | None:
    """The first record that claims to be longer than the rest of its file, with a matching CRC."""
    if not is_local(file) or not os.path.exists(file):
        return None
    with open(file, "rb") as opened:
        size, offset, index = os.fstat(opened.fileno()).st_size, 0, 0
        while len(header := os.pread(opened.fileno(), _HEADER_BYTES, offset)) == _HEADER_BYTES:
            offset += int.from_bytes(header[:8], "little") + OVERHEAD_BYTES
            if offset > size:
                return index if masked_crc32c(header[:8]) == int.from_bytes(header[8:], "little") else None
            index += 1
    return None


def other_lengths(file: str, record_bytes: int) -> dict[int, str]:
    """Returns {index: file, record and reason} of the records, `record_bytes` apart, of another length than the first.

    Takes as long as `check_lengths`. A file in an object store is not checked.
    """
    if not is_local(file):
        return {}
    with open(file, "rb") as opened:
        offsets = range(0, os.fstat(opened.fileno()).st_size, record_bytes)
        headers = [os.pread(opened.fileno(), _HEADER_BYTES, offset) for offset in offsets]
    return {
        index: f"{file}: record {index} (its bytes do not match their CRC, or are cut off)"
        for index, header in enumerate(headers)
        if header != headers[0]
    }


def find_bad_records(
    file: str,
    decode: Callable[[tf.Tensor], tf.Tensor],
    *,
    limit: int,
    record_bytes: int | None = None,
    num_records: int = 0,
    known: Mapping[int, str] | None = None,
) -> dict[int, str]:
    """Reads a TFRecord file until `limit` records are bad; returns {index: file, record and reason}.

    Args:
      file: the file.
      decode: maps a record to an image, or raises one of READ_ERRORS.
      limit: the number of bad records to stop after.
      record_bytes: bytes of each record in the file; without it, reading stops at the first bad record, as nothing
        tells where the next one begins.
      num_records: the number of expected records: TensorFlow silently ignores a last record of a few bytes.
      known: bad records that must not be read, in the same form.
    """
    bad: dict[int, str] = {}
    index = 0
    while len(bad) < limit:
        stop = min((i for i in known or () if i >= index), default=None)
        count = -1 if stop is None else stop - index
        with tf.device(None):  # in this process, and not on a TPU slice's worker 0
            run = tf.data.Dataset.from_tensors((file, index * (record_bytes or 0), count))
            images = read_runs(run).map(decode, tf.data.AUTOTUNE).as_numpy_iterator()
        try:
            for _ in images:
                index += 1
            if known and index == stop:
                bad[index] = known[index]
            elif index >= num_records:
                return bad
            else:
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
