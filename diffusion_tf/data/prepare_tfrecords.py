"""Writes images as sharded TFRecords by several workers; an interrupted run continues where it stopped.

`prepare` is for files of StyleGAN's format in a folder of the user's, `write_shards` for any shards. A worker writes a
whole shard to a temporary path and reads it back. Only the main process renames it and records it in the manifest, a
JSON file, so every shard that is missing from the manifest is still to be written.

Workers are processes or threads. Every process imports TensorFlow, which takes seconds. Spawning repeats the imports of
the main program anyway, and TensorFlow's writer has a fast CRC32C and writes to gs://.
"""

import contextlib
import hashlib
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import tensorflow as tf

from diffusion_tf.data.cache_layout import IMAGES_PER_SHARD, shard_bounds
from diffusion_tf.data.fitting import Fitting
from diffusion_tf.data.image_folders import EncodedImages
from diffusion_tf.data.tfrecord_shards import Shard, check_skipped, write_shard
from diffusion_tf.errors import ConfigError, DamagedFileError, InputError
from diffusion_tf.progress_bar import progress_bar
from diffusion_tf.storage.files import check_writable, writing
from diffusion_tf.storage.json_files import read_json, write_json

_MIN_SHARDS = 16


def spawn_workers(num_workers: int) -> Executor:
    """Returns an executor of worker processes; each ends when the main process does."""
    spawn = multiprocessing.get_context("spawn")  # TensorFlow does not survive a fork
    return ProcessPoolExecutor(num_workers, spawn, initializer=_start_worker)


def prepare(
    images: EncodedImages,
    out: str,
    *,
    name: str,
    resolution: int,
    num_shards: int | None,
    num_workers: int,
    skip_bad_images: int,
    make_executor: Callable[[int], Executor] = spawn_workers,
) -> tuple[str, dict[str, Any]]:
    """Writes the missing shards NAME-rRR-00000-of-NNNNN.tfrecords, where RR is log2(resolution).

    Args:
      images: the images.
      out: the folder to write to; may be gs://.
      name: the beginning of the names of the shards and of the manifest.
      resolution: height and width of the images as written, a power of two.
      num_shards: number of files; default: one for each 4,096 images, but at least 16.
      num_workers: number of worker processes.
      skip_bad_images: the number of unreadable images to leave out.
      make_executor: make_executor(num_workers) runs the workers.

    Returns:
      (the glob of the shards, the manifest).

    Raises:
      InputError: a value is out of range, `out` was begun with other settings or cannot be written, or an image cannot
        be read.
    """
    count = len(images.keys)
    num_shards = num_shards or min(count, max(_MIN_SHARDS, -(-count // IMAGES_PER_SHARD)))
    _check(out=out, name=name, resolution=resolution, num_shards=num_shards, count=count)
    folder = os.path.expanduser(out)
    prefix = os.path.join(folder, f"{name}-r{resolution.bit_length() - 1:02d}-")
    settings = {
        "source": images.path,
        "num_images": count,
        "names_sha256": hashlib.sha256("\n".join(images.keys).encode("utf-8", "surrogateescape")).hexdigest(),
        "resolution": resolution,
        "num_shards": num_shards,
    }
    pattern = f"{prefix}*.tfrecords"
    manifest = write_shards(
        make_shards(images, prefix, num_shards, Fitting((resolution, resolution, 3)), skip_bad_images),
        pattern,
        os.path.join(folder, f"{name}.json"),
        settings,
        make_executor(num_workers),
    )
    check_manifest(manifest, images, skip_bad_images)
    return pattern, manifest


def make_shards(
    images: EncodedImages,
    prefix: str,
    num_shards: int,
    fitting: Fitting,
    skip_bad_images: int,
    stopped: threading.Event | None = None,
) -> list[Shard]:
    """Divides images into the shards PREFIX00000-of-NNNNN.tfrecords of equal size.

    Args:
      images: the images.
      prefix: the beginning of the shards' paths.
      num_shards: the number of shards.
      fitting: how the images get their size.
      skip_bad_images: the number of unreadable images to leave out.
      stopped: ends the writing when it is set, for workers that are threads.
    """
    bounds = shard_bounds(len(images.keys), num_shards)
    return [
        Shard(
            f"{prefix}{shard:05d}-of-{num_shards:05d}.tfrecords",
            images.select(range(bounds[shard], bounds[shard + 1])),
            fitting,
            skip_bad_images,
            stopped,
        )
        for shard in range(num_shards)
    ]


def write_shards(
    shards: list[Shard], pattern: str, manifest_path: str, settings: dict[str, Any], executor: Executor
) -> dict[str, Any]:
    """Writes the shards that are missing, and returns the manifest.

    Args:
      shards: all shards, of the same images.
      pattern: the glob of the shards.
      manifest_path: the manifest, beside the shards; written here if it is new.
      settings: what the shards were made from, with `num_images`; an existing manifest must have the same.
      executor: runs the workers.

    Raises:
      InputError: the manifest has other settings or cannot be written, or an image cannot be read.
    """
    manifest = _open_manifest(manifest_path, settings, shards, pattern)
    try:
        _write_missing(shards, manifest_path, manifest, executor)
    except BaseException:
        for shard in shards:
            with contextlib.suppress(tf.errors.OpError):
                shard.remove_temporary()
        raise
    return manifest


def _check(*, out: str, name: str, resolution: int, num_shards: int, count: int) -> None:
    if resolution < 4 or resolution.bit_count() != 1:
        raise ConfigError("resolution", f"={resolution} must be a power of two, 4 or more")
    if num_shards > count:
        raise ConfigError("num_shards", f"={num_shards} is more than the {count} images")
    if not re.fullmatch(r"[\w.-]+", name):
        raise ConfigError("name", f"={name}: letters, digits, '.', '_' and '-' only, since files are named after it")
    if re.search(r"[*?\[\]\\]", out):
        raise ConfigError("out", f"={out}: without * ? [ ] \\, since it becomes part of a glob")
    if re.search(r"[\udc80-\udcff]", out):  # Python's stand-ins for other bytes
        raise ConfigError("out", f"={out}: must be UTF-8, since TensorFlow opens no other names")


def _open_manifest(path: str, settings: dict[str, Any], shards: list[Shard], pattern: str) -> dict[str, Any]:
    """Returns the manifest at `path`, which is written if it is new.

    Args:
      path: the manifest.
      settings: the settings that an existing manifest must have.
      shards: the shards of this run.
      pattern: the glob of the shards.

    Raises:
      InputError: the manifest is damaged or has other settings, or a file that matches `pattern` is not in it.
    """
    check_writable(path)
    manifest, known = {**settings, "shards": {}}, set()
    if tf.io.gfile.exists(path):
        known = {shard.path for shard in shards}
        manifest = _read_manifest(path, settings, {os.path.basename(shard) for shard in known})
    foreign = sorted(set(tf.io.gfile.glob(pattern)) - known)
    if foreign:  # training would read it too
        raise InputError(f"{foreign[0]} exists but is not in {path}: remove it, or choose another `out`")
    write_json(path, manifest)
    return manifest


def _read_manifest(path: str, settings: dict[str, Any], shards: set[str]) -> dict[str, Any]:
    """Reads the manifest of an earlier run with these settings and shards.

    Raises:
      InputError: it is damaged, or of other settings or shards.
    """
    try:
        manifest = read_json(path)
        if not _is_manifest(manifest, settings):
            raise DamagedFileError("another structure")
    except DamagedFileError as error:
        raise InputError(f"{path} is not a manifest of this program: choose another `out` or `name`") from error
    differences = [f"{key}: {value} != {manifest[key]}" for key, value in settings.items() if value != manifest[key]]
    if differences:
        raise InputError(
            f"{path} was begun with other settings ({'; '.join(differences)}, asked != there): repeat its flags,"
            " or choose another `out` or `name`"
        )
    unknown = sorted(set(manifest["shards"]) - shards)
    if unknown:
        raise InputError(f"{path} lists {unknown[0]}, which is not of this run: choose another `out` or `name`")
    return manifest


def _is_manifest(value: Any, settings: dict[str, Any]) -> bool:
    """Whether a JSON value has the fields of a manifest, and each of them the type that this program writes."""
    fields: dict[str, type] = {key: type(setting) for key, setting in settings.items()}
    entry_fields: dict[str, type] = {"records": int, "bytes": int, "sha256": str, "skipped": dict}
    return _has_types(value, {**fields, "shards": dict}) and all(
        (_has_types(entry, entry_fields) or _has_types(entry, {**entry_fields, "enlarged": int}))
        and _has_types(entry["skipped"], dict.fromkeys(entry["skipped"], str))
        for entry in value["shards"].values()
    )


def _has_types(value: Any, types: Mapping[str, type]) -> bool:
    """Whether a JSON value is an object with these keys and values of these types."""
    return isinstance(value, dict) and {key: type(item) for key, item in value.items()} == types


def _write_missing(shards: list[Shard], manifest_path: str, manifest: dict[str, Any], executor: Executor) -> None:
    """Writes the shards that `manifest` does not have, and adds each to it.

    Args:
      shards: all shards.
      manifest_path: the manifest.
      manifest: its contents, which are updated.
      executor: runs the workers.

    Raises:
      InputError: a worker failed.
    """
    entries = manifest["shards"]
    missing = missing_shards(shards, manifest)
    total = manifest["num_images"]
    done = total - sum(len(shard.images.keys) for shard in missing)
    others = set(multiprocessing.active_children())
    with progress_bar(initial=done, total=total, unit="image", desc="writing") as bar, executor:
        try:
            futures = {executor.submit(write_shard, shard): shard for shard in missing}
            for future in as_completed(futures):
                shard, entry = futures[future], future.result()
                for key, reason in entry["skipped"].items():
                    bar.write(f"skipped {key}: {reason}", file=sys.stderr)
                entries[os.path.basename(shard.path)] = entry
                check_skipped(all_skipped(manifest), shard.images, shard.skip_bad_images)
                if entry["records"]:
                    _publish(shard)
                write_json(manifest_path, {**manifest, "shards": dict(sorted(entries.items()))})
                bar.update(len(shard.images.keys))
        except BaseException as error:
            executor.shutdown(wait=False, cancel_futures=True)
            for shard in shards:
                shard.stop()
            for worker in set(multiprocessing.active_children()) - others:
                worker.terminate()  # the executor would wait minutes for the shards in progress
            if isinstance(error, BrokenProcessPool):
                raise InputError(
                    "a worker died (short of memory, a damaged LMDB, or the disk of `source` lost?): repeat the command"
                    " to continue; a smaller `num_workers` needs less memory"
                ) from error
            raise


def read_manifest(path: str, settings: dict[str, Any], shards: list[Shard]) -> dict[str, Any] | None:
    """Returns the manifest at `path` if there is one of these settings and shards, else None."""
    try:
        return _read_manifest(path, settings, {os.path.basename(shard.path) for shard in shards})
    except InputError:
        return None


def missing_shards(shards: list[Shard], manifest: dict[str, Any]) -> list[Shard]:
    """Returns the shards that a manifest does not list, or whose files are lost."""
    entries = manifest["shards"]
    return [shard for shard in shards if not _is_whole(shard.path, entries.get(os.path.basename(shard.path)))]


def check_manifest(manifest: dict[str, Any], images: EncodedImages, skip_bad_images: int) -> None:
    """Raises ConfigError if a manifest of `images` leaves out all of them, or more than `skip_bad_images`."""
    check_skipped(all_skipped(manifest), images, skip_bad_images)
    if not any(entry["records"] for entry in manifest["shards"].values()):
        raise ConfigError(images.setting, f"={images.path}: none of its {len(images.keys):,} images can be read")


def all_skipped(manifest: dict[str, Any]) -> dict[str, str]:
    """Returns the images that a manifest's shards leave out, with the reasons."""
    return {key: reason for entry in manifest["shards"].values() for key, reason in entry["skipped"].items()}


def _is_whole(path: str, entry: dict[str, Any] | None) -> bool:
    """Whether a shard is in the manifest, and its file has the size stated there; one without records has no file."""
    if entry is None or not tf.io.gfile.exists(path):
        return entry is not None and entry["records"] == 0
    return tf.io.gfile.stat(path).length == entry["bytes"]


def _publish(shard: Shard) -> None:
    with writing(shard.path):
        tf.io.gfile.rename(shard.temporary, shard.path, overwrite=True)


def _start_worker() -> None:
    def follow_parent() -> None:
        multiprocessing.parent_process().join()  # type: ignore[union-attr]
        os._exit(1)  # after a kill of the main process, the worker would write the same file as the next run's

    threading.Thread(target=follow_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C and ends its workers
    tf.config.set_visible_devices([], "GPU")
