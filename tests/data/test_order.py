"""The order of images without TensorFlow is that of `tf.data`."""

import numpy as np
import pytest
import tensorflow as tf

from diffusion_tf.data.arrays import array_source
from diffusion_tf.data.order import EpochShuffle, order_seed
from diffusion_tf.data.source import training_batches


@pytest.mark.parametrize(
    ("num_examples", "batch_size", "seed", "first_step"),
    [(10, 4, 0, 0), (1000, 128, 7, 5), (3, 8, 2**32 - 1, 1000), (257, 256, order_seed(2**32 - 1, 1), 3)],
)
def test_batches_are_those_of_tf_data(num_examples, batch_size, seed, first_step):
    """From the first epoch or a later one on, over the ends of epochs, and in batches of several epochs."""
    numbers = np.arange(num_examples)
    source = array_source(np.stack([numbers // 256, numbers % 256], axis=1).astype(np.uint8).reshape(-1, 1, 1, 2))
    batches = training_batches(
        source, batch_size=batch_size, per_replica=batch_size, seed=seed, start_step=first_step
    ).as_numpy_iterator()
    for step in range(first_step, first_step + 12):
        pixels = next(batches).reshape(batch_size, 2).astype(np.int64)
        np.testing.assert_array_equal(
            EpochShuffle((num_examples,), num_examples).batch(batch_size, seed, step), 256 * pixels[:, 0] + pixels[:, 1]
        )


@pytest.mark.parametrize(
    ("sizes", "buffer_size"),
    [((7, 5, 9, 1), 22), ((7, 5, 9, 1), 6), ((40,), 7), ((5, 5, 5), 1)],
    ids=["whole", "small buffer", "one file", "no buffer"],
)
def test_files_and_their_images_are_shuffled_as_by_tf_data(sizes, buffer_size):
    seed = order_seed(2**32 - 1, 1)
    firsts = np.cumsum(sizes) - sizes
    files = tf.data.Dataset.from_tensor_slices((firsts, np.array(sizes)))

    def epoch(number):
        shuffled = files.shuffle(len(sizes), seed=(seed << 31) + number)
        images = shuffled.flat_map(lambda first, size: tf.data.Dataset.range(first, first + size))
        return images.shuffle(buffer_size, seed=(seed << 31) + number)

    expected = [int(index) for number in (3, 4) for index in epoch(number)]
    shuffle = EpochShuffle(sizes, buffer_size)
    step = 3 * sum(sizes)  # batches of one image
    assert [int(shuffle.batch(1, seed, step + place)[0]) for place in range(2 * sum(sizes))] == expected
