"""Where the cache of a folder of pictures lies, and how its pictures are divided into files; needs no TensorFlow."""

import hashlib
import os
import re
from typing import TypedDict

from diffusion_tf.data.fitting import Fitting
from diffusion_tf.data.image_folders import EncodedImages
from diffusion_tf.errors import ConfigError, InputError
from diffusion_tf.storage.files import cache_folder, is_local
from diffusion_tf.storage.json_files import read_json

MANIFEST = "images.json"
# Decoding and scaling release Python's global lock: two threads are nearly twice as fast as one. A process would first
# import TensorFlow, and run the script that called `train` again. Each thread may hold a picture of 1 GB.
MAX_THREADS = 8
# A killed run loses at most one shard per worker, and training's shuffle buffer holds 5,461 images of 256x256.
IMAGES_PER_SHARD = 4096
_SMALL_SHARD = 64  # images: few pictures still become several shards, for the threads
_VERSION = 1  # of the conversion of pictures: a cache of another version is not used


class _Shard(TypedDict):
    """A file of a cache."""

    records: int
    bytes: int


class _Manifest(TypedDict):
    """The manifest of a cache, as far as `cached_files` reads it."""

    shards: dict[str, _Shard]


def cached_files(folder: str, num_images: int) -> list[str]:
    """Returns the files of a cache in their order, if it is there and holds all of `num_images` pictures, else none."""
    try:
        shards = read_json(os.path.join(folder, MANIFEST), _Manifest)["shards"]
        sizes = [os.path.getsize(os.path.join(folder, name)) for name in sorted(shards)]
    except (InputError, OSError):
        return []
    entries = [shards[name] for name in sorted(shards)]
    is_whole = len(entries) == num_cache_shards(num_images) and sizes == [entry["bytes"] for entry in entries]
    is_whole &= sum(entry["records"] for entry in entries) == num_images
    return [os.path.join(folder, name) for name in sorted(shards)] if is_whole else []


def cache_digest(images: EncodedImages, fitting: Fitting) -> str:
    """Returns the SHA-256 of all that the contents of a cache depend on, which names its folder."""
    digest = hashlib.sha256()
    facts = (_VERSION, os.path.realpath(images.path), fitting, images.classes, list(images.labels))
    for fact in (*facts, *images.keys, *images.stamps()):
        digest.update(f"{fact}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def cache_root(cache_dir: str | None) -> str:
    """Returns the folder of all caches: `cache_dir`, or the default.

    Raises:
      ConfigError: TensorFlow cannot open files there.
    """
    cache_dir = cache_dir or cache_folder()
    root = os.path.abspath(os.path.expanduser(cache_dir))
    if not is_local(cache_dir) or re.search(r"[\udc80-\udcff]", root):  # Python's stand-ins for other bytes
        raise ConfigError("cache_dir", f"={cache_dir} must be a local folder with a name in UTF-8")
    return root


def num_cache_shards(num_images: int) -> int:
    """Returns the number of files of a cache."""
    return max(min(MAX_THREADS, -(-num_images // _SMALL_SHARD)), -(-num_images // IMAGES_PER_SHARD))


def shard_bounds(num_images: int, num_shards: int) -> list[int]:
    """Returns the first image of each shard, and the number of images."""
    return [shard * num_images // num_shards for shard in range(num_shards + 1)]
