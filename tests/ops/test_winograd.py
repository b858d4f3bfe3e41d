"""Winograd's convolution against the direct one in float64."""

import numpy as np
import pytest
import tensorflow as tf

from diffusion_tf.ops.cpu.winograd import conv3x3


@pytest.mark.parametrize("shape", [(2, 4, 6, 3, 5), (1, 2, 2, 1, 1), (3, 16, 8, 32, 7)])
def test_output_and_gradients_are_the_direct_convolutions(shape):
    batch, height, width, in_channels, channels = shape
    random = np.random.RandomState(0)
    x = random.standard_normal((batch, height, width, in_channels))
    kernel = random.standard_normal((3, 3, in_channels, channels))
    grad_y = random.standard_normal((batch, height, width, channels))

    def output_and_gradients(convolve, dtype):
        arguments = [tf.constant(array, dtype) for array in (x, kernel)]
        with tf.GradientTape() as tape:
            tape.watch(arguments)
            y = convolve(*arguments)
        return y, *tape.gradient(y, arguments, tf.constant(grad_y, dtype))

    @tf.function
    def ours():
        return output_and_gradients(conv3x3, tf.float32)

    direct = output_and_gradients(lambda x, kernel: tf.nn.conv2d(x, kernel, strides=1, padding="SAME"), tf.float64)
    for found, expected in zip(ours(), direct, strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-6 * np.abs(expected).max())


def test_it_rounds_less_than_a_running_sum():
    random = np.random.RandomState(1)
    x, kernel = (random.standard_normal(shape).astype("f") for shape in ((2, 16, 16, 128), (3, 3, 128, 64)))
    exact = tf.nn.conv2d(x.astype("d"), kernel.astype("d"), strides=1, padding="SAME").numpy()
    patches = tf.image.extract_patches(x, [1, 3, 3, 1], [1, 1, 1, 1], [1, 1, 1, 1], "SAME").numpy()
    running = np.zeros_like(exact, "f")
    for i, tap in enumerate(kernel.reshape(-1, 64)):
        running += patches[..., i, None] * tap
    rms = lambda y: np.sqrt(np.mean(np.square(y - exact)))
    assert rms(conv3x3(tf.constant(x), tf.constant(kernel)).numpy()) < rms(running)
