"""Files that are whole or absent, on disk or gs://, with errors that name them."""

import contextlib
import io
import json
import math
import os
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_tf.errors import InputError


def write_file(path: str, data: bytes) -> None:
    """Writes a file so that it is there with all of `data`, or not at all; makes its folder.

    Raises:
      InputError: the path cannot be written.
    """
    path = os.path.expanduser(path)
    _write_temporary(path, data)
    tf.io.gfile.rename(_temporary(path), path, overwrite=True)


def check_writable(path: str) -> None:
    """Raises InputError where `path` could not be written; changes nothing that is there."""
    path = os.path.expanduser(path)
    if tf.io.gfile.isdir(path):
        raise InputError(f"cannot write {path}: it is a folder")
    _write_temporary(path, b"")
    tf.io.gfile.remove(_temporary(path))


def write_npz(path: str, **arrays: np.ndarray) -> None:
    """Writes arrays by name as an .npz, whole or not at all."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    write_file(path, buffer.getvalue())


@contextlib.contextmanager
def new_folder(path: str) -> Iterator[str]:
    """A folder that is at `path` with all that the block writes into the one it is given, or not at all.

    Raises:
      InputError: something is at `path`, or it cannot be written.
    """
    path = os.path.expanduser(path).rstrip("/")
    if tf.io.gfile.exists(path) and (not tf.io.gfile.isdir(path) or tf.io.gfile.listdir(path)):
        raise InputError(f"{path} is there already: name a new folder")
    temporary = _temporary(path)
    _remove_folder(temporary)
    try:
        yield temporary
        tf.io.gfile.rename(temporary, path, overwrite=True)
    except (tf.errors.OpError, OSError) as error:
        raise InputError(f"cannot write {path} ({first_line(error)})") from error
    finally:
        _remove_folder(temporary)


def _remove_folder(path: str) -> None:
    if tf.io.gfile.isdir(path):
        tf.io.gfile.rmtree(path)


def read_file(path: str) -> bytes:
    """The contents of a file.

    Raises:
      InputError: it cannot be read.
    """
    try:
        with tf.io.gfile.GFile(os.path.expanduser(path), "rb") as file:
            return file.read()
    except (tf.errors.OpError, OSError) as error:
        raise InputError(f"cannot read {path} ({first_line(error)})") from error


def write_json(path: str, value: Any) -> None:
    """Writes a value as an indented JSON file."""
    write_file(path, (to_json(value, indent=2) + "\n").encode())


def to_json(value: Any, indent: int | None = None) -> str:
    """A value as JSON text; NaN and infinity, which JSON lacks, become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_npz(path: str) -> dict[str, np.ndarray]:
    """The arrays of an .npz file.

    Raises:
      InputError: the file cannot be read, or is no .npz.
    """
    try:
        with np.load(io.BytesIO(read_file(path)), allow_pickle=False) as archive:
            return dict(archive)
    except (ValueError, OSError, EOFError, TypeError, AttributeError, zlib.error, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is no .npz of arrays, or is damaged ({error})") from error


def append_line(path: str, line: str) -> None:
    """Adds a line to a text file.

    Raises:
      InputError: it cannot be written.
    """
    try:
        with tf.io.gfile.GFile(path, "a") as file:
            file.write(line + "\n")
    except (tf.errors.OpError, OSError) as error:
        raise InputError(f"cannot write {path} ({first_line(error)})") from error


def first_line(error: Exception) -> str:
    """What an exception says, without the details that TensorFlow puts on further lines."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _temporary(path: str) -> str:
    return f"{path}.tmp"


def _write_temporary(path: str, data: bytes) -> None:
    try:
        if os.path.dirname(path):
            tf.io.gfile.makedirs(os.path.dirname(path))
        with tf.io.gfile.GFile(_temporary(path), "wb") as file:
            file.write(data)
    except (tf.errors.OpError, OSError) as error:
        raise InputError(f"cannot write {path} ({first_line(error)})") from error
