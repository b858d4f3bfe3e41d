"""Images as tf.data of uint8 [H, W, C]: the digits of scikit-learn, TFDS, and StyleGAN's TFRecords.

The order of the training images is a function of the seed and the step: each epoch is shuffled with a seed of its own,
while the records are still encoded, and a resumed run skips to its place. (Flips belong to the training step.)
Measurements read the images of a split in the order of their records.
"""

import numpy as np
import tensorflow as tf

from diffusion_tf.data.source import ImageSource, require_shape, shuffled

# Every tenth digit is the test split, so that both splits hold digits of every writer.
_DIGITS_TEST_EVERY = 10


def load_digits(split: str = "all") -> np.ndarray:
    """scikit-learn's 1,797 scanned digits, uint8 [N, 8, 8, 1]; `split` is train, test (every tenth) or all.

    Their 17 grey levels 0..16 are spread over 0..255.
    """
    import sklearn.datasets  # only digits need it

    images = np.round(sklearn.datasets.load_digits().images * (255.0 / 16.0)).astype(np.uint8)[..., None]
    return images[_in_split(len(images), split)]


def load_digit_labels(split: str = "all") -> np.ndarray:
    """Which digits `load_digits(split)` shows, int64 [N] in 0..9."""
    import sklearn.datasets

    labels = sklearn.datasets.load_digits().target
    return labels[_in_split(len(labels), split)]


def _in_split(count: int, split: str) -> np.ndarray:
    test = np.arange(count) % _DIGITS_TEST_EVERY == _DIGITS_TEST_EVERY - 1
    return {"train": ~test, "test": test, "all": np.full(count, True)}[split]


def digits_source(split: str, image_shape: tuple[int, int, int]) -> ImageSource:
    images = load_digits(split)
    require_shape("`dataset=digits`", images.shape[1:], image_shape)

    def records(epoch_seed):
        return shuffled(tf.data.Dataset.from_tensor_slices(images), len(images), epoch_seed)

    return ImageSource(f"scikit-learn digits, {split}", len(images), records, lambda image: image, image_shape)
