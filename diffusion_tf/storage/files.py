"""Reads and writes files on disk or gs://. Every error names the file.

Writes are atomic: a file is written beside its place, synced and renamed. What a killed process leaves there is removed
by the next one that writes into the folder. The size of a file is checked before memory is allocated to read it.
"""

import contextlib
import errno
import functools
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator

import numpy as np
from absl import logging

from diffusion_tf.errors import InputError, quoted
from diffusion_tf.storage import gfile
from diffusion_tf.storage.gfile import file_errors, is_local

Arrays = dict[str, np.ndarray]  # by name, as a checkpoint or an .npz file holds them
MAX_BYTES = 2**30  # the default limit of a file that is read at once
_PROCESS = secrets.token_hex(4)  # tells this process from an earlier one of its number
_ABANDONED_SECONDS = 86400.0
# What a network mount answers that lacks locks, or flushing to the disk.
UNSUPPORTED = (errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


def write_file(path: str, data: bytes) -> None:
    """Writes a file atomically, even across a power failure, and creates its folder.

    On an object store, the rename is a copy, which becomes visible when it is complete.

    Raises:
      InputError: the file cannot be written; an existing file stays as it was.
    """
    with replacing(path) as temporary, gfile.patience(path), gfile.open_binary(temporary, "xb") as file:
        file.write(data)


def copy_file(source: str, path: str) -> None:
    """Copies a file of any size atomically, and creates the folder of the copy.

    Raises:
      InputError: the source cannot be read, or the copy cannot be written.
    """
    with replacing(path) as temporary:
        gfile.copy(source, temporary)


@contextlib.contextmanager
def writing(path: str) -> Iterator[None]:
    """Names `path` in the error if the block, which writes there, fails.

    Every write goes through this, those of TensorFlow too, whose error for a full disk is that for a lack of memory.

    Raises:
      InputError: the block raised an error of the file system or of TensorFlow.
    """
    try:
        yield
    except file_errors() as error:
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
    folder, temporary = gfile.folder_of(path), _temporary(path)
    with writing(path):
        gfile.makedirs(folder)
        _remove_abandoned(folder)
        try:
            yield temporary
            sync(temporary)
            gfile.rename(temporary, path)
        except BaseException:
            with contextlib.suppress(*file_errors()):
                remove(temporary)
            raise
        sync(folder)


def cache_folder() -> str:
    """The folder for what can be made again: diffusion_tf in XDG_CACHE_HOME or ~/.cache."""
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "diffusion_tf")


def list_folder(path: str) -> list[str]:
    """Returns the names in a folder; none if there is no such folder."""
    return gfile.listdir(path) if gfile.isdir(path) else []


def remove(path: str) -> None:
    """Removes a file or a folder; what another process removes or adds at the same time is no error."""
    with contextlib.suppress(*gfile.missing_errors()):
        if gfile.isdir(path) and not os.path.islink(path):
            gfile.rmtree(path)
        else:
            gfile.remove(path)


def _temporary(path: str) -> str:
    """Returns the place where this process writes a file or folder before it is renamed to `path`."""
    return f"{path}.{process_name()}.tmp"


def process_name() -> str:
    """Returns a name that only this process has: its machine, its number, and what tells it from an earlier one."""
    return f"{os.uname().nodename}-{os.getpid()}-{_PROCESS}"


@functools.cache
def _remove_abandoned(folder: str) -> None:
    """Removes, once in each process, what killed processes left in a folder.

    In a local one, these are processes of this machine that no longer run. In a store, where a file is there only when
    it is complete and is renamed at once, it is what has been there for a day.
    """
    pattern = re.compile(r"(.+)\.(.+)-(\d{1,9})-[0-9a-f]{8}\.tmp")
    for name in os.listdir(folder) if is_local(folder) else list_folder(folder):
        match, path = pattern.fullmatch(name), os.path.join(folder, name)
        if not match or name == _temporary(match[1]):
            continue
        with contextlib.suppress(*file_errors()):  # it may be another user's
            if is_local(folder):
                abandoned = match[2] == os.uname().nodename and not is_other_process(int(match[3]))
            else:
                abandoned = time.time() - gfile.modified(path) > _ABANDONED_SECONDS
            if abandoned:
                remove(path)


def is_other_process(number: int) -> bool:
    """Whether another process with this number runs; after a container restarts, its processes have the old numbers."""
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return number != os.getpid()


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
    if gfile.isdir(path):
        raise InputError(f"cannot write {path}: it is a folder")
    with writing(path):
        gfile.makedirs(gfile.folder_of(path))
        with gfile.open_binary(_temporary(path), "xb") as file:
            file.write(b"")
        remove(_temporary(path))


@contextlib.contextmanager
def new_folder(path: str) -> Iterator[str]:
    """Creates a folder atomically: the block writes into a temporary folder, which becomes `path` when it succeeds.

    Raises:
      InputError: `path` exists and is not an empty folder, or cannot be written.
    """
    path = os.path.expanduser(path).rstrip("/")
    if gfile.exists(path) and (not gfile.isdir(path) or gfile.listdir(path)):
        raise InputError(f"{path} already exists: name a new folder")
    with replacing(path) as temporary:
        yield temporary


def read_file(path: str, max_bytes: int = MAX_BYTES) -> bytes:
    """Returns the contents of a file.

    Raises:
      InputError: the file cannot be read, or is larger than `max_bytes`.
    """
    try:
        there = os.path.expanduser(path)
        if (num_bytes := gfile.size(there)) > max_bytes:
            raise InputError(f"{path} holds {num_bytes:,} bytes, and may hold {max_bytes:,} at most")
        with gfile.patience(there), gfile.open_binary(there, "rb") as file:
            return file.read()
    except file_errors() as error:
        raise InputError(f"cannot read {path} ({first_line(error)})") from error


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
            with gfile.patience(path), gfile.open_binary(path, "ab") as file:
                file.write(f"{line}\n".encode())


def _append_local(path: str, data: bytes) -> None:
    # A link may lead to a file that is not ours, whose last line would be cut off.
    with open(path, "ab+", buffering=0, opener=lambda path, flags: os.open(path, flags | os.O_NOFOLLOW, 0o666)) as file:
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
    """Returns the first line of an exception's message, or what to do about a refusal of Google Cloud Storage.

    TensorFlow puts details on further lines.
    """
    return gfile.store_reason(error) or (str(error).splitlines() or [type(error).__name__])[0]


def listed(names: Iterable[str], most: int = 8) -> str:
    """Returns names for an error message, which is one line: the first ones, and how many more there are."""
    names = list(names)
    shown = [quoted(name) for name in names[:most]]
    rest = [f"{len(names) - most} others"] if len(names) > most else []
    return ", ".join(shown + rest) or "none"
