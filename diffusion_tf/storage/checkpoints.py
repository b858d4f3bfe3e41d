"""Checkpoints: one safetensors file each, complete or absent, with a manifest of what it holds.

`checkpoints/step_00001000.safetensors` holds the arrays by name. Its header states their sizes, and as `manifest` the
format, the step, a SHA-256 over the arrays and the rest of the manifest, the versions of the packages that wrote it,
and what else the run wants to know. A file is written beside, synced and renamed, so that a reader never sees half of
one. Files of format 1, whose header holds the SHA-256 alone, are read too.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import safetensors
import safetensors.numpy
import tensorflow as tf
from absl import logging

from diffusion_tf import __version__
from diffusion_tf.errors import DamagedFileError, DivergedError, InputError
from diffusion_tf.storage.files import copy_file, first_line, read_file, write_file

FORMAT = 2
PACKAGES = {
    "diffusion_tf": __version__,
    "keras": keras.__version__,
    "numpy": np.__version__,
    "tensorflow": tf.__version__,
}
_NAME = re.compile(r"step_(\d{8,})\.safetensors")
_MAX_HEADER_BYTES = 2**24  # a network of a thousand variables takes 2**19
_ADVICE = "remove it, or name another"


def save(folder: str, step: int, arrays: Mapping[str, np.ndarray], manifest: Mapping[str, Any] | None = None) -> str:
    """Writes the checkpoint of `step` and returns its path.

    Args:
      folder: where checkpoints lie.
      step: training steps taken.
      arrays: by name.
      manifest: what else to state in the manifest, as JSON can hold it.

    Raises:
      InputError: it cannot be written.
      DivergedError: a value is not finite, and nothing was written.
    """
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise DivergedError(f"the checkpoint of step {step} was not written: {name} is not finite")
    size = sum(array.nbytes for array in arrays.values())
    manifest = {**(manifest or {}), "format": FORMAT, "step": step, "num_bytes": size, "packages": PACKAGES}
    manifest["sha256"] = _digest(arrays, manifest)
    path = checkpoint_path(folder, step)
    # One entry, as the library writes several in no certain order.
    write_file(path, safetensors.numpy.save(dict(arrays), {"manifest": json.dumps(manifest, sort_keys=True)}))
    return path


def load(path: str, max_bytes: int | None = None) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint, verified against its digest.

    Args:
      path: the file.
      max_bytes: what the arrays may take, where the reader knows; it is checked before they are read.

    Raises:
      InputError: the file is missing, its arrays are larger, or its format is newer than this version.
      DamagedFileError: it is no checkpoint, or is damaged.
    """
    manifest, file_bytes, array_bytes = _read_header(path)
    if max_bytes is not None and array_bytes > max_bytes:
        raise InputError(f"{path} is of another network: its arrays take {array_bytes:,} bytes, not {max_bytes:,}")
    try:
        arrays = safetensors.numpy.load(read_file(path, file_bytes))
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise DamagedFileError(f"{path} is no checkpoint, or is damaged ({first_line(error)}): {_ADVICE}") from error
    if manifest.get("sha256") != _digest(arrays, manifest):
        raise DamagedFileError(f"{path} is damaged, its contents do not match their SHA-256: {_ADVICE}")
    if manifest.get("format", 1) not in (1, FORMAT):
        raise InputError(f"{path} is of format {manifest['format']}, and this version reads up to {FORMAT}: update it")
    return arrays


def load_manifest(path: str) -> dict[str, Any]:
    """The manifest of the checkpoint at `path`, as its header states it; `load` is what verifies it.

    Raises:
      InputError: the file is missing.
      DamagedFileError: it is no checkpoint, or is damaged.
    """
    return _read_header(path)[0]


def load_digest(path: str) -> str:
    """The SHA-256 of the checkpoint at `path`, as its header states it: its identity.

    Raises:
      InputError: as `load_manifest`.
    """
    return str(load_manifest(path).get("sha256"))


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


def restore_newest(folder: str, restore: Callable[[str], None]) -> str | None:
    """Calls `restore` with the path of the newest sound checkpoint, and returns that; None where there is none at all.

    Damaged ones are named in a warning, and stay where they are.

    Raises:
      InputError: all are damaged, or `restore` raises it.
    """
    steps = all_steps(folder)
    for step in reversed(steps):
        path = checkpoint_path(folder, step)
        try:
            restore(path)
        except DamagedFileError as error:
            logging.warning("going back to an older checkpoint: %s", error)
        else:
            return path
    if steps:
        raise InputError(f"{folder} holds no sound checkpoint, and damaged ones of the steps {steps}: remove them")
    return None


def copy_into(folder: str, path: str) -> str:
    """Copies the checkpoint at `path` to `folder`, in place of those there, and returns the copy's path.

    Raises:
      InputError: it cannot be read, or the copy not written; those there stay.
    """
    before = all_steps(folder)
    copy = os.path.join(folder, os.path.basename(path))
    copy_file(path, copy)
    load(copy)
    for step in before:
        if checkpoint_path(folder, step) != copy:
            tf.io.gfile.remove(checkpoint_path(folder, step))
    return copy


def remove_old(folder: str, *, keep: int, keep_every: int, sound: set[int] | None = None) -> None:
    """Removes all but the newest `keep` sound checkpoints and, with `keep_every` > 0, those at its multiples.

    Args:
      folder: where they lie.
      keep: how many sound ones; whatever is newer than the oldest of them stays, damaged or not.
      keep_every: multiples of this step stay for ever.
      sound: steps whose checkpoints were verified before; it learns those that are verified now.
    """
    sound = set() if sound is None else sound
    count = 0
    for step in reversed(all_steps(folder)):
        if count < keep:
            if step in sound or _is_sound(checkpoint_path(folder, step)):
                sound.add(step)
                count += 1
        elif not keep_every or step % keep_every:
            tf.io.gfile.remove(checkpoint_path(folder, step))


def remove_unfinished(folder: str) -> None:
    """Removes what a process left half written; only the run's own process may call this."""
    for path in tf.io.gfile.glob(os.path.join(folder, "step_*.safetensors.tmp")):
        tf.io.gfile.remove(path)


def _is_sound(path: str) -> bool:
    try:
        load(path)
    except DamagedFileError as error:
        logging.warning("%s", error)
        return False
    return True


def _digest(arrays: Mapping[str, np.ndarray], manifest: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    stated = {name: value for name, value in manifest.items() if name != "sha256"}
    if stated:  # format 1 has nothing else
        digest.update(json.dumps(stated, sort_keys=True).encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()


def _read_header(path: str) -> tuple[dict[str, Any], int, int]:
    """The manifest, the file's size, and the bytes of its arrays, once the header's own sizes agree with the file's."""
    try:
        with tf.io.gfile.GFile(path, "rb") as file:
            file_bytes = file.size()
            prefix = file.read(8)
            header_bytes = int.from_bytes(prefix, "little")
            if not header_bytes <= min(_MAX_HEADER_BYTES, file_bytes - 8):
                raise ValueError("no room for its header")
            header = json.loads(file.read(header_bytes))
        metadata = header.pop("__metadata__", {})
        manifest = dict(json.loads(metadata["manifest"]) if "manifest" in metadata else metadata)
        array_bytes = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if 8 + header_bytes + array_bytes != file_bytes:
            raise ValueError(
                f"it has {file_bytes:,} bytes, and its header speaks of {8 + header_bytes + array_bytes:,}"
            )
    except (tf.errors.OpError, OSError) as error:
        raise InputError(f"cannot read the checkpoint {path} ({first_line(error)})") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise DamagedFileError(f"{path} is no checkpoint, or is damaged ({first_line(error)}): {_ADVICE}") from error
    return manifest, file_bytes, array_bytes


def assign_arrays(variables: dict[str, tf.Variable], arrays: dict[str, np.ndarray], path: str) -> None:
    if mismatched := sorted(variables.keys() ^ arrays.keys()):
        what = "missing" if mismatched[0] in variables else "unknown"
        raise InputError(f"{path} is of another network: {mismatched[0]} is {what}")
    for name, variable in variables.items():
        found, shape = arrays[name], tuple(variable.shape)
        dtype = "float32" if variable.dtype.is_floating else variable.dtype.name
        if found.shape != shape or found.dtype != dtype:
            raise InputError(
                f"{path} is of another network: {name} is {found.dtype} {found.shape}, not {dtype} {shape}"
            )
    for name, variable in variables.items():
        variable.assign(tf.cast(arrays[name], variable.dtype))


def check_names_and_shapes(
    path: str, found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises InputError where the names and shapes of a file are not those of the network."""
    if mismatched := sorted(wanted.keys() ^ found.keys()):
        what = "missing" if mismatched[0] in wanted else "unknown"
        raise InputError(f"{path} is of another network: {mismatched[0]} is {what}")
    for name, shape in wanted.items():
        if found[name] != shape:
            raise InputError(f"{path} is of another network: {name} is {found[name]}, not {shape}")
