"""Writes one TFRecord shard of images and reads it back: the work of one worker process."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_tf.data.image_folders import EncodedImages, decode_square
from diffusion_tf.data.source import ImageReader
from diffusion_tf.data.tfrecords import serialize, tfrecord_source
from diffusion_tf.errors import ConfigError, InputError
from diffusion_tf.storage.files import write_reason

_READ_BACK_IMAGES = 64  # images that are read back at once
_DIGEST_BYTES = 2**24  # bytes of a file that are digested at once


@dataclasses.dataclass(frozen=True)
class Shard:
    """A shard to write.

    Attributes:
      path: the file.
      images: the images in it.
      resolution: height and width of the images as written.
      skip_bad_images: the number of unreadable images to leave out.
    """

    path: str
    images: EncodedImages
    resolution: int
    skip_bad_images: int

    @property
    def temporary(self) -> str:
        """The path that a worker writes to, before the main process renames it."""
        return f"{self.path}.tmp"

    def remove_temporary(self) -> None:
        """Removes the temporary file, if there is one."""
        with contextlib.suppress(tf.errors.NotFoundError):
            tf.io.gfile.remove(self.temporary)


def write_shard(shard: Shard, serialize: Callable[[np.ndarray], bytes] = serialize) -> dict[str, Any]:
    """Writes `shard.temporary`, then reads it back as training would and compares all pixels.

    No file stays if none of the images can be read.

    Args:
      shard: the shard.
      serialize: maps a uint8 [C, H, W] image to a record.

    Returns:
      The shard's entry in the manifest: records, bytes, sha256 of the file, and skipped {key: reason}.

    Raises:
      InputError: too many images are unreadable, or a file cannot be read or written.
    """
    try:
        num_records, pixels_sha256, skipped = _write_records(shard, serialize)
        if not num_records:
            tf.io.gfile.remove(shard.temporary)  # a file without records could not be read
            return {"records": 0, "bytes": 0, "sha256": "", "skipped": skipped}
        if _read_back_sha256(shard, num_records) != pixels_sha256:
            raise InputError(f"{shard.path} does not read back as it was written: is its disk sound?")
        with tf.io.gfile.GFile(shard.temporary, "rb") as file:
            sha256 = hashlib.sha256()
            while chunk := file.read(_DIGEST_BYTES):
                sha256.update(chunk)
            return {"records": num_records, "bytes": file.size(), "sha256": sha256.hexdigest(), "skipped": skipped}
    except (tf.errors.OpError, OSError) as error:  # TensorFlow's errors cannot be pickled for the main process
        reason = write_reason(error)
        raise InputError(f"cannot write {shard.path} ({reason}): repeat the command to continue") from error


def check_skipped(skipped: Mapping[str, str], shard: Shard) -> None:
    """Raises ConfigError, which names the last image, if more images were skipped than `shard` allows.

    Args:
      skipped: the reason for each skipped image, by key.
      shard: the shard of the last image.
    """
    if len(skipped) > shard.skip_bad_images:
        key, reason = list(skipped.items())[-1]
        raise ConfigError(
            "source",
            f"={shard.images.path}: {key} cannot be read ({reason}), and `skip_bad_images` is"
            f" {shard.skip_bad_images}: `skip_bad_images=N` leaves out up to N",
        )


def _write_records(shard: Shard, serialize: Callable[[np.ndarray], bytes]) -> tuple[int, bytes, dict[str, str]]:
    """Writes the shard; returns the number of records, the SHA-256 of all pixels, and the skipped {key: reason}."""
    pixels, num_records = hashlib.sha256(), 0
    skipped: dict[str, str] = {}
    shard.remove_temporary()  # it may be a link
    with tf.io.TFRecordWriter(shard.temporary) as writer, shard.images.reader() as read:
        for key in shard.images.keys:
            try:
                image = decode_square(read(key), shard.resolution)
            except InputError as error:
                skipped[key] = str(error)
                check_skipped(skipped, shard)
                continue
            writer.write(serialize(image))
            pixels.update(image.tobytes())
            num_records += 1
    return num_records, pixels.digest(), skipped


def _read_back_sha256(shard: Shard, num_records: int) -> bytes:
    """Returns the SHA-256 of all pixels uint8 [C, H, W] in the written shard."""
    source = tfrecord_source(shard.temporary, (shard.resolution, shard.resolution, 3), skip_bad_records=0)
    if source.num_examples != num_records:
        raise InputError(f"{shard.path} reads back as {source.num_examples} records instead of {num_records}")
    reader, pixels = ImageReader(source), hashlib.sha256()
    for first in range(0, num_records, _READ_BACK_IMAGES):
        images = reader(first, min(_READ_BACK_IMAGES, num_records - first))
        pixels.update(images.transpose(0, 3, 1, 2).tobytes())
    return pixels.digest()
