"""Images of a NumPy array as an `ImageSource`."""

import dataclasses

import numpy as np
import tensorflow as tf

from diffusion_tf.data.source import ImageSource, shuffled
from diffusion_tf.errors import ConfigError


def array_source(images: np.ndarray, name: str = "images of an array", labels: np.ndarray | None = None) -> ImageSource:
    """Serves the images of an array. Its records are indices, so an epoch is shuffled whole whatever the images' size.

    Args:
      images: uint8 [N, H, W, C]; copied once to the host memory of TensorFlow.
      name: what the images are, for people to read.
      labels: the class of each image, integers [N] from 0; the classes are named by their numbers, up to the largest.

    Raises:
      ConfigError: `images` is not a uint8 array [N, H, W, C], or is empty, or the labels do not fit them.
    """
    check_images(images)
    pixels = tf.constant(images)

    def records(epoch_seed: tf.Tensor | None) -> tf.data.Dataset:
        return shuffled(tf.data.Dataset.range(len(images)), len(images), epoch_seed)

    source = ImageSource(name, len(images), records, lambda index: tf.gather(pixels, index), images.shape[1:])
    if labels is None:
        return source
    check_labels(labels, len(images))
    of_images = tf.constant(labels, tf.int32)
    classes = tuple(map(str, range(labels.max() + 1)))
    return dataclasses.replace(source, label=lambda index: tf.gather(of_images, index), classes=classes)


def check_labels(labels: np.ndarray, num_images: int) -> None:
    """Refuses an argument `labels` that is not integers [num_images] from 0.

    Raises:
      ConfigError: the message states what was found and what is wanted.
    """
    if not isinstance(labels, np.ndarray) or labels.dtype.kind not in "iu" or labels.shape != (num_images,):
        found = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, np.ndarray) else type(labels).__name__
        raise ConfigError("labels", f"must be an integer array [{num_images}], one for each image, not {found}")
    if labels.min() < 0:
        raise ConfigError("labels", f"must be 0 or more, not {labels.min()}")


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
