"""A cache of pictures as TFRecords: after the first start, training reads at the speed of TFRecords.

The folder's name is a hash of what its contents depend on: the path of the pictures, their names, sizes and times of
change, their labels, and how they are converted. So other pictures or settings have another folder, and a folder may
be removed at any time. Shards are verified as they are written, and an interrupted preparation continues where it
stopped.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

from diffusion_tf.data.fitting import Fitting
from diffusion_tf.data.image_folders import EncodedImages, counts
from diffusion_tf.data.prepare_tfrecords import (
    IMAGES_PER_SHARD,
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
from diffusion_tf.storage.files import UNSUPPORTED, cache_folder, check_writable, is_local, listed, remove

_VERSION = 1  # of the conversion of pictures: a cache of another version is not used
# Decoding and scaling release Python's global lock: two threads are nearly twice as fast as one. A process would first
# import TensorFlow, and run the script that called `train` again. Each thread may hold a picture of 1 GB.
_MAX_THREADS = 8
_LOCK = "lock"
_SMALL_SHARD = 64  # images: few pictures still become several shards, for the threads


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
    root, digest, count = _root(cache_dir), _digest(images, fitting), len(images.keys)
    folder = os.path.join(root, digest)
    manifest_path, settings = os.path.join(folder, "images.json"), {"num_images": count, "sha256": digest}
    num_shards = max(min(_MAX_THREADS, -(-count // _SMALL_SHARD)), -(-count // IMAGES_PER_SHARD))
    prefix = os.path.join(folder, "images-")
    pattern = f"{prefix}*.tfrecords"
    shards = make_shards(images, prefix, num_shards, fitting, skip_bad_images, threading.Event())
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
            executor = make_executor(min(_MAX_THREADS, os.cpu_count() or 1))
            manifest = write_shards(shards, pattern, manifest_path, settings, executor)
    check_manifest(manifest, images, skip_bad_images)
    print_line(_summary(images, name, fitting, manifest, folder, is_new=is_new))
    advice = f"remove the folder {folder}, and it is written again"
    source = tfrecord_source(pattern, fitting.image_shape, 0, classes=images.classes, advice=advice)
    return dataclasses.replace(source, name=name)


def _digest(images: EncodedImages, fitting: Fitting) -> str:
    """The SHA-256 of all that the contents of a cache depend on."""
    digest = hashlib.sha256()
    facts = (_VERSION, os.path.realpath(images.path), fitting, images.classes, list(images.labels))
    for fact in (*facts, *images.keys, *images.stamps()):
        digest.update(f"{fact}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _root(cache_dir: str | None) -> str:
    """The folder of all caches.

    Raises:
      ConfigError: TensorFlow cannot open files there.
    """
    cache_dir = cache_dir or cache_folder()
    root = os.path.abspath(os.path.expanduser(cache_dir))
    if not is_local(cache_dir) or re.search(r"[\udc80-\udcff]", root):  # Python's stand-ins for other bytes
        raise ConfigError("cache_dir", f"={cache_dir} must be a local folder with a name in UTF-8")
    return root


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
