"""Files and folders on disk by Python, and in an object store by TensorFlow, which is imported when a path needs it.

Programs without TensorFlow read and write runs on disk with these functions. Each one acts as its namesake in
`tf.io.gfile`, and raises one of `file_errors()`.
"""

import contextlib
import errno
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from typing import Any

from absl import logging

from diffusion_tf.errors import InputError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_NO_BUCKET = "bucket does not exist"


def is_local(path: str) -> bool:
    """Whether `path` is in this machine's file system rather than in one of TensorFlow's, such as gs://."""
    return not _SCHEME.match(path)


def folder_of(path: str) -> str:
    """Returns the folder that holds `path`; in an object store, the bucket is its own."""
    scheme = _SCHEME.match(path)
    start = scheme.end() if scheme else 0
    return path[:start] + (os.path.dirname(path[start:]) or ("" if scheme else "."))


def _remote() -> Any:
    try:
        import tensorflow as tf
    except ImportError as error:
        raise InputError("paths in an object store need TensorFlow: name a local path") from error
    return tf.io.gfile


@contextlib.contextmanager
def patience(path: str, seconds: float = 30.0) -> Iterator[None]:
    """Warns if the block waits for a store for long: TensorFlow repeats requests for minutes, and does not say so."""
    if is_local(path):
        yield
        return
    message = "%s: no answer for %.0f seconds, asking again for some minutes"
    timer = threading.Timer(seconds, logging.warning, (message, path, seconds))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def file_errors() -> tuple[type[Exception], ...]:
    """The exceptions of the file system and, if it is imported, of TensorFlow."""
    tf = sys.modules.get("tensorflow")
    return (OSError, tf.errors.OpError) if tf else (OSError,)


def missing_errors() -> tuple[type[Exception], ...]:
    """Those of `file_errors` that tell that a file or a folder's entry is not what it was a moment ago."""
    tf = sys.modules.get("tensorflow")
    return (FileNotFoundError, *((tf.errors.NotFoundError, tf.errors.FailedPreconditionError) if tf else ()))


def _stat(path: str) -> Any:
    """Returns TensorFlow's description of a file or folder in a store; None if there is none.

    `tf.io.gfile.isdir` says that there is no folder where the store does not answer, or refuses to.

    Raises:
      InputError: there is no such bucket.
    """
    import tensorflow as tf

    try:
        with patience(path):
            return _remote().stat(path)
    except tf.errors.NotFoundError as error:
        if _NO_BUCKET in str(error):
            raise InputError(f"cannot find {path} ({store_reason(error)})") from error
        return None


def store_reason(error: Exception) -> str | None:
    """Returns why Google Cloud Storage refused a request and what to do about it; None for other errors."""
    text = str(error)
    found, status = re.search(r"gs://[^/\s]+", text), re.search(r"HTTP response code (\d{3})", text)
    bucket, code = found[0] if found else "the bucket", int(status[1]) if status else 0
    if code == 401:
        return (
            "no credentials for Google Cloud Storage: run `gcloud auth application-default login`, or give this machine"
            " a service account"
        )
    if code == 403:
        return (
            f"no permission: grant this account the role roles/storage.objectUser on {bucket} (to only read:"
            " roles/storage.objectViewer)"
        )
    if _NO_BUCKET in text:
        return f"there is no bucket {bucket}: create it, or correct its name"
    if code == 429 or code >= 500 or "libcurl code" in text:
        return f"Google Cloud Storage does not answer: try again later ({' '.join(text.split())[:300]})"
    return None


def is_bucket(path: str) -> bool:
    """Whether `path` names a bucket, which is not looked up: who may use its objects may not see it itself."""
    return re.fullmatch("gs://[^/]+/?", path) is not None


def exists(path: str) -> bool:
    """Whether there is a file or a folder."""
    return os.path.exists(path) if is_local(path) else is_bucket(path) or _stat(path) is not None


def isdir(path: str) -> bool:
    """Whether there is a folder."""
    if is_local(path):
        return os.path.isdir(path)
    if is_bucket(path):
        return True
    found = _stat(path)
    return found is not None and found.is_directory


def listdir(path: str) -> list[str]:
    """Returns the names in a folder."""
    return os.listdir(path) if is_local(path) else _remote().listdir(path)


def makedirs(path: str) -> None:
    """Creates a folder and those above it where they are missing; gs:// needs none, and no permission for them."""
    if is_local(path):
        os.makedirs(path, exist_ok=True)
    elif not path.startswith("gs://"):
        _remote().makedirs(path)


def modified(path: str) -> float:
    """Returns when an object was last written, in seconds of the store's clock; 0 if there is none.

    TensorFlow may not know yet what other processes wrote in the last five seconds.
    """
    found = _stat(path)
    return found.mtime_nsec / 1e9 if found else 0.0


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
        isdir(source)  # TensorFlow remembers it; it would take a folder for a file if this request failed
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
    elif isdir(path):  # TensorFlow remembers it; it would take the folder for missing if this request failed
        _remote().rmtree(path)
