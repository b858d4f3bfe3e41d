"""Compiled regions of a graph against the same functions without compilation."""

import numpy as np
import pytest
import tensorflow as tf

from diffusion_tf.ops.cpu.regions import fast_cast, region, sum_of_rows


def scaled(maps: list[tf.Tensor], keep: tf.Tensor, weight: tf.Tensor, *, power: int) -> list[tf.Tensor]:
    first, second = maps
    return [tf.where(keep, first**power * weight, 0.0), tf.sin(second)]


def outputs_and_gradients(function):
    random = np.random.RandomState(0)
    maps = [tf.constant(random.standard_normal((4, 3)), tf.float32) for _ in range(2)]
    keep, weight = tf.constant(random.uniform(size=(4, 3)) < 0.5), tf.constant(1.5)
    with tf.GradientTape() as tape:
        tape.watch([*maps, weight])
        a, b = function(maps, keep, weight, power=3)
        loss = tf.reduce_sum(a) + 2.0 * tf.reduce_sum(b)
    return [a, b, *tape.gradient(loss, [*maps, weight])]


def test_a_regions_outputs_and_gradients_are_the_functions():
    in_region = tf.function(lambda: outputs_and_gradients(region(scaled)))
    calls = [node for node in in_region.get_concrete_function().graph.as_graph_def().node if "Call" in node.op]
    assert len(calls) == 2  # forward and backward
    for ours, expected in zip(in_region(), outputs_and_gradients(scaled), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(5, 3), (2, 7, 4), (24, 3), (2, 16, 4)])
@pytest.mark.parametrize("dtype", [tf.float32, tf.bfloat16])
def test_sums_of_rows_are_exact_to_float32(shape, dtype):
    rows = tf.cast(tf.random.stateless_normal(shape, seed=[1, 2]), dtype)
    found = sum_of_rows(rows)
    assert found.dtype == tf.float32
    np.testing.assert_allclose(found, tf.cast(rows, tf.float64).numpy().sum(axis=-2), atol=1e-5)


def test_fast_cast_and_its_gradient_are_tensorflows_bit_for_bit():
    words = np.random.RandomState(0).randint(2**32, size=10**6, dtype=np.uint64).astype(np.uint32)
    words[: 2**17] = np.arange(2**17, dtype=np.uint32) << 15  # exact values and ties of every sign and exponent
    numbers = words.view(np.float32)
    x = tf.constant(np.where(np.isnan(numbers), np.float32(np.nan), numbers))
    small = tf.cast(x, tf.bfloat16)

    def found(cast):
        with tf.GradientTape() as tape:
            tape.watch(small)
            up = cast(small, tf.float32)
        return cast(x, tf.bfloat16), up, tape.gradient(up, small, x)

    for a, b in zip(found(fast_cast), found(tf.cast), strict=True):
        assert a.dtype == b.dtype
        bits = tf.uint16 if a.dtype == tf.bfloat16 else tf.uint32
        nan = tf.math.is_nan(b)
        np.testing.assert_array_equal(tf.math.is_nan(a), nan)
        np.testing.assert_array_equal(tf.bitcast(a, bits)[~nan], tf.bitcast(b, bits)[~nan])
