"""The pictures that `sample` changes."""

import dataclasses
import hashlib
from typing import Any

import numpy as np

from diffusion_tf.data.fitting import read_picture
from diffusion_tf.errors import InputError
from diffusion_tf.evaluation.scores import file_images

_WHITE = 128  # the least level of a mask that counts as white


@dataclasses.dataclass(frozen=True)
class GivenPictures:
    """Pictures that samples are made from, in turn.

    Attributes:
      images: uint8 [N, H, W, C].
      painted: which pixels to paint, bool [1, H, W, 1]; None: the pictures are changed as a whole.
    """

    images: np.ndarray
    painted: np.ndarray | None = None

    @classmethod
    def read(cls, path: str, mask: str | None, image_shape: tuple[int, int, int]) -> "GivenPictures":
        """Reads pictures and a mask.

        Args:
          path: a picture, or an .npz of `samples`.
          mask: a picture that is white where to paint.
          image_shape: (H, W, C) of the run's images.

        Raises:
          InputError: a file cannot be read, or is of another size, or the mask selects nothing.
        """
        if path.lower().endswith(".npz"):
            file = file_images(path, image_shape)
            images = np.asarray(file.pixels(0, file.count))
        else:
            images = read_picture(path, image_shape)[None]
        if mask is None:
            return cls(images)
        painted = read_picture(mask, (*image_shape[:2], 1))[None] >= _WHITE
        if not painted.any():
            raise InputError(f"--mask={mask} is dark everywhere: white marks what to paint")
        return cls(images, painted)

    def of_samples(self, first: int, count: int) -> np.ndarray:
        """The pictures that samples first, ..., first + count - 1 are made from, uint8 [count, H, W, C]."""
        return self.images[np.arange(first, first + count) % len(self.images)]

    def describe(self) -> dict[str, Any]:
        """What samples depend on, as JSON values."""
        if self.painted is None:
            return {"start_from": _sha256(self.images)}
        return {"inpaint": _sha256(self.images), "mask": _sha256(self.painted)}


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
