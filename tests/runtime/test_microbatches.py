"""Batches that a CPU graph computes a few images at a time."""

import numpy as np
import pytest
import tensorflow as tf

from diffusion_tf.ops import backend
from diffusion_tf.ops.backend import Backend
from diffusion_tf.runtime.microbatches import map_microbatches

GRAPH = Backend(cpu_graph=True)
WHOLE_NETWORK = Backend(cpu_graph=True, compiles_network=True)


def map_batch(backend_, batch_size, *, add_up):
    """Maps 1, 2, ... and returns the sizes of the microbatches, the expected result and the result."""
    x, sizes = np.arange(1, batch_size + 1, dtype=np.float32)[:, None], []

    def square(first, x):
        sizes.append(x.shape[0])
        index = tf.cast(first + tf.range(x.shape[0]), tf.float32)[:, None]
        y = index * x
        return tf.reduce_sum(y) if add_up else y

    @tf.function(autograph=False)
    def program(x):
        with backend.entered(backend_):
            return map_microbatches(square, [x], max_size=4, zeros=(lambda: tf.constant(0.0)) if add_up else None)

    y = np.arange(batch_size, dtype=np.float32)[:, None] * x
    found = program(tf.constant(x)).numpy()
    return set(sizes), y.sum() if add_up else y, found


@pytest.mark.parametrize(
    ("backend_", "batch_size", "size"),
    [(GRAPH, 10, 4), (GRAPH, 9, 3), (GRAPH, 4, 4), (GRAPH, 3, 3), (WHOLE_NETWORK, 10, 10), (backend.XLA, 10, 10)],
)
def test_results_of_microbatches_are_concatenated(backend_, batch_size, size):
    sizes, expected, found = map_batch(backend_, batch_size, add_up=False)
    assert sizes == {size}
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("backend_", "batch_size", "size"),
    [(GRAPH, 8, 4), (GRAPH, 9, 3), (GRAPH, 10, 10), (WHOLE_NETWORK, 8, 8), (backend.XLA, 8, 8)],
)
def test_results_of_microbatches_are_added_up(backend_, batch_size, size):
    sizes, expected, found = map_batch(backend_, batch_size, add_up=True)
    assert sizes == {size}
    np.testing.assert_array_equal(found, expected)
