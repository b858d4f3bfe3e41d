"""Checkpoints: one safetensors file each, complete or absent, with a digest of what it holds.

`checkpoints/step_00001000.safetensors` holds the arrays by name, and in its header a SHA-256 over all of them. A file
is written beside and renamed, so that a reader never sees half of one.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping

import numpy as np
import safetensors
import safetensors.numpy
import tensorflow as tf

from diffusion_tf.errors import InputError
from diffusion_tf.files import first_line, read_file, write_file

_NAME = re.compile(r"step_(\d{8,})\.safetensors")


def save(folder: str, step: int, arrays: Mapping[str, np.ndarray]) -> str:
    """Writes the checkpoint of `step` and returns its path."""
    path = checkpoint_path(folder, step)
    write_file(path, safetensors.numpy.save(dict(arrays), {"sha256": _digest(arrays)}))
    return path


def load(path: str) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint, verified against its digest.

    Raises:
      InputError: the file is missing, is no checkpoint, or is damaged.
    """
    data = read_file(path)
    advice = "remove it to go on from the one before"
    try:
        arrays = safetensors.numpy.load(data)
        metadata = _metadata(data)
    except (safetensors.SafetensorError, ValueError) as error:
        raise InputError(f"{path} is no checkpoint, or is damaged ({error}): {advice}") from error
    if metadata.get("sha256") != _digest(arrays):
        raise InputError(f"{path} is damaged, its contents do not match their SHA-256: {advice}")
    return arrays


def load_digest(path: str) -> str:
    """The SHA-256 of the arrays that the checkpoint at `path` holds, as its header states it: its identity.

    Raises:
      InputError: the file is missing, or is no checkpoint.
    """
    try:
        with tf.io.gfile.GFile(path, "rb") as file:
            header_size = file.read(8)
            return _metadata(header_size + file.read(int.from_bytes(header_size, "little")))["sha256"]
    except (tf.errors.OpError, OSError, ValueError, KeyError) as error:
        raise InputError(f"cannot read the checkpoint {path} ({first_line(error)})") from error


def checkpoint_path(folder: str, step: int) -> str:
    """Where the checkpoint of `step` lies, or would lie."""
    return os.path.join(folder, f"step_{step:08d}.safetensors")


def all_steps(folder: str) -> list[int]:
    """The steps that have a checkpoint in `folder`, ascending."""
    names = tf.io.gfile.listdir(folder) if tf.io.gfile.isdir(folder) else []
    return sorted(int(match[1]) for match in map(_NAME.fullmatch, names) if match)


def find(folder: str, step: int | None = None) -> tuple[int, str]:
    """(step, path) of the checkpoint of `step`, or of the newest; the best one counts too.

    Raises:
      InputError: there is none; the message lists those that there are.
    """
    best = os.path.join(folder, "best")
    paths = {found: checkpoint_path(place, found) for place in (best, folder) for found in all_steps(place)}
    if not paths or (step is not None and step not in paths):
        wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        raise InputError(f"{folder} holds {wanted}; there are: {', '.join(map(str, sorted(paths))) or 'none'}")
    step = max(paths) if step is None else step
    return step, paths[step]


def copy_into(folder: str, path: str) -> str:
    """Copies the checkpoint at `path` to `folder`, in place of those there, and returns the copy's path.

    Raises:
      InputError: it cannot be read, or the copy not written.
    """
    before = all_steps(folder)
    copy = os.path.join(folder, os.path.basename(path))
    write_file(copy, read_file(path))
    for step in before:
        if checkpoint_path(folder, step) != copy:
            tf.io.gfile.remove(checkpoint_path(folder, step))
    return copy


def remove_old(folder: str, *, keep: int, keep_every: int) -> None:
    """Removes all but the newest `keep` checkpoints and, with `keep_every` > 0, those at its multiples."""
    for step in all_steps(folder)[:-keep]:
        if not keep_every or step % keep_every:
            tf.io.gfile.remove(checkpoint_path(folder, step))


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()


def _metadata(data: bytes) -> dict[str, str]:
    header_size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + header_size]).get("__metadata__", {})
