"""Images of a NumPy array as an `ImageSource`."""

import numpy as np
import tensorflow as tf

from diffusion_tf.data.source import ImageSource, shuffled
from diffusion_tf.errors import ConfigError


def array_source(images: np.ndarray, name: str = "images of an array") -> ImageSource:
    """Serves the images of an array. Its records are indices, so an epoch is shuffled whole whatever the images' size.

    Args:
      images: uint8 [N, H, W, C]; copied once to the host memory of TensorFlow.
      name: what the images are, for people to read.

    Raises:
      ConfigError: `images` is not a uint8 array [N, H, W, C], or is empty.
    """
    check_images(images)
    pixels = tf.constant(images)

    def records(epoch_seed: tf.Tensor | None) -> tf.data.Dataset:
        return shuffled(tf.data.Dataset.range(len(images)), len(images), epoch_seed)

    return ImageSource(name, len(images), records, lambda index: tf.gather(pixels, index), images.shape[1:])


def check_images(images: np.ndarray, image_shape: tuple[int, int, int] | None = None) -> None:
    """Refuses an argument `images` that is not uint8 [N, H, W, C] with N > 0 and the given (H, W, C).

    Raises:
      ConfigError: the message states what was found and what is wanted.
    """
    if not isinstance(images, np.ndarray):
        raise ConfigError("images", f"must be a NumPy array, not {type(images).__name__}")
    shape = "H, W, C" if image_shape is None else ", ".join(map(str, image_shape))
    if (
        images.dtype != np.uint8
        or images.ndim != 4
        or 0 in images.shape
        or images.shape[1:] != (image_shape or images.shape[1:])
    ):
        raise ConfigError("images", f"must be uint8 [N, {shape}] with N > 0, not {images.dtype} {list(images.shape)}")
