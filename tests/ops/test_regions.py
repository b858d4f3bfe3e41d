"""Compiled regions of a graph against the same functions without."""

import numpy as np
import pytest
import tensorflow as tf

from diffusion_tf.ops.cpu.regions import cpu_graph, in_cpu_graph, one_program, quick_cast, region, sum_of_rows


@region
def scaled(parts: list[tf.Tensor], keep: tf.Tensor, weight: tf.Tensor, *, power: int) -> list[tf.Tensor]:
    scaled.traced_in_graph = in_cpu_graph()
    first, second = parts
    return [tf.where(keep, first**power * weight, 0.0), tf.sin(second)]


def outputs_and_gradients():
    random = np.random.RandomState(0)
    parts = [tf.constant(random.standard_normal((4, 3)), tf.float32) for _ in range(2)]
    keep, weight = tf.constant(random.uniform(size=(4, 3)) < 0.5), tf.constant(1.5)
    with tf.GradientTape() as tape:
        tape.watch([*parts, weight])
        a, b = scaled(parts, keep, weight, power=3)
        loss = tf.reduce_sum(a) + 2.0 * tf.reduce_sum(b)
    return [a, b, *tape.gradient(loss, [*parts, weight])]


def test_outputs_and_gradients_are_the_functions_own():
    @tf.function
    def in_regions():
        with cpu_graph():
            return outputs_and_gradients()

    found = in_regions()
    assert scaled.traced_in_graph and not in_cpu_graph()
    calls = [node for node in in_regions.get_concrete_function().graph.as_graph_def().node if "Call" in node.op]
    assert len(calls) == 2  # forward and backward
    for ours, expected in zip(found, outputs_and_gradients(), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-7)
    assert not scaled.traced_in_graph


def test_one_program_has_no_regions():
    x = tf.constant([1.0, 2.0])

    @tf.function
    def whole():
        with cpu_graph():
            return one_program(lambda: (tf.square(x), tf.constant(in_cpu_graph())))

    squares, in_regions = whole()
    np.testing.assert_array_equal(squares, [1.0, 4.0])
    assert not in_regions
    np.testing.assert_array_equal(one_program(lambda: tf.square(x)), [1.0, 4.0])


@pytest.mark.parametrize("shape", [(5, 3), (2, 7, 4), (24, 3), (2, 16, 4)])
@pytest.mark.parametrize("dtype", [tf.float32, tf.bfloat16])
def test_sums_of_rows(shape, dtype):
    rows = tf.cast(tf.random.stateless_normal(shape, seed=[1, 2]), dtype)
    with cpu_graph():
        found = sum_of_rows(rows)
    assert found.dtype == tf.float32
    np.testing.assert_allclose(found, tf.cast(rows, tf.float64).numpy().sum(axis=-2), atol=1e-5)


def test_quick_cast_is_tensorflows_and_so_is_its_gradient():
    words = np.random.RandomState(0).randint(2**32, size=10**6, dtype=np.uint64).astype(np.uint32)
    words[: 2**17] = np.arange(2**17, dtype=np.uint32) << 15  # exact ones and ties, of every sign and exponent
    numbers = words.view(np.float32)
    x = tf.constant(np.where(np.isnan(numbers), np.float32(np.nan), numbers))
    small = tf.cast(x, tf.bfloat16)

    def found(cast):
        with tf.GradientTape() as tape:
            tape.watch(small)
            up = cast(small, tf.float32)
        return cast(x, tf.bfloat16), up, tape.gradient(up, small, x)

    with cpu_graph():
        ours = found(quick_cast)
    for a, b in zip(ours, found(tf.cast), strict=True):
        assert a.dtype == b.dtype
        bits = tf.uint16 if a.dtype == tf.bfloat16 else tf.uint32
        nan = tf.math.is_nan(b)
        np.testing.assert_array_equal(tf.math.is_nan(a), nan)
        np.testing.assert_array_equal(tf.bitcast(a, bits)[~nan], tf.bitcast(b, bits)[~nan])
