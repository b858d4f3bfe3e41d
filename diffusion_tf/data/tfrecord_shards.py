"""Writes one TFRecord shard of images and reads it back: the work of one worker."""

import contextlib
import dataclasses
import hashlib
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from diffusion_tf.data.fitting import Fitting
from diffusion_tf.data.image_folders import EncodedImages
from diffusion_tf.data.source import READ_ERRORS
from diffusion_tf.data.tfrecords import serialize, tfrecord_source
from diffusion_tf.errors import ConfigError, InputError
from diffusion_tf.storage.files import write_reason

# The setting that allows unreadable images, by the one that names the images.
SKIP_SETTINGS = {"source": "skip_bad_images", "images": "skip_bad_records", "tfds": "skip_bad_records"}
_DIGEST_BYTES = 2**24  # bytes of a file that are digested at once


@dataclasses.dataclass(frozen=True)
class Shard:
    """A shard to write.

    Attributes:
      path: the file.
      images: the images in it.
      fitting: how they get their size.
      skip_bad_images: the number of unreadable images to leave out.
      stopped: ends the writing when it is set, for workers that are threads.
    """

    path: str
    images: EncodedImages
    fitting: Fitting
    skip_bad_images: int
    stopped: threading.Event | None = None

    def stop(self) -> None:
        """Ends the writing of this shard soon, in another thread."""
        if self.stopped:
            self.stopped.set()

    @property
    def temporary(self) -> str:
        """The path that a worker writes to, before the main process renames it."""
        return f"{self.path}.tmp"

    def remove_temporary(self) -> None:
        """Removes the temporary file, if there is one."""
        with contextlib.suppress(tf.errors.NotFoundError):
            tf.io.gfile.remove(self.temporary)


class _Written(NamedTuple):
    """What was written to a shard.

    Attributes:
      num_records: the number of records.
      sha256: the SHA-256 of all images uint8 [H, W, C] and labels.
      skipped: the reason for each image that is left out, by key.
      num_enlarged: the number of images that were smaller than the records'.
    """

    num_records: int
    sha256: bytes
    skipped: dict[str, str]
    num_enlarged: int


def write_shard(shard: Shard, serialize: Callable[[np.ndarray, int | None], bytes] = serialize) -> dict[str, Any]:
    """Writes `shard.temporary`, then reads it back as training would and compares all pixels.

    No file stays if none of the images can be read.

    Args:
      shard: the shard.
      serialize: maps a uint8 [C, H, W] image and its label, or None, to a record.

    Returns:
      The shard's entry in the manifest: records, bytes, sha256 of the file, skipped {key: reason}, and, unless it is 0,
      enlarged, the number of images that were smaller than the records'.

    Raises:
      InputError: too many images are unreadable, or a file cannot be read or written.
    """
    try:
        written = _write_records(shard, serialize)
        if not written.num_records:
            tf.io.gfile.remove(shard.temporary)  # a file without records could not be read
            return {"records": 0, "bytes": 0, "sha256": "", "skipped": written.skipped}
        if _read_back_sha256(shard, written.num_records) != written.sha256:
            raise InputError(f"{shard.path} does not read back as it was written: is its disk sound?")
        with tf.io.gfile.GFile(shard.temporary, "rb") as file:
            sha256 = hashlib.sha256()
            while chunk := file.read(_DIGEST_BYTES):
                sha256.update(chunk)
            return {
                "records": written.num_records,
                "bytes": file.size(),
                "sha256": sha256.hexdigest(),
                "skipped": written.skipped,
                **({"enlarged": written.num_enlarged} if written.num_enlarged else {}),
            }
    except (tf.errors.OpError, OSError) as error:  # TensorFlow's errors cannot be pickled for the main process
        reason = write_reason(error)
        raise InputError(f"cannot write {shard.path} ({reason}): repeat the command to continue") from error


def check_skipped(skipped: Mapping[str, str], images: EncodedImages, skip_bad_images: int) -> None:
    """Raises ConfigError, which names the last image, if more images were skipped than may be.

    Args:
      skipped: the reason for each skipped image, by key.
      images: the images.
      skip_bad_images: how many may be.
    """
    if len(skipped) > skip_bad_images:
        key, reason = list(skipped.items())[-1]
        setting, name = SKIP_SETTINGS[images.setting], key if key.isprintable() else repr(key)
        raise ConfigError(
            images.setting,
            f"={images.path}: {name} cannot be read ({reason}), and `{setting}` is {skip_bad_images}:"
            f" `{setting}=N` leaves out up to N",
        )


def _write_records(shard: Shard, serialize: Callable[[np.ndarray, int | None], bytes]) -> _Written:
    """Writes the shard."""
    digest, num_records, num_enlarged = hashlib.sha256(), 0, 0
    skipped: dict[str, str] = {}
    shard.remove_temporary()  # it may be a link
    with tf.io.TFRecordWriter(shard.temporary) as writer, shard.images.reader() as read:
        for key in shard.images.keys:
            if shard.stopped and shard.stopped.is_set():
                raise InputError(f"{shard.path} is not finished")
            try:
                encoded, label = read(key)
                picture = shard.fitting.decode(encoded)
            except InputError as error:
                skipped[key] = str(error)
                check_skipped(skipped, shard.images, shard.skip_bad_images)
                continue
            image = shard.fitting.fit(picture)
            writer.write(serialize(image.transpose(2, 0, 1), label))
            digest.update(image.tobytes())
            digest.update(b"" if label is None else str(label).encode())
            num_records += 1
            num_enlarged += shard.fitting.enlarges(picture)
    return _Written(num_records, digest.digest(), skipped, num_enlarged)


def _read_back_sha256(shard: Shard, num_records: int) -> bytes:
    """Returns the SHA-256 of all images and labels in the written shard."""
    source = tfrecord_source(shard.temporary, shard.fitting.image_shape, 0, classes=shard.images.classes)
    if source.num_examples != num_records:
        raise InputError(f"{shard.path} reads back as {source.num_examples} records instead of {num_records}")
    digest, label = hashlib.sha256(), source.label or (lambda _: tf.constant(-1))
    try:
        for image, number in source.records(None).map(lambda record: (source.decode(record), label(record))):
            digest.update(image.numpy().tobytes())
            digest.update(b"" if source.label is None else str(number.numpy()).encode())
    except READ_ERRORS as error:
        raise source.read_error(error) from error
    return digest.digest()
