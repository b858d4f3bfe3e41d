"""Reads and writes files on disk or gs://. Every error names the file.

Writes are atomic: a file is written beside its place, synced and renamed. What a killed process leaves there is removed
by the next one that writes into the folder. Files that are read are not trusted: their sizes are checked before memory
is allocated, and no code in them runs (no pickles).
"""

import contextlib
import errno
import functools
import hashlib
import io
import json
import math
import os
import re
import secrets
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec
import numpy as np
import tensorflow as tf
from absl import logging

from diffusion_tf.errors import DamagedFileError, InputError

Arrays = dict[str, np.ndarray]  # by name, as a checkpoint or an .npz file holds them
MAX_BYTES = 2**30  # the default limit of a file that is read at once
_PROCESS = secrets.token_hex(4)  # tells this process from an earlier one of its number
# What a network mount answers that lacks locks, or flushing to the disk.
UNSUPPORTED = (errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
MAX_JSON_BYTES = 2**26  # Python's objects take up to twenty times as much
MAX_ARRAY_BYTES = 2**34  # the arrays of an .npz file: 50,000 images of 256x256 take 10 GB
# A compressed .npz file of more than _SMALL_BYTES of arrays may unpack to this many times its size. Pictures reach 20;
# the most that the format allows is 1000.
_MAX_RATIO = 64
_SMALL_BYTES = 2**26
_MAX_FLOAT, _MAX_INT = 1e39, 2**63  # in JSON of this program; no float32 is larger


def write_file(path: str, data: bytes) -> None:
    """Writes a file atomically, even across a power failure, and creates its folder.

    On an object store, the rename is a copy, which becomes visible when it is complete.

    Raises:
      InputError: the file cannot be written; an existing file stays as it was.
    """
    with replacing(path) as temporary, _create(temporary) as file:
        file.write(data)


def copy_file(source: str, path: str) -> None:
    """Copies a file of any size atomically, and creates the folder of the copy.

    Raises:
      InputError: the source cannot be read, or the copy cannot be written.
    """
    with replacing(path) as temporary:
        tf.io.gfile.copy(source, temporary)


@contextlib.contextmanager
def writing(path: str) -> Iterator[None]:
    """Names `path` in the error if the block, which writes there, fails.

    Every write goes through this, those of TensorFlow too, whose error for a full disk is that for a lack of memory.

    Raises:
      InputError: the block raised an error of the file system or of TensorFlow.
    """
    try:
        yield
    except (tf.errors.OpError, OSError) as error:
        raise InputError(f"cannot write {path} ({write_reason(error)})") from error


def write_reason(error: Exception) -> str:
    """Returns why a write failed."""
    if any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT)):
        return "the disk is full: make room on it"
    if isinstance(error, OSError) and error.errno == errno.ELOOP:
        return "it is a symbolic link: remove it"
    return error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)


@contextlib.contextmanager
def replacing(path: str) -> Iterator[str]:
    """Yields a place to write a file or folder, which becomes `path` when the block succeeds; else it is removed.

    Args:
      path: the file, or a folder that does not exist or is empty.

    Raises:
      InputError: the place cannot be written; `path` stays as it was.
    """
    path = os.path.expanduser(path).rstrip("/")
    folder, temporary = os.path.dirname(path) or ".", _temporary(path)
    with writing(path):
        tf.io.gfile.makedirs(folder)
        _remove_abandoned(folder)
        try:
            yield temporary
            sync(temporary)
            tf.io.gfile.rename(temporary, path, overwrite=True)
        except BaseException:
            with contextlib.suppress(tf.errors.OpError, OSError):
                remove(temporary)
            raise
        sync(folder)


def remove(path: str) -> None:
    """Removes a file or a folder; what another process removes or adds at the same time is no error."""
    with contextlib.suppress(tf.errors.NotFoundError, tf.errors.FailedPreconditionError):
        if tf.io.gfile.isdir(path) and not os.path.islink(path):
            tf.io.gfile.rmtree(path)
        else:
            tf.io.gfile.remove(path)


def _temporary(path: str) -> str:
    """Returns the place where this process writes a file or folder before it is renamed to `path`."""
    return f"{path}.{os.uname().nodename}-{os.getpid()}-{_PROCESS}.tmp"


@functools.cache
def _remove_abandoned(folder: str) -> None:
    """Removes, once in each process, what killed processes of this machine left in a local folder."""
    if not is_local(folder):
        return  # an object store shows a file when it is complete
    pattern = re.compile(rf"(.+)\.{re.escape(os.uname().nodename)}-(\d{{1,9}})-[0-9a-f]{{8}}\.tmp")
    for name in os.listdir(folder):
        match = pattern.fullmatch(name)
        if match and name != _temporary(match[1]) and not _is_other_process(int(match[2])):
            with contextlib.suppress(tf.errors.OpError, OSError):  # it may be another user's
                remove(os.path.join(folder, name))


def _is_other_process(number: int) -> bool:
    """Whether another process with this number runs; after a container restarts, its processes have the old numbers."""
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return number != os.getpid()


def _create(path: str) -> Any:
    """Opens a new file to write bytes; a link at a local `path` is an error."""
    return open(path, "xb") if is_local(path) else tf.io.gfile.GFile(path, "wb")


def is_local(path: str) -> bool:
    """Whether `path` is in this machine's file system rather than in an object store."""
    return "://" not in path


def sync(path: str) -> None:
    """Flushes a local file or folder to the disk, so that it survives a power failure.

    A file system without this function, as network mounts may be, is named in a warning, once.
    """
    if is_local(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            warn_once(f"this file system cannot flush to the disk ({error.strerror}): a power failure may lose files")
        finally:
            os.close(descriptor)


@functools.cache
def warn_once(message: str) -> None:
    """Logs a warning, once in each process."""
    logging.warning("%s", message)


def check_writable(path: str) -> None:
    """Raises InputError if a file at `path` cannot be written; an existing file does not change."""
    path = os.path.expanduser(path)
    if tf.io.gfile.isdir(path):
        raise InputError(f"cannot write {path}: it is a folder")
    with writing(path):
        tf.io.gfile.makedirs(os.path.dirname(path) or ".")
        with _create(_temporary(path)) as file:
            file.write(b"")
        remove(_temporary(path))


def write_npz(path: str, **arrays: np.ndarray) -> None:
    """Writes arrays by name as an .npz file, atomically."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    write_file(path, buffer.getvalue())


@contextlib.contextmanager
def new_folder(path: str) -> Iterator[str]:
    """Creates a folder atomically: the block writes into a temporary folder, which becomes `path` when it succeeds.

    Raises:
      InputError: `path` exists and is not an empty folder, or cannot be written.
    """
    path = os.path.expanduser(path).rstrip("/")
    if tf.io.gfile.exists(path) and (not tf.io.gfile.isdir(path) or tf.io.gfile.listdir(path)):
        raise InputError(f"{path} already exists: name a new folder")
    with replacing(path) as temporary:
        yield temporary


def read_file(path: str, max_bytes: int = MAX_BYTES) -> bytes:
    """Returns the contents of a file.

    Raises:
      InputError: the file cannot be read, or is larger than `max_bytes`.
    """
    try:
        with tf.io.gfile.GFile(os.path.expanduser(path), "rb") as file:
            if file.size() > max_bytes:
                raise InputError(f"{path} holds {file.size():,} bytes, and may hold {max_bytes:,} at most")
            return file.read()
    except (tf.errors.OpError, OSError) as error:
        raise InputError(f"cannot read {path} ({first_line(error)})") from error


def read_json(path: str, schema: Any = None, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Returns the value in a JSON file.

    Args:
      path: the file.
      schema: for a file that this program writes, the type of its value: a TypedDict, say; further keys are allowed.
      max_bytes: the largest size of the file.

    Raises:
      InputError: the file cannot be read, or is larger than `max_bytes`.
      DamagedFileError: the file is not JSON, or its value is not of that type.
    """
    return parse_json(read_file(path, max_bytes), schema, path)


def parse_json(text: bytes | str, schema: Any, place: str) -> Any:
    """Returns the value in JSON text from `place`, a file or a line of one; `schema` as for `read_json`.

    Raises:
      DamagedFileError: the text is not JSON, or its value is not of that type.
    """
    # What others write may hold NaN and numbers of any size.
    limits: dict[str, Any] = (
        {} if schema is None else {"parse_float": _float, "parse_constant": _float, "parse_int": _int}
    )
    try:
        value = json.loads(text, **limits)
        if schema is not None:
            msgspec.convert(value, schema)
    except msgspec.ValidationError as error:
        there = f"; there are: {listed(value)}" if isinstance(value, dict) else ""
        raise DamagedFileError(f"{place} is damaged, or not of this program ({error}{there})") from error
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{place} is not JSON, or is damaged ({first_line(error)})") from error
    return value


def _float(text: str) -> float:
    if not abs(number := float(text)) < _MAX_FLOAT:
        raise ValueError(f"the number {text[:20]} is too large, or not finite")
    return number


def _int(text: str) -> int:
    if not abs(number := int(text)) < _MAX_INT:
        raise ValueError(f"the number {text[:20]}... is too large")
    return number


def write_json(path: str, value: Any) -> None:
    """Writes a value as an indented JSON file."""
    write_file(path, (to_json(value, indent=2) + "\n").encode())


def to_json(value: Any, indent: int | None = None) -> str:
    """Returns a value as JSON text; NaN and infinity become null, since JSON has no word for them."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    """Replaces NaN and infinity in nested dicts and lists by None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_npz(path: str, max_bytes: int = MAX_ARRAY_BYTES) -> Arrays:
    """Returns the arrays of an .npz file; pickled objects are refused. Takes little more memory than the arrays.

    Raises:
      InputError: the file cannot be read, or its arrays do not fit in memory.
      DamagedFileError: the file is not an .npz file, or its arrays take more than `max_bytes` together, or far more
        than the file.
    """
    path = os.path.expanduser(path)
    try:
        num_bytes = tf.io.gfile.stat(path).length
        # zipfile expects the errors of Python's own files.
        file: Any = open(path, "rb") if is_local(path) else tf.io.gfile.GFile(path, "rb")  # noqa: SIM115 (closed below)
    except (tf.errors.OpError, OSError) as error:
        raise InputError(f"cannot read {path} ({first_line(error)})") from error
    try:
        with file, zipfile.ZipFile(file) as archive:
            _check_sizes(archive, num_bytes, max_bytes)
            return {member.filename.removesuffix(".npy"): _read_array(archive, member) for member in archive.infolist()}
    except MemoryError as error:
        raise InputError(f"{path} does not fit in memory") from error
    except Exception as error:  # zipfile and NumPy raise a dozen types
        raise DamagedFileError(f"{path} is not an .npz file, or is damaged ({first_line(error)})") from error


def _check_sizes(archive: zipfile.ZipFile, file_bytes: int, max_bytes: int) -> None:
    """Raises ValueError if the arrays of an .npz file take too much memory, or their headers lie."""
    total = sum(_array_bytes(archive, member) for member in archive.infolist())
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


def append_line(path: str, line: str) -> None:
    """Appends a line to a text file, whole or not at all.

    An incomplete last line, which a power failure leaves, is removed first.

    Raises:
      InputError: the file cannot be written.
    """
    with writing(path):
        if is_local(path):
            _append_local(path, f"{line}\n".encode())
        else:
            with tf.io.gfile.GFile(path, "a") as file:
                file.write(line + "\n")


def _append_local(path: str, data: bytes) -> None:
    with open(path, "ab+", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(end - 1, 0))
        if file.read(1) not in (b"", b"\n"):
            file.seek(0)
            end = file.read().rfind(b"\n") + 1
            file.truncate(end)
        try:
            while data:  # a full disk takes a part, and raises next time
                data = data[file.write(data) :]
        except OSError:
            file.truncate(end)
            raise


def first_line(error: Exception) -> str:
    """Returns the first line of an exception's message; TensorFlow puts details on further lines."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def listed(names: Iterable[str], most: int = 8) -> str:
    """Returns names for an error message, which is one line: the first ones, and how many more there are."""
    names = list(names)
    shown = [name if name.isprintable() and len(name) <= 80 else f"{name[:80]!r}..." for name in names[:most]]
    rest = [f"{len(names) - most} others"] if len(names) > most else []
    return ", ".join(shown + rest) or "none"


def describe_arrays(arrays: Mapping[str, np.ndarray]) -> str:
    """Returns the names, dtypes and shapes of arrays, for an error message."""
    return listed(f"{name} {array.dtype} {array.shape}" for name, array in arrays.items())
