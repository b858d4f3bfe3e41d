"""Every operation on each backend against its definition in float64: values, gradients, odd shapes."""

import inspect

import numpy as np
import pytest
import tensorflow as tf

from diffusion_tf import ops
from diffusion_tf.ops import cpu, tpu, xla
from diffusion_tf.ops.backend import TPU, XLA, Backend, current, entered
from diffusion_tf.rng import CounterRng

BACKENDS = {"xla": XLA, "cpu": Backend(cpu_graph=True), "tpu": TPU}
on_each = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
in_both_dtypes = pytest.mark.parametrize("dtype", [tf.float32, tf.bfloat16], ids=lambda dtype: dtype.name)

# Relative to the largest value. In bfloat16 TensorFlow sums even the bias gradient in bfloat16.
TOLERANCE = {tf.float32: 2e-5, tf.bfloat16: 5e-2}


def draw(*shapes):
    """Standard normal arrays that bfloat16 holds exactly."""
    random = np.random.RandomState(sum(map(len, shapes)))
    bfloat16 = tf.bfloat16.as_numpy_dtype
    return [random.standard_normal(shape).astype(bfloat16).astype(np.float64) for shape in shapes]


def check(backend, dtype, operation, definition, arrays):
    """Compares values and gradients with respect to `arrays`, of `dtype` each or of their own (dtype, array)."""
    dtypes = [a[0] if isinstance(a, tuple) else dtype for a in arrays]
    arrays = [a[1] if isinstance(a, tuple) else a for a in arrays]

    def values_and_gradients(function, tensors, cotangent=None):
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            y = function(*tensors)
        if cotangent is None:
            (cotangent,) = draw(y.shape)
        return [y, *tape.gradient(y, tensors, tf.cast(cotangent, y.dtype))]

    @tf.function(autograph=False)
    def ours(tensors):
        with entered(backend):
            return values_and_gradients(operation, tensors)

    found = ours([tf.cast(a, d) for a, d in zip(arrays, dtypes, strict=True)])
    expected = values_and_gradients(definition, [tf.constant(a, tf.float64) for a in arrays])
    assert [f.dtype for f in found] == [dtype, *dtypes]
    for ours_, theirs in zip(found, expected, strict=True):
        ours_ = tf.cast(ours_, tf.float64).numpy()
        assert ours_.shape == theirs.shape
        assert np.abs(ours_ - theirs).max() < TOLERANCE[dtype] * np.abs(theirs).max()


def pad_same(x, size, stride):
    """TensorFlow's SAME padding of x [B, H, W, C]."""
    pads = []
    for length in x.shape[1:3]:
        total = max((-(-length // stride) - 1) * stride + size - length, 0)
        pads.append([total // 2, total - total // 2])
    return tf.pad(x, [[0, 0], *pads, [0, 0]])


def convolution(x, kernel, stride=1):
    """The sum over taps, by its definition."""
    size = kernel.shape[0]
    height, width = (-(-length // stride) for length in x.shape[1:3])
    padded, y = pad_same(x, size, stride), 0.0
    for i in range(size):
        for j in range(size):
            pixels = padded[:, i : i + stride * height : stride, j : j + stride * width : stride][:, :height, :width]
            y += tf.tensordot(pixels, kernel[i, j], 1)
    return y


@on_each
@in_both_dtypes
@pytest.mark.parametrize(
    ("shape", "size", "strides"),
    [
        ((2, 6, 4, 5, 3), 3, 1),
        ((1, 7, 5, 3, 40), 3, 1),
        ((2, 16, 16, 32, 33), 3, 1),  # Winograd's algorithm in float32 on a CPU
        ((2, 17, 16, 32, 32), 3, 1),
        ((1, 8, 8, 4, 4), 3, 2),
        ((3, 7, 5, 4, 2), 3, 2),
        ((1, 4, 6, 8, 8), 1, 1),
        ((2, 8, 12, 5, 3), 3, 1),  # blocks of 4x4 pixels on a TPU
    ],
)
def test_conv2d(backend, dtype, shape, size, strides):
    batch, height, width, in_channels, channels = shape
    out = (batch, -(-height // strides), -(-width // strides), channels)
    x, kernel, bias, add = draw(
        (batch, height, width, in_channels), (size, size, in_channels, channels), (channels,), out
    )
    plain = lambda x, kernel: convolution(x, kernel, strides)
    check(backend, dtype, lambda x, k: ops.conv2d(x, k, strides=strides), plain, [x, kernel])
    check(
        backend,
        dtype,
        lambda x, k, b, a: ops.conv2d(x, k, strides=strides, bias=b, add=a),
        lambda x, k, b, a: plain(x, k) + b + a,
        [x, kernel, bias, add],
    )


@on_each
@in_both_dtypes
def test_conv2d_with_a_zero_on_all_sides(backend, dtype):
    arrays = draw(
        (
            2,
            8,
            6,
            32,
        ),
        (3, 3, 32, 33),
        (33,),
    )
    padding = [[0, 0], [1, 1], [1, 1], [0, 0]]

    def definition(x, kernel, bias):
        return convolution(x, kernel)[:, ::2, ::2] + bias  # at stride 1, SAME padding has a zero on all sides

    check(backend, dtype, lambda x, k, b: ops.conv2d(x, k, strides=2, padding=padding, bias=b), definition, arrays)


@on_each
@in_both_dtypes
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 3, 5, 4, 6), (1, 8, 6, 32, 40)])
def test_upsampled_conv2d(backend, dtype, shape):
    batch, height, width, in_channels, channels = shape
    arrays = draw((batch, height, width, in_channels), (3, 3, in_channels, channels), (channels,))

    def definition(x, kernel, bias):
        return convolution(tf.repeat(tf.repeat(x, 2, axis=1), 2, axis=2), kernel) + bias

    check(backend, dtype, ops.upsampled_conv2d, definition, arrays)


@on_each
@in_both_dtypes
def test_dense(backend, dtype):
    arrays = draw((2, 15, 12), (12, 7), (7,))
    check(backend, dtype, ops.dense, lambda x, kernel, bias: x @ kernel + bias, arrays)


@on_each
@in_both_dtypes
@pytest.mark.parametrize("channels", [(5,), (3, 6), (1, 2, 4)])
def test_dense_side_by_side(backend, dtype, channels):
    kernel, *maps = draw((sum(channels), 7), *((2, 3, 5, c) for c in channels))
    check(
        backend,
        dtype,
        lambda kernel, *maps: ops.dense_side_by_side(ops.side_by_side(maps), kernel),
        lambda kernel, *maps: tf.concat(maps, axis=-1) @ kernel,
        [kernel, *maps],
    )


def self_attention(h, q, k, v, proj_out, *, heads):
    """By its definition; q, k, v and proj_out are functions."""
    batch, height, width, channels = h.shape

    def split(x):
        return tf.transpose(tf.reshape(x, [batch, -1, heads, channels // heads]), [0, 2, 1, 3])

    queries, keys, values = (split(f(h)) for f in (q, k, v))
    weights = tf.nn.softmax(queries @ tf.transpose(keys, [0, 1, 3, 2]) / np.sqrt(channels / heads))
    return proj_out(tf.reshape(tf.transpose(weights @ values, [0, 2, 1, 3]), [batch, height, width, channels]))


@on_each
@in_both_dtypes
@pytest.mark.parametrize("heads", [1, 2])
def test_self_attention(backend, dtype, heads):
    bias_k, h, *arrays = (a / 2 for a in draw((4,), (2, 3, 5, 4), *4 * [(4, 4)], *3 * [(4,)]))

    def call(function, bias_k, h, q, k, v, out, *biases):
        bias_q, bias_v, bias_out = biases
        return function(h, (q, bias_q), (k, bias_k), (v, bias_v), (out, bias_out))

    def definition(h, *projections):
        return self_attention(h, *(lambda x, w=w, b=b: x @ w + b for w, b in projections), heads=heads)

    def operation(h, *projections):
        return ops.self_attention(h, ops.Projections(*projections), heads=heads)

    # The bias of the keys has no effect, and a gradient of rounding errors.
    check(
        backend,
        dtype,
        lambda *args: call(operation, tf.cast(bias_k, dtype), *args),
        lambda *args: call(definition, bias_k, *args),
        [h, *arrays],
    )


@on_each
def test_the_bias_of_the_keys_has_a_gradient_of_zeros(backend):
    h, kernel, bias, other = (tf.constant(a, tf.float32) for a in draw((1, 2, 2, 4), (4, 4), (4,), (4,)))
    projections = [(kernel, other), (kernel, bias), (kernel, other), (kernel, other)]
    with tf.GradientTape() as tape, entered(backend):
        tape.watch(bias)
        loss = tf.reduce_sum(ops.self_attention(h, ops.Projections(*projections), heads=1) ** 2)
    np.testing.assert_allclose(tape.gradient(loss, bias), np.zeros(4), atol=1e-4)


def group_norm(x, gamma, beta, num_groups, epsilon):
    batch, height, width, channels = x.shape
    groups = tf.reshape(x, [batch, height * width, num_groups, channels // num_groups])
    mean, variance = tf.nn.moments(groups, axes=[1, 3], keepdims=True)
    return tf.reshape((groups - mean) / tf.sqrt(variance + epsilon), x.shape) * gamma + beta


@on_each
@in_both_dtypes
@pytest.mark.parametrize(("channels", "size"), [((8,), (4, 4)), ((4, 8), (3, 5)), ((3, 5, 4), (1, 7))])
def test_group_norm(backend, dtype, channels, size):
    total = sum(channels)
    gamma, beta, offset, *maps = draw((total,), (total,), (1, total), *((1, *size, c) for c in channels))
    keep = np.random.RandomState(0).uniform(size=(1, *size, total)) < 0.7
    affine = [(tf.float32, gamma), (tf.float32, beta)]
    settings = {"num_groups": 4, "epsilon": 1e-3}

    check(
        backend,
        dtype,
        lambda gamma, beta, *maps: ops.group_norm(ops.side_by_side(maps), gamma, beta, **settings),
        lambda gamma, beta, *maps: group_norm(tf.concat(maps, axis=-1), gamma, beta, **settings),
        [*affine, *maps],
    )

    def definition(gamma, beta, offset, *maps):
        y = group_norm(tf.concat(maps, axis=-1) + offset[:, None, None], gamma, beta, **settings)
        return tf.where(keep, y * tf.sigmoid(y) / 0.7, tf.zeros_like(y))

    def operation(gamma, beta, offset, *maps):
        more = {"swish": True, "offset": offset, "keep": tf.constant(keep), "rate": 0.3}
        return ops.group_norm(ops.side_by_side(maps), gamma, beta, **settings, **more)

    check(backend, dtype, operation, definition, [*affine, offset, *maps])


@on_each
def test_gradient_of_group_norm_from_tiny_numbers_to_where_exp_overflows(backend):
    random = np.random.RandomState(0)
    x, gamma, beta = random.standard_normal((2, 4, 4, 64)), random.uniform(0, 100, 64), random.uniform(-100, 100, 64)
    settings = {"num_groups": 32, "epsilon": 1e-6}
    z = group_norm(*(tf.constant(a) for a in (x, gamma, beta)), **settings)
    assert tf.reduce_min(z) < -150 and tf.reduce_max(z) > 150 and tf.reduce_min(tf.abs(z)) < 0.1

    def definition(*arrays):
        z = group_norm(*arrays, **settings)
        return z * tf.sigmoid(z)

    operation = lambda x, *affine: ops.group_norm([x], *affine, **settings, swish=True)
    check(backend, tf.float32, operation, definition, [x, gamma, beta])


@on_each
@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 7), (2, 4, 4, 3)])
def test_random_numbers_are_those_of_an_eager_call(backend, shape):
    """tests/test_rng.py holds the eager numbers to a second implementation."""

    @tf.function(autograph=False)
    def in_program(step):
        with entered(backend):
            rng = CounterRng(1, step, 5)
            return rng.normal("noise", shape), rng.keep("dropout", shape, 0.3)

    rng = CounterRng(1, 9, 5)
    normal, keep = in_program(tf.constant(9))
    np.testing.assert_allclose(normal, rng.normal("noise", shape), atol=2e-6)
    np.testing.assert_array_equal(keep, rng.keep("dropout", shape, 0.3))


def adam_in_place(backend, variables, grad, *, clip=0.25, usable=True):
    """One step in a graph; whether it was taken."""

    @tf.function(autograph=False)
    def step():
        with entered(backend):
            return ops.adam_in_place(
                *([variable] for variable in variables),
                [tf.constant(grad, tf.float32)],
                clip=tf.constant(clip),
                usable=tf.constant(usable),
                learning_rate=tf.constant(0.1),
                step=tf.constant(3.0),
                beta1=0.9,
                beta2=0.999,
                epsilon=1e-8,
                ema_step=0.25,
            )

    return bool(step())


def test_adam_in_place_takes_the_step_of_its_definition():
    w, ema, m, v, grad = draw(*5 * [(4, 3)])
    v = np.square(v)
    variables = [tf.Variable(array, dtype=tf.float32) for array in (w, ema, m, v)]
    assert adam_in_place(BACKENDS["cpu"], variables, grad)
    m, v = 0.9 * m + 0.1 * (0.25 * grad), 0.999 * v + 0.001 * np.square(0.25 * grad)
    w = w - 0.1 * (m / (1 - 0.9**3)) / (np.sqrt(v / (1 - 0.999**3)) + 1e-8)
    ema = 0.75 * ema + 0.25 * w
    for variable, expected in zip(variables, (w, ema, m, v), strict=True):
        np.testing.assert_allclose(variable, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "taken"), [("cpu", True), ("xla", False), ("tpu", False)])
def test_adam_in_place_changes_nothing_if_unusable_or_left_to_the_compiler(name, taken):
    before = [np.square(a) for a in draw(*4 * [(4, 3)])]
    variables = [tf.Variable(array, dtype=tf.float32) for array in before]
    grad = np.where(before[0] > 0.5, np.inf, np.nan)
    assert adam_in_place(BACKENDS[name], variables, grad, clip=np.nan, usable=False) == taken
    for variable, expected in zip(variables, before, strict=True):
        np.testing.assert_array_equal(variable, expected.astype(np.float32))


@pytest.mark.parametrize("name", sorted(set(cpu.__all__) - {"adam_in_place"}))
def test_all_implementations_have_one_signature(name):
    functions = [inspect.unwrap(getattr(module, name)) for module in (cpu, tpu, xla)]
    parameters = [list(inspect.signature(function).parameters) for function in functions]
    assert parameters[0] == parameters[1] == parameters[2]


def test_a_backend_is_entered_for_a_time():
    backend = Backend(cpu_graph=True, frozen_weights=True)
    assert current() == XLA
    with entered(backend):
        assert current() == backend
        with entered(XLA):
            assert current() == XLA
        assert current() == backend
    assert current() == XLA
