"""Checkpoints: one safetensors file each, complete or absent, with a manifest and a checksum.

`checkpoints/step_00001000.safetensors` holds the arrays by name. The entry `manifest` in its header states the format,
the step, the versions of the packages that wrote it, whatever else the run records, and a SHA-256 over the arrays and
the rest of the manifest. Format 1, whose header holds only the SHA-256, can still be read.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import safetensors.numpy
from absl import logging

from diffusion_tf import __version__
from diffusion_tf.errors import DamagedFileError, DivergedError, InputError
from diffusion_tf.storage.files import Arrays, copy_file, first_line, list_folder, listed, remove, write_file
from diffusion_tf.storage.npz_files import digest_arrays
from diffusion_tf.storage.safetensors_header import ArraySpec, Header, read_arrays, read_header

FORMAT = 2
_NAME = re.compile(r"step_(\d{8,})\.safetensors")
_UNFINISHED = re.compile(r"step_\d{8,}\.safetensors\..*tmp")
_ADVICE = "remove it, or name another"


def packages() -> dict[str, str]:
    """Returns the versions of the packages that compute the steps of training under TensorFlow, by name."""
    import keras
    import tensorflow as tf

    return {
        "diffusion_tf": __version__,
        "keras": keras.__version__,
        "numpy": np.__version__,
        "tensorflow": tf.__version__,
    }


def save(
    folder: str,
    step: int,
    arrays: Mapping[str, np.ndarray],
    manifest: Mapping[str, Any] | None = None,
    written_by: Mapping[str, str] | None = None,
) -> str:
    """Writes the checkpoint of `step` and returns its path.

    Args:
      folder: the folder of checkpoints.
      step: training steps taken.
      arrays: the arrays by name.
      manifest: further entries of the manifest, as JSON values.
      written_by: the versions of the packages that computed the arrays; default: `packages()`.

    Raises:
      InputError: the file cannot be written.
      DivergedError: a value is not finite; nothing is written.
    """
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise DivergedError(f"the checkpoint of step {step} was not written: {name} is not finite")
    size = sum(array.nbytes for array in arrays.values())
    versions = dict(written_by or packages())
    manifest = {**(manifest or {}), "format": FORMAT, "step": step, "num_bytes": size, "packages": versions}
    manifest["sha256"] = _digest(arrays, manifest)
    path = checkpoint_path(folder, step)
    # One metadata entry: the library writes several in random order, and equal checkpoints must be equal files.
    write_file(path, safetensors.numpy.save(dict(arrays), {"manifest": json.dumps(manifest, sort_keys=True)}))
    return path


def load(path: str, max_bytes: int | None = None) -> Arrays:
    """Reads the arrays of a checkpoint and verifies its checksum.

    Args:
      path: the file.
      max_bytes: the most that the arrays may take, checked before they are read; default: no limit.

    Raises:
      InputError: the file cannot be read, its arrays are too large, or its format is newer than this version's.
      DamagedFileError: the file is not a checkpoint, or is damaged.
    """
    manifest, header = _read_header(path)
    if max_bytes is not None and header.array_bytes > max_bytes:
        raise InputError(
            f"{path} holds another network: its arrays take {header.array_bytes:,} bytes, not {max_bytes:,}"
        )
    try:
        arrays = read_arrays(path, header, "checkpoint")
    except DamagedFileError as error:
        raise DamagedFileError(f"{error}: {_ADVICE}") from error
    if manifest.get("sha256") != _digest(arrays, manifest):
        raise DamagedFileError(f"{path} is damaged, its contents do not match their SHA-256: {_ADVICE}")
    if manifest.get("format", 1) not in (1, FORMAT):
        raise InputError(f"{path} is of format {manifest['format']}, and this version reads up to {FORMAT}: update it")
    return arrays


def load_manifest(path: str) -> dict[str, Any]:
    """Returns the manifest of the checkpoint at `path` as its header states it; only `load` verifies it.

    Raises:
      InputError: the file cannot be read.
      DamagedFileError: the file is not a checkpoint, or its header is damaged.
    """
    return _read_header(path)[0]


def load_digest(path: str) -> str:
    """Returns the SHA-256 that identifies the checkpoint at `path`, as its header states it.

    Raises:
      InputError: as in `load_manifest`.
    """
    return str(load_manifest(path).get("sha256"))


def checkpoint_path(folder: str, step: int) -> str:
    """Returns the path of the checkpoint of `step`, whether or not it exists."""
    return os.path.join(folder, f"step_{step:08d}.safetensors")


def all_steps(folder: str) -> list[int]:
    """Returns the steps of all checkpoints in `folder`, ascending."""
    return sorted(int(match[1]) for match in map(_NAME.fullmatch, list_folder(folder)) if match)


def find(folder: str, step: int | None = None) -> tuple[int, str]:
    """Returns (step, path) of the checkpoint of `step`, by default of the newest; `folder`/best is searched too.

    Raises:
      InputError: there is no such checkpoint; the message lists the steps that exist.
    """
    best = os.path.join(folder, "best")
    paths = {found: checkpoint_path(place, found) for place in (best, folder) for found in all_steps(place)}
    if not paths or (step is not None and step not in paths):
        wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        raise InputError(f"{folder} holds {wanted}; there are: {', '.join(map(str, sorted(paths))) or 'none'}")
    step = max(paths) if step is None else step
    return step, paths[step]


def restore_newest(folder: str, restore: Callable[[str], None]) -> str | None:
    """Calls `restore` with the path of the newest undamaged checkpoint, and returns that path.

    Returns None if there are no checkpoints. Damaged ones are named in a warning and kept.

    Raises:
      InputError: all checkpoints are damaged, or `restore` raises it.
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
        raise InputError(f"{folder} holds only damaged checkpoints, of steps {steps}: remove them")
    return None


def copy_into(folder: str, path: str) -> str:
    """Replaces the checkpoints in `folder` by a copy of the one at `path`, and returns the path of the copy.

    Raises:
      InputError: the copy cannot be made, or the checkpoint is damaged; those in `folder` stay.
    """
    before = all_steps(folder)
    copy = os.path.join(folder, os.path.basename(path))
    copy_file(path, copy)
    load(copy)
    for step in before:
        if checkpoint_path(folder, step) != copy:
            remove(checkpoint_path(folder, step))
    return copy


def remove_old(folder: str, *, keep: int, keep_every: int, sound: set[int] | None = None) -> None:
    """Removes old checkpoints, but never an undamaged one in favour of a damaged one.

    Args:
      folder: the folder of checkpoints.
      keep: the number of undamaged checkpoints to keep; everything newer than the oldest of them stays too.
      keep_every: checkpoints at multiples of this step are kept forever; 0: none.
      sound: steps whose checkpoints were verified before; newly verified steps are added.
    """
    sound = set() if sound is None else sound
    count = 0
    for step in reversed(all_steps(folder)):
        if count < keep:
            if step in sound or _is_sound(checkpoint_path(folder, step)):
                sound.add(step)
                count += 1
        elif not keep_every or step % keep_every:
            remove(checkpoint_path(folder, step))


def remove_unfinished(folder: str) -> None:
    """Removes half-written files of an earlier process; only the process that owns the run may call this."""
    for name in list_folder(folder):
        if _UNFINISHED.fullmatch(name):
            remove(os.path.join(folder, name))


def _is_sound(path: str) -> bool:
    """Whether the checkpoint at `path` can be read; a damaged one is named in a warning."""
    try:
        load(path)
    except DamagedFileError as error:
        logging.warning("%s", error)
        return False
    return True


def _digest(arrays: Mapping[str, np.ndarray], manifest: Mapping[str, Any]) -> str:
    """Returns the SHA-256 over the arrays and the manifest without its own `sha256`."""
    stated = {name: value for name, value in manifest.items() if name != "sha256"}
    return digest_arrays(arrays, json.dumps(stated, sort_keys=True).encode() if stated else b"")  # format 1: none


def _read_header(path: str) -> tuple[dict[str, Any], Header]:
    """Returns the manifest and the header of the checkpoint at `path`."""
    try:
        header = read_header(path, "checkpoint")
    except DamagedFileError as error:
        raise DamagedFileError(f"{error}: {_ADVICE}") from error
    metadata = header.metadata
    try:
        manifest = {**(json.loads(metadata["manifest"]) if "manifest" in metadata else metadata)}  # no pairs in a list
    except (ValueError, TypeError, RecursionError) as error:
        raise DamagedFileError(f"{path} is not a checkpoint, or is damaged ({first_line(error)}): {_ADVICE}") from error
    return manifest, header


def check_specs(found: Mapping[str, ArraySpec], wanted: Mapping[str, ArraySpec], path: str) -> None:
    """Checks that a file holds exactly the arrays of a network.

    Args:
      found: dtype and shape of each array in the file, by name.
      wanted: dtype and shape of each array of the network.
      path: the file, for the message.

    Raises:
      InputError: a name is missing or unknown, or a dtype or shape differs.
    """
    if missing := [name for name in wanted if name not in found]:
        raise InputError(f"{path} holds another network: {missing[0]} is missing; there are: {listed(found)}")
    if unknown := [name for name in found if name not in wanted]:
        raise InputError(f"{path} holds another network: {unknown[0]} is unknown")
    for name, (dtype, shape) in wanted.items():
        if found[name] != (dtype, shape):
            found_dtype, found_shape = found[name]
            raise InputError(
                f"{path} holds another network: {name} is {found_dtype} {found_shape}, not {dtype} {shape}"
            )


def assign_arrays(
    variables: Mapping[str, Any],
    arrays: Arrays,
    path: str,
    assign: Callable[[Any, np.ndarray], object] = lambda variable, array: variable.assign(array),
) -> None:
    """Assigns arrays to tf.Variables by name; floating-point arrays must be float32.

    Args:
      variables: the variables.
      arrays: their values, of which all are there, and no others.
      path: the file that they are from, for messages.
      assign: assigns an array of the variable's dtype to a variable.

    Raises:
      InputError: the arrays are not those of the variables; no variable has changed.
    """
    found = {name: ArraySpec(array.dtype.name, array.shape) for name, array in arrays.items()}
    wanted = {
        name: ArraySpec("float32" if variable.dtype.is_floating else variable.dtype.name, tuple(variable.shape))
        for name, variable in variables.items()
    }
    check_specs(found, wanted, path)
    for name, variable in variables.items():
        assign(variable, arrays[name].astype(variable.dtype.as_numpy_dtype))
