"""A batch in microbatches against the whole batch."""

import numpy as np
import pytest
import tensorflow as tf

from diffusion_tf.ops import backend
from diffusion_tf.ops.backend import XLA, Backend
from diffusion_tf.runtime.microbatches import map_microbatches

CPU_GRAPH = Backend(cpu_graph=True)


def traced(on, function, arrays, **kwargs):
    """The result in a graph, and the sizes of the batches that `function` is traced with."""
    sizes = []

    def noting(first, *microbatch):
        sizes.append(microbatch[0].shape[0])
        return function(first, *microbatch)

    @tf.function(autograph=False)
    def program(arrays):
        with backend.entered(on):
            return map_microbatches(noting, arrays, **kwargs)

    return program([tf.constant(a) for a in arrays]), sizes


@pytest.mark.parametrize(
    ("on", "batch", "size"),
    [(CPU_GRAPH, 3, 3), (CPU_GRAPH, 8, 3), (CPU_GRAPH, 5, 3), (CPU_GRAPH, 9, 3), (backend.XLA, 8, 8)],
)
def test_results_of_microbatches_are_concatenated(on, batch, size):
    x, scale = np.arange(2.0 * batch, dtype="f").reshape(batch, 2), np.arange(batch)
    y, sizes = traced(on, lambda first, x, s: x * tf.cast(s, x.dtype)[:, None], [x, scale], max_size=3)
    assert set(sizes) == {size}
    np.testing.assert_array_equal(y, x * scale[:, None])


@pytest.mark.parametrize(
    ("on", "batch", "size"),
    [(CPU_GRAPH, 4, 4), (CPU_GRAPH, 12, 4), (CPU_GRAPH, 9, 3), (CPU_GRAPH, 7, 7), (backend.XLA, 8, 8)],
)
def test_results_of_microbatches_are_added_up(on, batch, size):
    """Each result knows the index of its first example."""
    x = np.arange(float(batch), dtype="f")

    def function(first, x):
        places = tf.cast(first + tf.range(len(x)), tf.float32)
        return tf.reduce_sum(x), [tf.reduce_sum(x * places, keepdims=True)]

    zeros = lambda: (tf.constant(0.0), [tf.zeros([1])])
    (total, [weighted]), sizes = traced(on, function, [x], max_size=4, zeros=zeros)
    assert set(sizes) == {size}
    np.testing.assert_array_equal(total, x.sum())
    np.testing.assert_array_equal(weighted, [np.square(x).sum()])


def test_a_small_network_is_one_program_without_regions():
    seen = []

    def function(_, x):
        seen.append(backend.current())
        return tf.square(x)

    y, sizes = traced(Backend(cpu_graph=True, compiles_network=True), function, [np.arange(8.0)], max_size=3)
    np.testing.assert_array_equal(y, np.arange(8.0) ** 2)
    assert set(sizes) == {8} and set(seen) == {XLA}
