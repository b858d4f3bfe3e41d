"""scikit-learn's handwritten digits, which need no download."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from diffusion_tf.data.source import ImageSource

_TEST_EVERY = 10  # every tenth digit is in the test split, so that both splits have digits of every writer


def load_digits(split: str = "all") -> np.ndarray:
    """Returns scikit-learn's 1,797 scanned digits, uint8 [N, 8, 8, 1], their 17 grey levels scaled to 0..255.

    Args:
      split: train, test (every tenth digit) or all.
    """
    import sklearn.datasets  # only digits need it

    images = np.round(sklearn.datasets.load_digits().images * (255.0 / 16.0)).astype(np.uint8)[..., None]
    return images[_in_split(len(images), split)]


def load_digit_labels(split: str = "all") -> np.ndarray:
    """Returns the labels of `load_digits(split)`, int64 [N] in 0..9."""
    import sklearn.datasets

    labels = sklearn.datasets.load_digits().target
    return labels[_in_split(len(labels), split)]


def digits_source(split: str, image_shape: tuple[int, int, int]) -> "ImageSource":
    """Returns a split of the digits as a source, with their labels.

    Raises:
      InputError: `image_shape` is not (8, 8, 1).
    """
    from diffusion_tf.data.arrays import array_source  # imports TensorFlow
    from diffusion_tf.data.source import check_shape

    images = load_digits(split)
    check_shape("`dataset=digits`", images.shape[1:], image_shape)
    return array_source(images, f"scikit-learn digits, {split}", load_digit_labels(split))


def _in_split(count: int, split: str) -> np.ndarray:
    """Returns which of `count` digits are in a split, bool [count]."""
    test = np.arange(count) % _TEST_EVERY == _TEST_EVERY - 1
    return {"train": ~test, "test": test, "all": np.full(count, True)}[split]
