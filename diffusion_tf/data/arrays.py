"""Images of a NumPy array, an .npz file or a small `tf.data.Dataset` as an `ImageSource`."""

from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from diffusion_tf.data.fitting import ChooseShape
from diffusion_tf.data.in_memory import class_indices, npz_images
from diffusion_tf.data.source import ImageSource, shuffled
from diffusion_tf.errors import ConfigError
from diffusion_tf.storage.npz_files import MAX_ARRAY_BYTES


def array_source(
    images: np.ndarray, name: str = "images of an array", labels: npt.ArrayLike | None = None
) -> ImageSource:
    """Serves the images of an array. Its records are indices, so an epoch is shuffled whole whatever the images' size.

    Args:
      images: uint8 [N, H, W, C]; copied once to the host memory of TensorFlow.
      name: what the images are, for people to read.
      labels: int or str [N], the class of each image; the classes are the sorted labels. Default: no labels.

    Raises:
      ConfigError: `images` is not a uint8 array [N, H, W, C], or is empty, or `labels` does not fit it.
    """
    check_images(images)
    if labels is None:
        return _source(images, name, None, ())
    return _source(images, name, *class_indices(np.asarray(labels), len(images)))


def npz_source(path: str, split: str, held_out: float, resize: str, choose_shape: ChooseShape) -> ImageSource:
    """Opens a split of an .npz file; arguments and errors as for `npz_images`."""
    found = npz_images(path, split, held_out, resize, choose_shape)
    return _source(found.images, found.name, found.labels, found.classes)


def materialize(dataset: tf.data.Dataset) -> tuple[np.ndarray, np.ndarray | None]:
    """Reads a dataset of images uint8 [H, W, C], or of pairs of them and labels, into memory.

    Returns:
      (images uint8 [N, H, W, C], labels [N] or None).

    Raises:
      ConfigError: the dataset is endless, its elements are others, or the images take more than MAX_ARRAY_BYTES.
    """
    spec = dataset.element_spec
    image_spec = spec[0] if isinstance(spec, tuple) else spec
    if (
        not isinstance(image_spec, tf.TensorSpec)
        or image_spec.dtype != tf.uint8
        or image_spec.shape.rank not in (3, None)
    ):
        raise ConfigError("images", f": the dataset must hold images uint8 [H, W, C], not {spec}: unbatch and map it")
    if dataset.cardinality() == tf.data.INFINITE_CARDINALITY:
        raise ConfigError("images", ": the dataset is endless: leave out its `repeat`, or take a part of it")
    images, labels, num_bytes = list[np.ndarray](), list[Any](), 0
    for element in dataset.as_numpy_iterator():
        image, *label = element if isinstance(spec, tuple) else (element,)
        images.append(image)
        labels.extend(label)
        num_bytes += image.nbytes
        if num_bytes > MAX_ARRAY_BYTES or image.shape != images[0].shape:
            raise ConfigError(
                "images",
                f": image {len(images) - 1} of the dataset is {list(image.shape)}, after {num_bytes:,} bytes of"
                f" {list(images[0].shape)}: at most {MAX_ARRAY_BYTES:,} bytes of one shape fit; write a folder instead",
            )
    if not images:
        raise ConfigError("images", ": the dataset is empty")
    return np.stack(images), np.array(labels) if labels else None


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


def _source(images: np.ndarray, name: str, labels: np.ndarray | None, classes: tuple[str, ...]) -> ImageSource:
    """A source of images with the indices of their classes, if they have some."""
    with tf.device(None):  # in this process, and not on a TPU slice's worker 0
        pixels = tf.constant(images)
        indices = None if labels is None else tf.constant(labels, tf.int32)

    def records(epoch_seed: tf.Tensor | None) -> tf.data.Dataset:
        return shuffled(tf.data.Dataset.range(len(images)), len(images), epoch_seed)

    return ImageSource(
        name,
        len(images),
        records,
        lambda index: tf.gather(pixels, index),
        images.shape[1:],
        label=None if indices is None else lambda index: tf.gather(indices, index),
        classes=classes,
    )
