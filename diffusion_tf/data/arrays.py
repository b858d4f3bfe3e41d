"""Images of a NumPy array, an .npz file or a small `tf.data.Dataset` as an `ImageSource`."""

from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from diffusion_tf.data.fitting import ChooseShape, Fitting
from diffusion_tf.data.partition import hold_out, index_classes
from diffusion_tf.data.source import ImageSource, shuffled
from diffusion_tf.errors import ConfigError, InputError
from diffusion_tf.storage.npz_files import MAX_ARRAY_BYTES, describe_arrays, read_npz

_KEYS = ("images", "samples")  # of the images in an .npz file


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
    return _source(images, name, *_classes(np.asarray(labels), len(images)))


def npz_source(path: str, split: str, held_out: float, resize: str, choose_shape: ChooseShape) -> ImageSource:
    """Opens a split of an .npz file of uint8 `images` or `samples` [N, H, W, C], and maybe `labels` [N], int or str.

    Args:
      path: the file.
      split: train or test.
      held_out: the fraction of the images that is the test split.
      resize: how images of another size get that of the run.
      choose_shape: maps the images' (H, W, C) to that of the run.

    Raises:
      InputError: the file cannot be read, or does not hold such arrays.
    """
    arrays = read_npz(path)
    images = next((arrays[key] for key in _KEYS if key in arrays), np.empty(0))
    if images.dtype != np.uint8 or images.ndim != 4 or not images.size:
        there = describe_arrays(arrays)
        raise ConfigError("npz", f"={path} must hold images or samples, uint8 [N, H, W, C]; there are: {there}")
    labels: np.ndarray | None = None
    classes: tuple[str, ...] = ()
    try:
        held = np.array(hold_out([str(index) for index in range(len(images))], held_out))
        if "labels" in arrays:
            labels, classes = _classes(arrays["labels"], len(images))
    except InputError as error:
        raise ConfigError("npz", f"={path}: {error}") from error
    chosen = held if split == "test" else ~held
    if not chosen.any():
        raise ConfigError("held_out", f"={held_out:g} leaves {path} without a test split: `split=train` is all of it")
    fitting = Fitting(choose_shape(images.shape[1:]), resize)
    return _source(
        fitting.fit_array(images[chosen]), f"{path}, {split}", None if labels is None else labels[chosen], classes
    )


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


def _classes(labels: np.ndarray, num_images: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """The index of the class of each image, int32 [N], and the names of the classes.

    Raises:
      ConfigError: there are not as many labels as images, or they are neither numbers nor texts.
    """
    if labels.shape != (num_images,) or labels.dtype.kind not in "iuU":
        raise ConfigError(
            "labels", f"must be int or str [{num_images}], one for each image, not {labels.dtype} {list(labels.shape)}"
        )
    indices, classes = index_classes(labels.tolist())
    return np.array(indices, np.int32), classes
