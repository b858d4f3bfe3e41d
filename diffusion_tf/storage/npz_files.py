"""Reads .npz files, whose sizes and types are not trusted, and writes them."""

import hashlib
import io
import math
import os
import zipfile
from collections.abc import Collection, Iterable, Mapping

import numpy as np

from diffusion_tf.errors import DamagedFileError, InputError
from diffusion_tf.storage import gfile
from diffusion_tf.storage.files import Arrays, first_line, listed, write_file

MAX_ARRAY_BYTES = 2**34  # the arrays of an .npz file: 50,000 images of 256x256 take 10 GB
# A compressed .npz file of more than _SMALL_BYTES of arrays may unpack to this many times its size. Pictures reach 20;
# the most that the format allows is 1000.
_MAX_RATIO = 64
_SMALL_BYTES = 2**26


def write_npz(path: str, **arrays: np.ndarray) -> None:
    """Writes arrays by name as an .npz file, atomically."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    write_file(path, buffer.getvalue())


def read_npz(path: str, max_bytes: int = MAX_ARRAY_BYTES, names: Collection[str] | None = None) -> Arrays:
    """Returns the arrays of an .npz file; pickled objects are refused. Takes little more memory than the arrays.

    Args:
      path: the file.
      max_bytes: what its arrays may take together.
      names: the arrays to read, of those that are there; default: all.

    Raises:
      InputError: the file cannot be read, or its arrays do not fit in memory.
      DamagedFileError: the file is not an .npz file, or its arrays take more than `max_bytes` together, or far more
        than the file.
    """
    path = os.path.expanduser(path)
    try:
        num_bytes = gfile.size(path)
        file = gfile.open_binary(path, "rb")
    except gfile.file_errors() as error:
        raise InputError(f"cannot read {path} ({first_line(error)})") from error
    try:
        with file, zipfile.ZipFile(file) as archive:
            members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
            read = {name: member for name, member in members.items() if names is None or name in names}
            _check_sizes(archive, read.values(), num_bytes, max_bytes)
            return {name: _read_array(archive, member) for name, member in read.items()}
    except MemoryError as error:
        raise InputError(f"{path} does not fit in memory") from error
    except Exception as error:  # zipfile and NumPy raise a dozen types
        raise DamagedFileError(f"{path} is not an .npz file, or is damaged ({first_line(error)})") from error


def _check_sizes(archive: zipfile.ZipFile, members: Iterable[zipfile.ZipInfo], file_bytes: int, max_bytes: int) -> None:
    """Raises ValueError if the arrays of an .npz file take too much memory, or their headers lie."""
    total = sum(_array_bytes(archive, member) for member in members)
    if total > max_bytes:
        raise ValueError(f"its arrays take {total:,} bytes, and may take {max_bytes:,} at most")
    if total > max(_SMALL_BYTES, _MAX_RATIO * file_bytes):
        raise ValueError(f"{file_bytes:,} bytes unpack to {total:,}: save the arrays without compression")


def _array_bytes(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> int:
    """Returns the bytes of an array in an .npz file; raises ValueError if the archive does not hold that many."""
    # Other methods unpack a block at once, of any size.
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{member.filename} is compressed by another method than NumPy's")
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, _, dtype = read_header[version](file)
        there = member.file_size - file.tell()
    size = math.prod(shape) * dtype.itemsize
    if dtype.hasobject or size != there or min(shape, default=0) < 0:
        raise ValueError(f"{member.filename} claims to be {dtype} {shape}, and has {there:,} bytes")
    return size


def _read_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)  # piece by piece


def digest_arrays(arrays: Mapping[str, np.ndarray], stated: bytes = b"") -> str:
    """Returns the SHA-256 over the names, dtypes, shapes and contents of arrays, after what a file states of them."""
    digest = hashlib.sha256(stated)
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()


def describe_arrays(arrays: Mapping[str, np.ndarray]) -> str:
    """Returns the names, dtypes and shapes of arrays, for an error message."""
    return listed(f"{name} {array.dtype} {array.shape}" for name, array in arrays.items())
