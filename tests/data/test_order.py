"""The order of images without TensorFlow is that of `tf.data`."""

import numpy as np
import pytest

from diffusion_tf.data.arrays import array_source
from diffusion_tf.data.order import batch_indices, order_seed
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
            batch_indices(num_examples, batch_size, seed, step), 256 * pixels[:, 0] + pixels[:, 1]
        )
