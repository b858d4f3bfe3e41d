"""Images read into memory without TensorFlow: an .npz file, a folder of pictures, or the digits."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from diffusion_tf.data.cache_layout import num_cache_shards, shard_bounds
from diffusion_tf.data.digits import load_digit_labels, load_digits
from diffusion_tf.data.fitting import ChooseShape, Fitting
from diffusion_tf.data.image_folders import EncodedImages
from diffusion_tf.data.order import EpochShuffle, shuffle_buffer_size
from diffusion_tf.data.partition import hold_out, index_classes
from diffusion_tf.errors import ConfigError, InputError
from diffusion_tf.progress_bar import progress_bar
from diffusion_tf.storage.npz_files import MAX_ARRAY_BYTES, describe_arrays, read_npz

_KEYS = ("images", "samples")  # of the images in an .npz file
_THREADS = 8  # decoding releases Python's global lock


@dataclasses.dataclass(frozen=True)
class ImageArray:
    """Images of one shape.

    Attributes:
      name: what they are, for messages.
      images: uint8 [N, H, W, C].
      labels: the index of the class of each image, int32 [N]; None: the images have no labels.
      classes: the names of the classes; none without labels.
      file_sizes: the images of each file from which `train` would read them; none: `train` has them in memory too.
    """

    name: str
    images: np.ndarray
    labels: np.ndarray | None
    classes: tuple[str, ...]
    file_sizes: tuple[int, ...] = ()

    @property
    def shuffle(self) -> EpochShuffle:
        """How `train` shuffles them."""
        count, *image_shape = self.images.shape
        if not self.file_sizes:
            return EpochShuffle((count,), count)
        return EpochShuffle(self.file_sizes, shuffle_buffer_size(count, tuple(image_shape)))

    def take(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns images uint8 [..., H, W, C] by their indices, int [...], and their labels, int32 [...]."""
        return self.images[indices], None if self.labels is None else self.labels[indices]


def npz_images(path: str, split: str, held_out: float, resize: str, choose_shape: ChooseShape) -> ImageArray:
    """Reads a split of an .npz file of uint8 `images` or `samples` [N, H, W, C], and maybe `labels` [N], int or str.

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
            labels, classes = class_indices(arrays["labels"], len(images))
    except InputError as error:
        raise ConfigError("npz", f"={path}: {error}") from error
    chosen = held if split == "test" else ~held
    if not chosen.any():
        raise ConfigError("held_out", f"={held_out:g} leaves {path} without a test split: `split=train` is all of it")
    fitting = Fitting(choose_shape(images.shape[1:]), resize)
    return ImageArray(
        f"{path}, {split}",
        fitting.fit_array(images[chosen]),
        None if labels is None else labels[chosen],
        classes,
    )


def digit_images() -> ImageArray:
    """Returns the training split of the digits."""
    images, labels = load_digits("train"), load_digit_labels("train")
    return ImageArray("scikit-learn digits, train", images, *class_indices(labels, len(images)))


def read_pictures(pictures: EncodedImages, name: str, fitting: Fitting) -> ImageArray:
    """Reads pictures, in the order of their paths.

    Args:
      pictures: the pictures.
      name: what they are, for messages.
      fitting: how they are converted.

    Raises:
      InputError: one cannot be read, or they do not fit in memory.
    """
    folder, count = pictures.path, len(pictures.keys)
    if (num_bytes := count * int(np.prod(fitting.image_shape))) > MAX_ARRAY_BYTES:
        raise ConfigError(
            "images", f"={folder} takes {num_bytes:,} bytes as images, and {MAX_ARRAY_BYTES:,} fit: name fewer pictures"
        )
    with pictures.reader() as read, ThreadPoolExecutor(_THREADS) as pool:

        def load(key: str) -> np.ndarray:
            try:
                return fitting.fit(fitting.decode(read(key)[0]))
            except InputError as error:
                raise InputError(f"{folder}/{key} cannot be read ({error}): remove it, or repair it") from error

        images = np.empty((count, *fitting.image_shape), np.uint8)
        loaded = pool.map(load, pictures.keys)
        for place, image in enumerate(progress_bar(loaded, total=count, unit="picture", desc=folder)):
            images[place] = image
    labels = np.array(pictures.labels, np.int32) if pictures.labels else None
    bounds = shard_bounds(count, num_cache_shards(count))
    return ImageArray(name, images, labels, pictures.classes, tuple(np.diff(bounds).tolist()))


def class_indices(labels: np.ndarray, num_images: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """Returns the index of the class of each image, int32 [N], and the names of the classes.

    Args:
      labels: int or str [N].
      num_images: the N that they must have.

    Raises:
      ConfigError: there are not as many labels as images, or they are neither numbers nor texts.
    """
    if labels.shape != (num_images,) or labels.dtype.kind not in "iuU":
        raise ConfigError(
            "labels", f"must be int or str [{num_images}], one for each image, not {labels.dtype} {list(labels.shape)}"
        )
    indices, classes = index_classes(labels.tolist())
    return np.array(indices, np.int32), classes
