"""A cache of pictures as TFRecords: after the first start, training reads at the speed of TFRecords.

The folder's name is a hash of what its contents depend on: the path of the pictures, their names, sizes and times of
change, their labels, and how they are converted. So other pictures or settings have another folder, and a folder may
be removed at any time. Shards are verified as they are written, and an interrupted preparation continues where it
stopped.
"""

import contextlib
import dataclasses
import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

from diffusion_tf.data.cache_layout import MANIFEST, MAX_THREADS, cache_digest, cache_root, num_cache_shards
from diffusion_tf.data.fitting import Fitting
from diffusion_tf.data.image_folders import EncodedImages, counts
from diffusion_tf.data.prepare_tfrecords import (
    all_skipped,
    check_manifest,
    make_shards,
    missing_shards,
    read_manifest,
    write_shards,
)
from diffusion_tf.data.source import ImageSource
from diffusion_tf.data.tfrecords import tfrecord_source
from diffusion_tf.errors import ConfigError, InputError
from diffusion_tf.progress_bar import print_line
from diffusion_tf.storage.files import UNSUPPORTED, check_writable, listed, remove

_LOCK = "lock"


def cached_source(
    images: EncodedImages,
    name: str,
    fitting: Fitting,
    *,
    cache_dir: str | None,
    skip_bad_images: int,
    make_executor: Callable[[int], Executor] = ThreadPoolExecutor,
) -> ImageSource:
    """Opens pictures through the cache, which is written where it is missing; prints a line about either.

    Args:
      images: the pictures.
      name: what they are, for messages.
      fitting: how they are converted.
      cache_dir: the folder of all caches; default: diffusion_tf in XDG_CACHE_HOME or ~/.cache.
      skip_bad_images: the number of unreadable pictures to leave out.
      make_executor: make_executor(num_workers) runs the workers.

    Raises:
      InputError: a picture cannot be read, or the cache cannot be written.
    """
    root, digest, count = cache_root(cache_dir), cache_digest(images, fitting), len(images.keys)
    folder = os.path.join(root, digest)
    manifest_path, settings = os.path.join(folder, MANIFEST), {"num_images": count, "sha256": digest}
    prefix = os.path.join(folder, "images-")
    pattern = f"{prefix}*.tfrecords"
    shards = make_shards(images, prefix, num_cache_shards(count), fitting, skip_bad_images, threading.Event())
    manifest = read_manifest(manifest_path, settings, shards)
    is_new = manifest is None or bool(missing_shards(shards, manifest))
    if manifest is None or is_new:
        try:
            check_writable(manifest_path)
        except InputError as error:
            raise ConfigError("cache_dir", f"={root}: {error}: name a folder that can be written") from error
        with _lock(folder):
            if not read_manifest(manifest_path, settings, shards):
                _empty(folder)  # what is there is damaged
            executor = make_executor(min(MAX_THREADS, os.cpu_count() or 1))
            manifest = write_shards(shards, pattern, manifest_path, settings, executor)
    check_manifest(manifest, images, skip_bad_images)
    print_line(_summary(images, name, fitting, manifest, folder, is_new=is_new))
    advice = f"remove the folder {folder}, and it is written again"
    source = tfrecord_source(pattern, fitting.image_shape, 0, classes=images.classes, advice=advice)
    return dataclasses.replace(source, name=name)


@contextlib.contextmanager
def _lock(folder: str) -> Iterator[None]:
    """Waits until no other process writes into a folder, and keeps others from it."""
    with open(os.path.join(folder, _LOCK), "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print_line(f"waiting for another process, which writes {folder}")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
        yield


def _empty(folder: str) -> None:
    """Removes all files of a folder but its lock."""
    for name in os.listdir(folder):
        if name != _LOCK:
            remove(os.path.join(folder, name))


def _summary(
    images: EncodedImages, name: str, fitting: Fitting, manifest: dict[str, Any], folder: str, *, is_new: bool
) -> str:
    """A line about what was prepared, or is read from the cache."""
    entries, skipped = manifest["shards"].values(), all_skipped(manifest)
    enlarged = sum(entry.get("enlarged", 0) for entry in entries)
    height, width, _ = fitting.image_shape
    count = sum(entry["records"] for entry in entries)
    parts = [f"{name}: {count:,} {'picture' if count == 1 else 'pictures'}"]
    parts += [f"{enlarged:,} were smaller than {height}x{width} and are enlarged"] if enlarged else []
    parts += [f"{len(skipped)} cannot be read ({listed(skipped)})"] if skipped else []
    parts += [f"left out, since they are not pictures: {counts(images.left_out)}"] if is_new and images.left_out else []
    return "; ".join([*parts, f"{'written to' if is_new else 'read from'} the cache {folder}"])
