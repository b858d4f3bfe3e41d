"""Files and folders on disk by Python, and in an object store by TensorFlow, which is imported when a path needs it.

Programs without TensorFlow read and write runs on disk with these functions. Each one acts as its namesake in
`tf.io.gfile`, and raises one of `file_errors()`.
"""

import errno
import os
import shutil
import sys
from typing import Any

from diffusion_tf.errors import InputError


def is_local(path: str) -> bool:
    """Whether `path` is in this machine's file system rather than in an object store."""
    return "://" not in path


def _remote() -> Any:
    try:
        import tensorflow as tf
    except ImportError as error:
        raise InputError("paths in an object store need TensorFlow: name a local path") from error
    return tf.io.gfile


def file_errors() -> tuple[type[Exception], ...]:
    """The exceptions of the file system and, if it is imported, of TensorFlow."""
    tf = sys.modules.get("tensorflow")
    return (OSError, tf.errors.OpError) if tf else (OSError,)


def missing_errors() -> tuple[type[Exception], ...]:
    """Those of `file_errors` that tell that a file or a folder's entry is not what it was a moment ago."""
    tf = sys.modules.get("tensorflow")
    return (FileNotFoundError, *((tf.errors.NotFoundError, tf.errors.FailedPreconditionError) if tf else ()))


def exists(path: str) -> bool:
    """Whether there is a file or a folder."""
    return os.path.exists(path) if is_local(path) else _remote().exists(path)


def isdir(path: str) -> bool:
    """Whether there is a folder."""
    return os.path.isdir(path) if is_local(path) else _remote().isdir(path)


def listdir(path: str) -> list[str]:
    """Returns the names in a folder."""
    return os.listdir(path) if is_local(path) else _remote().listdir(path)


def makedirs(path: str) -> None:
    """Creates a folder and those above it where they are missing."""
    if is_local(path):
        os.makedirs(path, exist_ok=True)
    else:
        _remote().makedirs(path)


def size(path: str) -> int:
    """Returns the bytes of a file."""
    return os.stat(path).st_size if is_local(path) else _remote().stat(path).length


def open_binary(path: str, mode: str) -> Any:
    """Opens a file to read ("rb"), to write anew ("xb") or to append ("ab") bytes; a store replaces for "xb"."""
    return open(path, mode) if is_local(path) else _remote().GFile(path, mode.replace("x", "w"))


def copy(source: str, path: str) -> None:
    """Copies a file; the copy must not exist."""
    if is_local(source) and is_local(path):
        shutil.copyfile(source, path)
    else:
        _remote().copy(source, path)


def rename(source: str, path: str) -> None:
    """Moves a file or a folder, and replaces a file or an empty folder."""
    if is_local(path):
        os.replace(source, path)
    else:
        _remote().rename(source, path, overwrite=True)


def remove(path: str) -> None:
    """Removes a file."""
    if is_local(path):
        os.remove(path)
    else:
        _remote().remove(path)


def rmtree(path: str) -> None:
    """Removes a folder and all that it holds; one that another process fills meanwhile stays."""
    if is_local(path):
        try:
            shutil.rmtree(path)
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                raise
    else:
        _remote().rmtree(path)
