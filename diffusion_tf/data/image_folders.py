"""Encoded images in a folder or an LMDB of LSUN: their list, their bytes, and their pixels at one resolution."""

import contextlib
import dataclasses
import io
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps

from diffusion_tf.errors import ConfigError
from diffusion_tf.storage.files import read_file

_EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


@dataclasses.dataclass(frozen=True)
class EncodedImages:
    """A list of encoded images.

    Attributes:
      path: the folder of the images or of the LMDB.
      is_lmdb: whether it is an LMDB.
      keys: the keys in the LMDB, decoded as latin-1, in its order; or the paths below the folder, sorted.
    """

    path: str
    is_lmdb: bool
    keys: list[str]

    def read(self) -> Iterator[tuple[str, bytes]]:
        """Yields the key and the encoded bytes of each image.

        Raises:
          InputError: a file cannot be read, or the LMDB does not have a key.
        """
        if not self.is_lmdb:
            yield from ((key, read_file(os.path.join(self.path, key))) for key in self.keys)
            return
        with _open_lmdb(self.path) as transaction:
            for key in self.keys:
                encoded = transaction.get(key.encode("latin-1"))
                if encoded is None:
                    raise ConfigError("source", f"={self.path} has lost its key {key}: is something writing to it?")
                yield key, encoded


def find_images(source: str, limit: int | None = None) -> EncodedImages:
    """Lists the images in an LMDB's folder (with data.mdb), or in a folder and its subfolders.

    Args:
      source: the folder.
      limit: the number of images to list; default: all.

    Raises:
      InputError: the folder does not exist, cannot be read, or holds no images.
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
    return EncodedImages(path, is_lmdb, keys[:limit])


def decode_square(encoded: bytes, resolution: int) -> np.ndarray:
    """Decodes an image as StyleGAN's create_lsun does: uint8 [3, resolution, resolution], RGB.

    The image is turned upright as its EXIF data says, cropped to its central square, and scaled by Lanczos resampling.

    Raises:
      Exception: PIL cannot read the image; the exceptions are of many types.
    """
    with PIL.Image.open(io.BytesIO(encoded)) as opened:
        image = PIL.ImageOps.exif_transpose(opened).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))  # resize(box=...) would sample beyond the square
    return np.asarray(square.resize((resolution, resolution), PIL.Image.Resampling.LANCZOS)).transpose(2, 0, 1)


def _list_folder(path: str) -> list[str]:
    def refuse(error: OSError) -> None:  # by default, os.walk skips folders that it cannot read
        raise ConfigError("source", f"={path} cannot be listed ({error})") from error

    files = (os.path.join(folder, file) for folder, _, names in os.walk(path, onerror=refuse) for file in names)
    return sorted(os.path.relpath(file, path) for file in files if file.lower().endswith(_EXTENSIONS))


@contextlib.contextmanager
def _open_lmdb(path: str) -> Iterator[Any]:
    """Opens a read-only transaction of the LMDB in a folder."""
    try:
        import lmdb  # only LSUN's original files need it
    except ImportError as error:
        raise ConfigError("source", f"={path} is an LMDB, and lmdb is not installed: pip install lmdb") from error
    try:
        # A lock file could not be created in a read-only folder.
        with lmdb.open(path, readonly=True, lock=False, readahead=False) as database, database.begin() as transaction:
            yield transaction
    except lmdb.Error as error:
        raise ConfigError("source", f"={path} cannot be read as an LMDB ({error})") from error
