"""How a picture of any size becomes an image of a run: cut, scaled, padded, or refused.

crop cuts the largest centred part of the images' aspect ratio and scales it; pad scales the whole picture and fills the
rest with white, or with transparency if the images have an alpha channel; stretch scales height and width each for
itself; none takes only pictures of the right size. Scaling uses a Lanczos filter, which is antialiased, and enlarges
what is smaller. Of pictures with alpha, it scales the colours weighted by their alpha.
"""

import dataclasses
import os
from collections.abc import Callable

import numpy as np
import PIL.Image

from diffusion_tf.data.pictures import convert_channels, decode_picture, read_bytes
from diffusion_tf.errors import ConfigError, InputError

# Maps the images' own (H, W, C) to that of a run.
ChooseShape = Callable[[tuple[int, int, int]], tuple[int, int, int]]


@dataclasses.dataclass(frozen=True)
class Fitting:
    """What is done to the size of pictures.

    Attributes:
      image_shape: (H, W, C) of the result.
      resize: crop, pad, stretch or none.
    """

    image_shape: tuple[int, int, int]
    resize: str = "crop"

    def decode(self, encoded: bytes) -> np.ndarray:
        """Decodes a picture upright: uint8 [h, w, C] of its own size, for `fit`.

        Raises:
          InputError: it cannot be decoded, or has another size where `resize` is none; the message is the reason alone.
        """
        height, width, channels = self.image_shape
        return decode_picture(encoded, channels, (width, height) if self.resize == "none" else None)

    def fit(self, picture: np.ndarray) -> np.ndarray:
        """Returns a picture uint8 [h, w, C] as an image uint8 [H, W, C]."""
        height, width, channels = self.image_shape
        part = self._part(picture)
        scaled = _scaled(part, *self._scaled_size(part))
        if scaled.shape == self.image_shape:
            return scaled
        image = np.full(self.image_shape, 0 if channels == 4 else 255, np.uint8)
        top, left = (height - scaled.shape[0]) // 2, (width - scaled.shape[1]) // 2
        image[top : top + scaled.shape[0], left : left + scaled.shape[1]] = scaled
        return image

    def fit_array(self, images: np.ndarray) -> np.ndarray:
        """Returns images uint8 [N, h, w, c] of one size as uint8 [N, H, W, C]; costs up to a millisecond each.

        Raises:
          ConfigError: they have another size and `resize` is none, or their channels cannot be converted.
        """
        if images.shape[1:] == self.image_shape:
            return images
        if self.resize == "none" and images.shape[1:3] != self.image_shape[:2]:
            sizes = "{}x{}, and the run's {}x{}".format(*images.shape[1:3], *self.image_shape)
            raise ConfigError("resize", f"=none: the images are {sizes} (height x width): crop, pad or stretch them")
        return np.stack([self.fit(convert_channels(image, self.image_shape[2])) for image in images])

    def enlarges(self, picture: np.ndarray) -> bool:
        """Whether `fit` invents pixels: the part of the picture that it scales is smaller than the result."""
        part = self._part(picture)
        height, width = self._scaled_size(part)
        return part.shape[0] < height or part.shape[1] < width

    def _part(self, picture: np.ndarray) -> np.ndarray:
        """The part of a picture that is scaled."""
        if self.resize != "crop":
            return picture
        (there_height, there_width, _), (height, width, _) = picture.shape, self.image_shape
        part_height = min(there_height, _ratio(there_width, height, width))
        part_width = min(there_width, _ratio(there_height, width, height))
        top, left = (there_height - part_height) // 2, (there_width - part_width) // 2
        return picture[top : top + part_height, left : left + part_width]

    def _scaled_size(self, part: np.ndarray) -> tuple[int, int]:
        """(height, width) to which a part is scaled."""
        height, width, _ = self.image_shape
        if self.resize != "pad":
            return height, width
        there_height, there_width, _ = part.shape
        return (
            min(height, _ratio(there_height, width, there_width)),
            min(width, _ratio(there_width, height, there_height)),
        )


def read_picture(path: str, image_shape: tuple[int, int, int], resize: str = "none") -> np.ndarray:
    """Reads a picture as an image of a run.

    Args:
      path: the file; may be gs://.
      image_shape: (H, W, C) of the images; another number of channels is converted.
      resize: how a picture of another size becomes an image; none refuses it.

    Returns:
      uint8 [H, W, C].

    Raises:
      InputError: the file cannot be read, or its picture has another size.
    """
    fitting = Fitting(image_shape, resize)
    try:
        return fitting.fit(fitting.decode(read_bytes(os.path.expanduser(path))))
    except ConfigError:
        raise
    except InputError as error:
        raise InputError(f"cannot read the picture {path} ({error})") from error


def _ratio(size: int, numerator: int, denominator: int) -> int:
    """`size` * numerator / denominator, rounded, at least 1."""
    return max(1, (2 * size * numerator + denominator) // (2 * denominator))


def _scaled(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """A picture uint8 [h, w, C] at another size."""
    # resize(box=...) would sample beyond the part that is scaled.
    image = PIL.Image.fromarray(picture[..., 0] if picture.shape[2] == 1 else picture)
    scaled = np.asarray(image.resize((width, height), PIL.Image.Resampling.LANCZOS))
    return scaled.reshape(height, width, picture.shape[2])
