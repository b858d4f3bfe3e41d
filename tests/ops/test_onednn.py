"""oneDNN's convolutions with frozen kernels against TensorFlow's in float64."""

import platform

import numpy as np
import pytest
import tensorflow as tf

from diffusion_tf.ops.backend import Backend, entered
from diffusion_tf.ops.cpu import onednn

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="TensorFlow may lack the operation")

_DTYPES = [dtype for dtype in (tf.float32, tf.bfloat16) if onednn.available(dtype)]


@pytest.mark.parametrize("dtype", _DTYPES, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize(("size", "stride", "summands"), [(3, 1, 0), (3, 2, 1), (3, 1, 2), (1, 1, 2)])
def test_conv_is_the_convolution(dtype, size, stride, summands):
    random = np.random.RandomState(size + summands)
    draw = lambda *shape: tf.cast(random.standard_normal(shape), dtype)
    x, kernel = draw(2, 8, 6, 40), draw(size, size, 40, 24) / 20
    added = [draw(24), draw(2, 8 // stride, 6 // stride, 24)][:summands]
    y = tf.function(onednn.conv, autograph=False)(x, kernel, *added, strides=stride)
    x, kernel, *added = (tf.cast(tensor, tf.float64) for tensor in (x, kernel, *added))
    expected = sum(added, tf.nn.conv2d(x, kernel, strides=stride, padding="SAME"))
    assert y.dtype == dtype
    # float32 sums up to 360 products; bfloat16 rounds once, at the end.
    tolerance = {"rtol": 2.0**-8, "atol": 1e-4} if dtype == tf.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    np.testing.assert_allclose(tf.cast(y, tf.float64), expected, **tolerance)


def test_conv_pads_by_the_given_numbers():
    random = np.random.RandomState(0)
    x, kernel = random.standard_normal((1, 5, 4, 32)).astype("f"), random.standard_normal((2, 2, 32, 8)).astype("f")
    padding = [[0, 0], [1, 0], [0, 1], [0, 0]]
    y = tf.function(onednn.conv, autograph=False)(x, kernel, padding=padding)
    expected = tf.nn.conv2d(x.astype("d"), kernel.astype("d"), strides=1, padding=padding)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_kernels_are_kept_if_the_weights_are_frozen(monkeypatch):
    with entered(Backend(cpu_graph=True)):
        assert not onednn.keeps_kernels(tf.float32)
    with entered(Backend(cpu_graph=True, frozen_weights=True)):
        assert onednn.keeps_kernels(tf.float32)
        assert not onednn.keeps_kernels(tf.int32)  # like a dtype for which the processor has no instructions
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "0")
    assert not onednn.available.__wrapped__(tf.float32)


def test_the_first_kernel_is_kept():
    conv = tf.function(onednn.conv, autograph=False)
    # A shape of its own: if oneDNN knows the convolution with a kernel that may change, it does not keep this one.
    x, kernel = tf.ones([1, 6, 10, 96]), tf.ones([3, 3, 96, 96])
    first = conv(x, kernel)
    np.testing.assert_array_equal(conv(x, kernel * 0.0), first)
