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
from diffusion_tf.files import read_file, write_file

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


def checkpoint_path(folder: str, step: int) -> str:
    """Where the checkpoint of `step` lies, or would lie."""
    return os.path.join(folder, f"step_{step:08d}.safetensors")


def all_steps(folder: str) -> list[int]:
    """The steps that have a checkpoint in `folder`, ascending."""
    names = tf.io.gfile.listdir(folder) if tf.io.gfile.isdir(folder) else []
    return sorted(int(match[1]) for match in map(_NAME.fullmatch, names) if match)


def find(folder: str, step: int | None = None) -> tuple[int, str]:
    """(step, path) of the checkpoint of `step`, or of the newest.

    Raises:
      InputError: there is none; the message lists those that there are.
    """
    steps = all_steps(folder)
    if not steps or (step is not None and step not in steps):
        wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        raise InputError(f"{folder} holds {wanted}; there are: {', '.join(map(str, steps)) or 'none'}")
    step = steps[-1] if step is None else step
    return step, checkpoint_path(folder, step)


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
