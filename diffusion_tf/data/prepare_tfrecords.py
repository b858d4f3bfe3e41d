"""StyleGAN's TFRecords of LSUN or of any images: made by many processes, resumed where they stopped, and read back.

A record holds `shape`, int64 [3] = (C, H, W), and `data`, the bytes of uint8 [C, H, W], as of StyleGAN's dataset_tool.
A worker writes a whole shard beside its place and reads it back; the main process alone puts it there and notes it in
the manifest NAME.json. So what the manifest lacks is what a killed run has yet to do.

Workers import TensorFlow, once each, which takes seconds: spawning repeats the main program's imports anyway, its
writer has a fast CRC32C and knows gs://, and what reads a shard back is the reader that training uses.
"""

import contextlib
import dataclasses
import hashlib
import io
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import tensorflow as tf
import tqdm

from diffusion_tf.data import open_source
from diffusion_tf.data.source import ImageReader
from diffusion_tf.errors import ConfigError, DamagedFileError, InputError
from diffusion_tf.presets import get_preset
from diffusion_tf.storage.files import check_writable, first_line, read_file, read_json, write_json

_EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
# A killed run loses no more than a shard of each worker, and training's shuffle buffer holds 5,461 images of 256x256.
_IMAGES_PER_SHARD = 4096
_MIN_SHARDS = 16
_READ_BACK_AT_ONCE = 64


@dataclasses.dataclass(frozen=True)
class Images:
    """Encoded images: of an LMDB by their keys as latin-1, in its order; of a folder by their paths in it, sorted."""

    path: str
    is_lmdb: bool
    keys: list[str]


@dataclasses.dataclass(frozen=True)
class Shard:
    """One worker's work: `images`, to become the file `path`."""

    path: str
    images: Images
    resolution: int
    skip_bad_images: int

    @property
    def temporary(self) -> str:
        """Where the worker writes it."""
        return f"{self.path}.tmp"


# --- The images --------------------------------------------------------------------------------------------


def find_images(source: str, limit: int | None = None) -> Images:
    """The first `limit` images, or all, of an LMDB's folder (with data.mdb) or of a folder of images at any depth.

    Raises:
      InputError: there is no such folder, it holds neither, or it cannot be read.
    """
    path = os.path.abspath(os.path.expanduser(source))
    if not os.path.isdir(path):
        what = "is a file (unpack it first)" if os.path.exists(path) else "does not exist"
        raise ConfigError("source", f"={source} {what}: name the folder of an LMDB (with data.mdb) or of images")
    is_lmdb = os.path.exists(os.path.join(path, "data.mdb"))
    if is_lmdb:
        with _open_lmdb(path) as transaction:
            keys = [key.decode("latin-1") for key in transaction.cursor().iternext(values=False)]
    else:
        keys = _list_folder(path)
    if not keys:
        raise ConfigError(
            "source", f"={source} holds no images: neither an LMDB (data.mdb) nor {', '.join(_EXTENSIONS)}"
        )
    return Images(path, is_lmdb, keys[:limit])


def _list_folder(path: str) -> list[str]:
    def refuse(error: OSError) -> None:  # os.walk would leave out what it cannot read
        raise ConfigError("source", f"={path} cannot be listed ({error})") from error

    files = (os.path.join(folder, file) for folder, _, names in os.walk(path, onerror=refuse) for file in names)
    return sorted(os.path.relpath(file, path) for file in files if file.lower().endswith(_EXTENSIONS))


@contextlib.contextmanager
def _open_lmdb(path: str) -> Iterator[Any]:
    try:
        import lmdb  # only LSUN's own files need it
    except ImportError as error:
        raise ConfigError("source", f"={path} is an LMDB, and lmdb is not installed: pip install lmdb") from error
    try:
        # lock=False: the folder may be read-only.
        with lmdb.open(path, readonly=True, lock=False, readahead=False) as database, database.begin() as transaction:
            yield transaction
    except lmdb.Error as error:
        raise ConfigError("source", f"={path} cannot be read as an LMDB ({error})") from error


def _encoded(images: Images) -> Iterator[tuple[str, bytes]]:
    if not images.is_lmdb:
        yield from ((key, read_file(os.path.join(images.path, key))) for key in images.keys)
        return
    with _open_lmdb(images.path) as transaction:
        for key in images.keys:
            encoded = transaction.get(key.encode("latin-1"))
            if encoded is None:
                raise ConfigError("source", f"={images.path} has lost its key {key}: is something writing it?")
            yield key, encoded


def prepare_image(encoded: bytes, resolution: int) -> np.ndarray:
    """One encoded image as StyleGAN's create_lsun makes it: uint8 [3, resolution, resolution], RGB.

    Its central square, scaled by Lanczos; upright where EXIF says how, as OpenCV decodes it there.

    Raises:
      Exception: of many kinds, where PIL cannot read it.
    """
    with PIL.Image.open(io.BytesIO(encoded)) as opened:
        image = PIL.ImageOps.exif_transpose(opened).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))  # resize(box=...) would read beyond the square's edges
    return np.asarray(square.resize((resolution, resolution), PIL.Image.Resampling.LANCZOS)).transpose(2, 0, 1)


def serialize(image: np.ndarray) -> bytes:
    """A uint8 [C, H, W] image as the record of a StyleGAN TFRecord; its length follows from the shape."""
    feature = {
        "shape": tf.train.Feature(int64_list=tf.train.Int64List(value=image.shape)),
        "data": tf.train.Feature(bytes_list=tf.train.BytesList(value=[image.tobytes()])),
    }
    example = tf.train.Example(features=tf.train.Features(feature=feature))
    return example.SerializeToString(deterministic=True)  # else the order of the two is left to chance


# --- One shard: a worker's part ----------------------------------------------------------------------------


def write_shard(shard: Shard) -> dict[str, Any]:
    """Writes `shard.temporary` and reads it back by `datasets`: its length, its CRCs, and all pixels.

    Returns:
      What the manifest says of it: records, bytes, sha256 of the file, and {key: reason} of images that were skipped.

    Raises:
      InputError: more than `skip_bad_images` are unreadable, or a file could not be read or written.
    """
    pixels, skipped, records = hashlib.sha256(), {}, 0
    try:
        with tf.io.TFRecordWriter(shard.temporary) as writer:
            for key, encoded in _encoded(shard.images):
                try:
                    image = prepare_image(encoded, shard.resolution)
                except Exception as error:
                    skipped[key] = "no image" if isinstance(error, PIL.UnidentifiedImageError) else first_line(error)
                    _refuse_skipped(skipped, shard)
                    continue
                writer.write(serialize(image))
                pixels.update(image.tobytes())
                records += 1
        if not records:
            raise InputError(f"{shard.path}: none of its {len(skipped)} images can be read: take fewer `num_shards`")
        if _pixels_read_back(shard, records) != pixels.digest():
            raise InputError(f"{shard.path} does not read back as it was written: is its disk sound?")
        with tf.io.gfile.GFile(shard.temporary, "rb") as file:
            sha256 = hashlib.sha256()
            while chunk := file.read(2**24):
                sha256.update(chunk)
            return {"records": records, "bytes": file.size(), "sha256": sha256.hexdigest(), "skipped": skipped}
    except (tf.errors.OpError, OSError) as error:  # TensorFlow's cannot be sent to the main process
        raise InputError(f"cannot write {shard.path} ({first_line(error)}): the same command goes on") from error


def _refuse_skipped(skipped: dict[str, str], shard: Shard) -> None:
    if len(skipped) > shard.skip_bad_images:
        key, reason = list(skipped.items())[-1]
        raise ConfigError(
            "source",
            f"={shard.images.path}: {key} cannot be read ({reason}), and `skip_bad_images` is"
            f" {shard.skip_bad_images}: `skip_bad_images=N` leaves out up to N",
        )


def _pixels_read_back(shard: Shard, records: int) -> bytes:
    """SHA-256 of all uint8 [C, H, W] that training would read."""
    preset = get_preset("lsun_church", image_size=shard.resolution, ch_mult=(1,), attn_resolutions=())
    source = open_source(preset, tfrecord=shard.temporary)
    if source.num_examples != records:
        raise InputError(f"{shard.path} reads back as {source.num_examples} records instead of {records}")
    read, pixels = ImageReader(source), hashlib.sha256()
    for first in range(0, records, _READ_BACK_AT_ONCE):
        images = read(first, min(_READ_BACK_AT_ONCE, records - first))
        pixels.update(images.transpose(0, 3, 1, 2).tobytes())
    return pixels.digest()


# --- All shards: the main process's part -------------------------------------------------------------------


def prepare(
    images: Images,
    out: str,
    *,
    name: str,
    resolution: int,
    num_shards: int | None,
    num_workers: int,
    skip_bad_images: int,
) -> tuple[str, dict[str, Any]]:
    """Writes what `out`, which may be gs://, lacks of NAME-rRR-00000-of-NNNNN.tfrecords, RR being log2(resolution).

    Args:
      images: what to write.
      out: the folder.
      name: what the names of the shards and of the manifest begin with.
      resolution: height and width of the images, a power of two.
      num_shards: how many files; default one for each 4,096 images, but 16 for fewer.
      num_workers: processes.
      skip_bad_images: how many images may be unreadable, and are then left out.

    Returns:
      (the glob of the shards, the manifest).

    Raises:
      InputError: a value is out of range, `out` is of other settings or cannot be written, or images cannot be read.
    """
    count = len(images.keys)
    num_shards = num_shards or min(count, max(_MIN_SHARDS, -(-count // _IMAGES_PER_SHARD)))
    _check(out, name=name, resolution=resolution, num_shards=num_shards, count=count)
    prefix = os.path.join(os.path.expanduser(out), f"{name}-r{resolution.bit_length() - 1:02d}-")
    bounds = [shard * count // num_shards for shard in range(num_shards + 1)]
    shards = [
        Shard(
            f"{prefix}{shard:05d}-of-{num_shards:05d}.tfrecords",
            dataclasses.replace(images, keys=images.keys[bounds[shard] : bounds[shard + 1]]),
            resolution,
            skip_bad_images,
        )
        for shard in range(num_shards)
    ]
    settings = {
        "source": images.path,
        "num_images": count,
        "names_sha256": hashlib.sha256("\n".join(images.keys).encode("utf-8", "surrogateescape")).hexdigest(),
        "resolution": resolution,
        "num_shards": num_shards,
    }
    manifest_path = os.path.join(os.path.expanduser(out), f"{name}.json")
    manifest = _open_manifest(manifest_path, settings, shards, f"{prefix}*.tfrecords")
    _write_missing(shards, manifest_path, manifest, num_workers)
    return f"{prefix}*.tfrecords", manifest


def _check(out: str, *, name: str, resolution: int, num_shards: int, count: int) -> None:
    if resolution < 4 or resolution.bit_count() != 1:
        raise ConfigError("resolution", f"={resolution} must be a power of two, 4 or more")
    if num_shards > count:
        raise ConfigError("num_shards", f"={num_shards} is more than the {count} images")
    if not re.fullmatch(r"[\w.-]+", name):
        raise ConfigError("name", f"={name}: letters, digits, '.', '_' and '-' only, as files are named by it")
    if re.search(r"[*?\[\]\\]", out):
        raise ConfigError("out", f"={out}: without * ? [ ] \\, as it becomes part of a glob")


def _open_manifest(path: str, settings: dict[str, Any], shards: list[Shard], pattern: str) -> dict[str, Any]:
    """The manifest of a folder that was begun with these settings, or a new one that is written."""
    check_writable(path)
    manifest, known = {**settings, "shards": {}}, set()
    if tf.io.gfile.exists(path):
        known = {shard.path for shard in shards}
        try:
            manifest = read_json(path)
            there = {key: manifest[key] for key in (*settings, "shards")}
        except (DamagedFileError, TypeError, KeyError) as error:
            raise InputError(f"{path} is no manifest of this program: choose another `out` or `name`") from error
        differences = [f"{key}: {value} != {there[key]}" for key, value in settings.items() if value != there[key]]
        if differences:
            raise InputError(
                f"{path} was begun with other settings ({'; '.join(differences)}, asked != there): repeat its flags,"
                " or choose another `out` or `name`"
            )
    foreign = sorted(set(tf.io.gfile.glob(pattern)) - known)
    if foreign:  # training would read it along with the others
        raise InputError(f"{foreign[0]} is there, and {path} does not know it: remove it, or choose another `out`")
    write_json(path, manifest)
    return manifest


def _write_missing(shards: list[Shard], manifest_path: str, manifest: dict[str, Any], num_workers: int) -> None:
    entries = manifest["shards"]
    missing = [shard for shard in shards if not _is_whole(shard.path, entries.get(os.path.basename(shard.path)))]
    total = manifest["num_images"]
    done = total - sum(len(shard.images.keys) for shard in missing)
    with tqdm.tqdm(initial=done, total=total, unit="image", desc="writing") as bar, _executor(num_workers) as executor:
        try:
            futures = {executor.submit(write_shard, shard): shard for shard in missing}
            for future in as_completed(futures):
                shard, entry = futures[future], future.result()
                for key, reason in entry["skipped"].items():
                    bar.write(f"skipped {key}: {reason}", file=sys.stderr)
                entries[os.path.basename(shard.path)] = entry
                _refuse_skipped({key: why for e in entries.values() for key, why in e["skipped"].items()}, shard)
                _publish(shard)
                write_json(manifest_path, {**manifest, "shards": dict(sorted(entries.items()))})
                bar.update(len(shard.images.keys))
        except BaseException as error:
            for worker in multiprocessing.active_children():
                worker.terminate()  # else its shard, minutes of work, would be waited for
            if isinstance(error, BrokenProcessPool):
                raise InputError(
                    "a worker died (short of memory, or the disk of `source` lost?): the same command goes on; a"
                    " smaller `num_workers` needs less memory"
                ) from error
            raise


def _is_whole(path: str, entry: dict[str, Any] | None) -> bool:
    return entry is not None and tf.io.gfile.exists(path) and tf.io.gfile.stat(path).length == entry["bytes"]


def _publish(shard: Shard) -> None:
    try:
        tf.io.gfile.rename(shard.temporary, shard.path, overwrite=True)
    except (tf.errors.OpError, OSError) as error:
        raise InputError(f"cannot write {shard.path} ({first_line(error)})") from error


def _executor(num_workers: int) -> Executor:
    spawn = multiprocessing.get_context("spawn")  # TensorFlow does not survive a fork
    return ProcessPoolExecutor(num_workers, spawn, initializer=_start_worker)


def _start_worker() -> None:
    def follow_parent() -> None:
        multiprocessing.parent_process().join()  # type: ignore[union-attr]
        os._exit(1)  # or it would go on after the main process was killed, and write what the next run writes

    threading.Thread(target=follow_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process tells of Ctrl-C, and ends its workers
    tf.config.set_visible_devices([], "GPU")
