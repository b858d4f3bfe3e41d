"""The pictures that `sample` changes, as its flags name them."""

import dataclasses
import hashlib
import os
from typing import Any

import numpy as np
from absl import flags

from diffusion_tf.data.pictures import read_picture
from diffusion_tf.errors import InputError
from diffusion_tf.evaluation.scores import file_images

FLAGS = flags.FLAGS


@dataclasses.dataclass(frozen=True)
class GivenPictures:
    """The pictures that --inpaint or --start_from names.

    Attributes:
      images: uint8 [N, H, W, C].
      painted: with --inpaint, which pixels to paint, bool [1, H, W, 1].
    """

    images: np.ndarray
    painted: np.ndarray | None

    @classmethod
    def from_flags(cls, image_shape: tuple[int, int, int]) -> "GivenPictures | None":
        """Reads the pictures and the mask; None without such a flag.

        Raises:
          InputError: a file cannot be read or its picture has another size, or the mask paints nothing.
        """
        path = FLAGS.inpaint or FLAGS.start_from
        if not path:
            return None
        if path.lower().endswith(".npz"):
            file = file_images(path, image_shape)
            images = file.pixels(0, file.count)
        else:
            images = read_picture(path, image_shape)[None]
        if not FLAGS.inpaint:
            return cls(images, None)
        painted = read_picture(FLAGS.mask, (*image_shape[:2], 1))[None] >= 128
        if not painted.any():
            raise InputError(f"--mask={FLAGS.mask} is dark everywhere: white marks what to paint")
        return cls(images, painted)

    def of_samples(self, first: int, count: int) -> np.ndarray:
        """The pictures of samples first, ..., first + count - 1, uint8 [count, H, W, C]."""
        return self.images[np.arange(first, first + count) % len(self.images)]

    def describe(self) -> dict[str, Any]:
        """What samples depend on besides the sampler, as JSON values."""
        if self.painted is None:
            return {"start_from": _sha256(self.images)}
        masked = {"inpaint": _sha256(self.images), "mask": _sha256(self.painted)}
        return {**masked, "resamplings": FLAGS.resamplings, "jump_length": FLAGS.jump_length}

    def caption(self) -> str:
        """What happened to the pictures, in one line."""
        name = os.path.basename(FLAGS.inpaint or FLAGS.start_from)
        if self.painted is None:
            return f"started from {name} at strength {FLAGS.strength:g}"
        return f"{name} inpainted, {FLAGS.resamplings} resamplings of {FLAGS.jump_length} steps"


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
