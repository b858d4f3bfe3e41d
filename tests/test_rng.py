"""The counter-based noise against a second implementation of Philox and against statistics."""

import zlib

import numpy as np
import scipy.stats
import tensorflow as tf

from diffusion_tf.rng import CounterRng


def philox4x32(counter, key):
    """Philox4x32-10 (Salmon et al. 2011) of one counter (4 words) and key (2 words)."""
    c, k = [int(word) for word in counter], [int(word) for word in key]
    for _ in range(10):
        low, high = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(high >> 32) ^ c[1] ^ k[0], high & 0xFFFFFFFF, (low >> 32) ^ c[3] ^ k[1], low & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def reference_uniform(seed, stream, step, example, size):
    blocks = -(-size // 4)
    words = []
    for block in range(example * blocks, (example + 1) * blocks):
        words += philox4x32((block & 0xFFFFFFFF, block >> 32, step, 0), (zlib.crc32(stream.encode()), seed))
    return (np.array(words[:size], np.uint32) >> 8) / 2**24


def test_second_implementation_is_philox():
    assert philox4x32((0, 0, 0, 0), (0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_uniform_is_philox_at_the_examples_counter():
    for first in (0, 5, 2**33):
        ours = CounterRng(2**31 + 7, 12345, first).uniform("noise", (3, 2, 3, 1)).numpy()
        for row in range(3):
            expected = reference_uniform(2**31 + 7, "noise", 12345, first + row, 6)
            np.testing.assert_array_equal(ours[row].ravel(), expected)


def test_same_numbers_in_eager_graph_and_xla():
    def draw(step, first):  # tensors, because TensorFlow would fold constants before XLA sees them
        rng = CounterRng(1, step, first)
        return rng.uniform("t", (8, 5)), rng.normal("noise", (8, 4, 4, 3))

    uniform, normal = draw(9, 4)
    for compiled in (tf.function(draw), tf.function(draw, jit_compile=True)):
        uniform_here, normal_here = compiled(tf.constant(9), tf.constant(4))
        np.testing.assert_array_equal(uniform_here, uniform)
        np.testing.assert_allclose(normal_here, normal, atol=2e-6)


def test_an_examples_numbers_do_not_depend_on_its_batch():
    whole = CounterRng(1, 2, 0).normal("noise", (16, 3, 3, 1))
    part = CounterRng(1, 2, 11).normal("noise", (5, 3, 3, 1))
    np.testing.assert_allclose(whole[11:], part, atol=2e-6)


def test_normal_is_standard_normal():
    x = CounterRng(0, 0, 0).normal("noise", (1000, 8, 8, 3)).numpy()
    assert scipy.stats.kstest(x.ravel()[:50_000], "norm").pvalue > 1e-3
    assert abs(x.mean()) < 5 / np.sqrt(x.size)
    assert abs(x.var() - 1) < 5 * np.sqrt(2 / x.size)
    assert np.isfinite(x).all()
    # Neighbours, and the two halves that Box-Muller makes of one pair, are uncorrelated.
    rows = x.reshape(1000, -1)
    for other in (
        np.roll(rows, 1, axis=1),
        np.roll(rows, 8, axis=1),
        np.roll(rows, 96, axis=1),
        np.roll(rows, 1, axis=0),
    ):
        assert abs(np.mean(rows * other)) < 5 / np.sqrt(rows.size)


def test_streams_steps_and_seeds_give_independent_numbers():
    base = CounterRng(0, 0, 0).normal("noise", (100, 64)).numpy()
    others = [
        CounterRng(0, 0, 0).normal("flip", (100, 64)),
        CounterRng(0, 1, 0).normal("noise", (100, 64)),
        CounterRng(1, 0, 0).normal("noise", (100, 64)),
        CounterRng(0, 0, 100).normal("noise", (100, 64)),
    ]
    for other in others:
        assert abs(np.mean(base * other.numpy())) < 5 / np.sqrt(base.size)


def test_odd_sizes_have_the_shapes_asked_for():
    assert CounterRng(0, 0, 0).normal("noise", (2, 3, 3, 1)).shape == (2, 3, 3, 1)
    assert CounterRng(0, 0, 0).uniform("t", (7,)).shape == (7,)


def murmur_mix(words):
    """MurmurHash3's fmix32."""
    words = words.astype(np.uint64)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        words = ((words ^ (words >> np.uint64(shift))) * np.uint64(factor)) & np.uint64(0xFFFFFFFF)
    return words


def test_the_dropout_mask_is_a_hash_of_the_position_under_the_examples_key():
    ours = CounterRng(7, 3, 2**33).keep("dropout", (2, 4, 5, 6), 0.25).numpy()
    for row in range(2):
        counter = ((2**33 + row) & 0xFFFFFFFF, (2**33 + row) >> 32, 3, 0)
        key0, key1, *_ = philox4x32(counter, (zlib.crc32(b"dropout"), 7))
        words = murmur_mix(murmur_mix((np.arange(120) + key0) & 0xFFFFFFFF) ^ np.uint64(key1))
        np.testing.assert_array_equal(ours[row].ravel(), words >= 2**30)


def test_the_dropout_mask_is_random_and_the_same_everywhere():
    def draw(step, first):
        return CounterRng(3, step, first).keep("dropout", (16, 16, 16, 32), 0.1)

    mask = draw(5, 7).numpy()
    np.testing.assert_array_equal(tf.function(draw, jit_compile=True)(tf.constant(5), tf.constant(7)), mask)
    np.testing.assert_array_equal(draw(5, 11)[:12], mask[4:])
    assert abs(mask.mean() - 0.9) < 5 * np.sqrt(0.09 / mask.size)
    z = ((mask - 0.9) / 0.3).reshape(16, -1)
    for axis, distance in ((1, 1), (1, 2), (1, 32), (1, 512), (0, 1)):
        assert abs(np.mean(z * np.roll(z, distance, axis=axis))) < 5 / np.sqrt(z.size)
    other = (draw(6, 7).numpy().reshape(16, -1) - 0.9) / 0.3
    assert abs(np.mean(z * other)) < 5 / np.sqrt(z.size)
