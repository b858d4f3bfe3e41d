"""The network against the authors': outputs, gradients, sizes, initial values."""

import dataclasses
import zlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from support import golden

from diffusion_tf.errors import InputError
from diffusion_tf.ops.backend import Backend, entered
from diffusion_tf.presets import PRESETS, get_preset
from diffusion_tf.rng import CounterRng
from diffusion_tf.unet import UNet, timestep_embedding

CPU_GRAPH = Backend(cpu_graph=True)


def relative_error(ours, expected):
    return np.abs(ours - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("dim", [32, 128, 129])
def test_timestep_embedding(dim):
    fixture = golden.load("timestep_embedding")
    # float32 sines of arguments up to 999 carry the arguments' rounding.
    np.testing.assert_allclose(timestep_embedding(fixture["t"], dim), fixture[f"dim{dim}"], atol=1e-4)


@pytest.mark.parametrize(
    ("dataset", "parameters", "variables"),
    [
        ("cifar10", 35_746_307, 328),
        ("celebahq256", 113_673_219, 450),
        ("lsun_bedroom_large", 255_677_955, 450),
    ],
)
def test_size(dataset, parameters, variables):
    model = UNet.from_preset(PRESETS[dataset])
    assert model.count_params() == parameters
    assert len(model.trainable_variables) == len(model.variables) == variables


def test_256x256_presets_share_one_network():
    nets = [
        dataclasses.replace(PRESETS[name], dataset="a", num_steps=1, random_flip=True)
        for name in ("celebahq256", "lsun_church", "lsun_bedroom", "lsun_cat")
    ]
    assert len(set(nets)) == 1


def test_learned_variance_doubles_the_output():
    model = UNet.from_preset(get_preset("cifar10", model_var_type="learned", loss_type="kl"))
    assert model.count_params() == 35_749_766
    assert model(tf.zeros([2, 32, 32, 3]), tf.zeros([2], tf.int32)).shape == (2, 32, 32, 6)


@pytest.mark.parametrize("how", ["graph", "xla", "regions", "tpu"])
def test_output_and_gradients_are_the_authors(how):
    fixture, stream = golden.load("unet_small"), np.random.RandomState(4242)
    model = UNet.from_preset(golden.SMALL)
    golden.assign_random_weights(model, stream)
    np.testing.assert_allclose(fixture["x"], stream.standard_normal((2, 16, 16, 3)), atol=1e-6)

    @tf.function(jit_compile=how == "xla")
    def output_and_gradients(x):
        with tf.GradientTape() as tape, entered(Backend(tpu=how == "tpu", cpu_graph=how == "regions")):
            tape.watch(x)
            output = model(x, fixture["t"])
            loss = tf.reduce_sum(output * fixture["cotangent"])
        return output, tape.gradient(loss, [x, *(v.value for v in model.trainable_variables)])

    output, (grad_x, *grads) = output_and_gradients(tf.constant(fixture["x"]))
    assert relative_error(output, fixture["output"]) < 1e-5
    assert relative_error(grad_x, fixture["grad_x"]) < 1e-4
    for variable, grad in zip(model.trainable_variables, grads, strict=True):
        name = golden.tf1_name(variable.path)
        kept, norm = fixture[f"g/{name}"], fixture[f"norm/g/{name}"]
        flat = grad.numpy().ravel()
        if name in golden.ZERO_GRADIENT:
            assert np.abs(flat).max() < 1e-4, name
            continue
        assert relative_error(flat[:: -(-flat.size // 256)], kept) < 1e-4, name
        np.testing.assert_allclose(np.linalg.norm(flat), norm, rtol=1e-4, err_msg=name)


def test_ema_weights_of_the_authors_checkpoint():
    fixture = golden.load("ema_small")
    model = UNet.from_preset(golden.SMALL)
    golden.assign_random_weights(model, np.random.RandomState(790))
    assert relative_error(model(fixture["x"], fixture["t"]), fixture["output_ema"]) < 1e-5


def test_full_cifar10_network_is_the_authors():
    fixture = golden.load("full_forward")
    model = UNet.from_preset(PRESETS["cifar10"])
    for variable in model.trainable_variables:
        name = golden.tf1_name(variable.path)
        stream = np.random.RandomState(zlib.crc32(name.encode()) & 0xFFFFFFFF)
        values = stream.standard_normal(variable.shape).astype(np.float32) * np.float32(0.02)
        variable.assign(values + np.float32(1.0) if name.endswith("gamma") else values)
    x = np.random.RandomState(1).standard_normal([1, 32, 32, 3]).astype(np.float32)

    @tf.function
    def in_regions(x, t):
        with entered(CPU_GRAPH):
            return model(x, t)

    for t in (37, 911):
        for function in (model, in_regions):
            assert relative_error(function(x, np.array([t], np.int32)), fixture[f"cifar10_t{t}"]) < 5e-5


def test_groups_of_several_channels_against_a_second_implementation():
    """The golden network has 32 channels, one a group at its first level: a wrong grouping would not show there."""
    model = UNet.from_preset(get_preset("digits", ch=64, ch_mult=(1,), attn_resolutions=(), image_size=8))
    golden.assign_random_weights(model, np.random.RandomState(1))
    block = model.down[0]
    h = np.random.RandomState(2).standard_normal((2, 8, 8, 64)).astype(np.float32)
    grouped = h.astype(np.float64).reshape(2, 64, 32, 2)
    mean, variance = grouped.mean(axis=(1, 3), keepdims=True), grouped.var(axis=(1, 3), keepdims=True)
    expected = ((grouped - mean) / np.sqrt(variance + 1e-6)).reshape(h.shape)
    expected = expected * block.norm1.gamma.numpy() + block.norm1.beta.numpy()
    np.testing.assert_allclose(block.norm1([h]), expected / (1 + np.exp(-expected)), atol=1e-5)  # swish follows


def test_initial_values():
    model = UNet.from_preset(get_preset("cifar10"))
    for variable in model.trainable_variables:
        values, path = variable.numpy(), variable.path
        if path.endswith(("bias", "beta")):
            assert not values.any(), path
        elif path.endswith("gamma"):
            assert (values == 1).all(), path
        else:
            receptive_field = np.prod(values.shape[:-2])
            fan_avg = receptive_field * (values.shape[-2] + values.shape[-1]) / 2
            near_zero = path.endswith(("block_0/conv2/kernel", "proj_out/kernel", "conv_out/kernel")) or "conv2" in path
            limit = np.sqrt(3 * (1e-10 if near_zero else 1.0) / fan_avg)
            assert 0.97 * limit < np.abs(values).max() <= limit * 1.000001, path
            np.testing.assert_allclose(values.std(), limit / np.sqrt(3), rtol=0.05, err_msg=path)
    kernels = [v.numpy().ravel()[:500] for v in model.trainable_variables if v.path.endswith("conv1/kernel")]
    assert len({kernel.tobytes() for kernel in kernels}) == len(kernels), "layers share their random numbers"


def test_initial_values_follow_the_seed():
    a, b, c = (UNet.from_preset(get_preset("digits", seed=seed)).conv_in.kernel.numpy() for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)


def test_dropout_acts_only_with_a_generator_and_at_its_rate():
    model = UNet.from_preset(get_preset("digits", dropout=0.3))
    golden.assign_random_weights(model, np.random.RandomState(0))
    block = model.mid_block_1
    x = np.random.RandomState(0).standard_normal((16, 4, 4, 64)).astype(np.float32)
    temb = tf.zeros([16, 128])
    seen = []
    block.conv2 = lambda h, shortcut: seen.append(h.numpy()) or h
    block([x], temb)
    block([x], temb, rng=CounterRng(0, 5, 0))
    block([x], temb, rng=CounterRng(0, 5, 0))
    block([x], temb, rng=CounterRng(0, 6, 0))
    without, first, again, next_step = seen
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, next_step)
    kept = first != 0
    assert abs(kept.mean() - 0.7) < 5 * np.sqrt(0.21 / kept.size)
    np.testing.assert_allclose(first[kept], without[kept] / 0.7, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_resolutions": (5,)}, r"attn_resolutions=5 never occurs: the network's are \[8, 4\]"),
        ({"ch": 20}, "ch=20: every level needs a multiple of 32 channels"),
        ({"ch_mult": (1, 1, 1, 1, 1)}, "ch_mult has 5 levels, but 8 pixels cannot be halved 4 times"),
    ],
)
def test_impossible_networks_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        UNet.from_preset(get_preset("digits", **change))


def test_bfloat16_multiplies_only():
    """Products are bfloat16; weights, normalisation, softmax, the timestep's layers and the output in float32."""
    preset = get_preset("digits", attn_resolutions=(8,))
    exact, rounded = UNet.from_preset(preset), UNet.from_preset(dataclasses.replace(preset, precision="bfloat16"))
    for model in (exact, rounded):
        golden.assign_random_weights(model, np.random.RandomState(3))
    assert {v.dtype for v in rounded.trainable_variables} == {"float32"}
    x = tf.constant(np.random.RandomState(0).standard_normal((4, 8, 8, 1)).astype(np.float32))
    t = tf.constant([0, 10, 500, 999])
    function = tf.function(lambda x, t: rounded(x, t))
    output, expected = function(x, t), exact(x, t)
    assert output.dtype == tf.float32
    assert 1e-4 < relative_error(output, expected) < 0.05
    dtypes = {}
    for op in function.get_concrete_function(x, t).graph.get_operations():
        for value in op.outputs:
            dtypes.setdefault(op.type, set()).add(value.dtype)
    assert dtypes["Softmax"] == dtypes["Rsqrt"] == dtypes["Mean"] == {tf.float32}
    assert dtypes["Einsum"] == {tf.bfloat16}
    assert dtypes["Conv2D"] == {tf.bfloat16, tf.float32}  # float32: the last, whose output is the model's


def test_denoise_fn_multiplies_in_bfloat16():
    model = UNet.from_preset(get_preset("digits", precision="bfloat16"))
    golden.assign_random_weights(model, np.random.RandomState(3))
    x, t = tf.ones([2, 8, 8, 1]), tf.constant([3, 700])
    params = [v.value for v in model.trainable_variables]
    denoise = model.denoise_fn(params)
    assert set(model.compute_dtypes) == {"bfloat16", "float32"}
    np.testing.assert_array_equal(denoise(x, t), model(x, t))
    graph = tf.function(denoise).get_concrete_function(x, t).graph
    sizes = {w.shape.num_elements() for w in params if len(w.shape) == 4}
    casts = [op for op in graph.get_operations() if op.type == "Cast" and op.inputs[0].shape.num_elements() in sizes]
    assert not casts  # denoise_fn cast them before


def same_network(model, other):
    x, t = tf.ones([2, 8, 8, 1]), tf.constant([3, 700])
    assert model.weight_names == other.weight_names
    np.testing.assert_array_equal(model(x, t), other(x, t))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("weights", ["trainable", "inference", "frozen"])
def test_a_saved_keras_model_gives_the_same_outputs(tmp_path, precision, weights):
    preset = get_preset("digits", attn_resolutions=(4,), precision=precision, seed=7, dropout=0.1)
    model = UNet.from_preset(preset, weights=weights)
    golden.assign_random_weights(model, np.random.RandomState(0))
    if weights == "frozen":
        model.freeze()
    path = str(tmp_path / "unet.keras")
    model.save(path)
    loaded = keras.saving.load_model(path)
    assert type(loaded) is UNet and loaded.get_config() == model.get_config()
    assert [v.dtype for v in loaded.variables] == [v.dtype for v in model.variables]
    same_network(loaded, model)


def test_from_config_makes_the_network_with_its_initial_weights():
    model = UNet.from_preset(get_preset("digits", seed=3))
    again = UNet.from_config(model.get_config())
    for ours, theirs in zip(again.trainable_variables, model.trainable_variables, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())
    assert again.count_params() == model.count_params()


def test_saved_weights_load_into_another_network(tmp_path):
    model, other = (UNet.from_preset(get_preset("digits", attn_resolutions=(4,), seed=seed)) for seed in (0, 1))
    golden.assign_random_weights(model, np.random.RandomState(0))
    model.save_weights(str(tmp_path / "unet.weights.h5"))
    other.load_weights(str(tmp_path / "unet.weights.h5"))
    same_network(other, model)


def test_unknown_weights_are_refused():
    with pytest.raises(InputError, match="weights=thawed: choose one of trainable, inference, frozen"):
        UNet.from_preset(get_preset("digits"), weights="thawed")


def test_a_frozen_network_refuses_every_assignment(tmp_path):
    model = UNet.from_preset(get_preset("digits"), weights="frozen")
    golden.assign_random_weights(model, np.random.RandomState(0))  # allowed until it freezes
    path = str(tmp_path / "unet.weights.h5")
    model.save_weights(path)
    before = [v.numpy() for v in model.variables]
    model.freeze()
    kernel = model.conv_in.kernel
    for assign in (
        lambda: kernel.assign(kernel.numpy() + 1),
        lambda: kernel.assign_add(kernel.numpy()),
        lambda: kernel.value.assign(kernel.numpy() + 1),
        lambda: kernel.value.assign_sub(kernel.numpy()),
        lambda: model.set_weights([w + 1 for w in before]),
        lambda: model.load_weights(path),
    ):
        with pytest.raises(RuntimeError, match="this network's weights are frozen"):
            assign()
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)


CLASSES = get_preset("digits", num_classes=3)


def test_a_label_adds_its_row_of_the_table_to_the_embedding_of_t():
    """Against the network without classes, whose second bias holds the row."""
    model, plain = UNet.from_preset(CLASSES), UNet.from_preset(get_preset("digits"))
    assert model.count_params() - plain.count_params() == 3 * 4 * CLASSES.ch
    random = np.random.RandomState(0)
    golden.assign_random_weights(plain, random)
    table = random.standard_normal((3, 4 * CLASSES.ch)).astype(np.float32)
    weights = dict(zip(plain.weight_names, plain.trainable_variables, strict=True)) | {"class_embedding/kernel": table}
    for name, variable in zip(model.weight_names, model.trainable_variables, strict=True):
        variable.assign(weights[name])
    x, t = random.standard_normal((4, 8, 8, 1)).astype(np.float32), np.array([0, 10, 500, 999], np.int32)
    labels = np.array([2, -1, 0, 2], np.int32)
    rows = [model(x, t, labels), model(x, t)]
    np.testing.assert_allclose(rows[1], plain(x, t), atol=1e-5)  # no labels
    bias = plain.temb_dense1.bias.numpy()
    for i, label in enumerate(labels):
        plain.temb_dense1.bias.assign(bias + (table[label] if label >= 0 else 0.0))
        np.testing.assert_allclose(rows[0][i], plain(x, t)[i], atol=1e-5, err_msg=f"label {label}")
    assert np.abs(rows[0] - rows[1])[[0, 2, 3]].max(axis=(1, 2, 3)).min() > 1e-3


def test_the_class_embedding_is_trained_by_the_labels_that_occur():
    model = UNet.from_preset(CLASSES)
    golden.assign_random_weights(model, np.random.RandomState(0))
    x, t = tf.ones([2, 8, 8, 1]), tf.constant([3, 700])
    with tf.GradientTape() as tape:
        output = tf.reduce_sum(tf.square(model(x, t, tf.constant([1, -1]))))
    gradient = tape.gradient(output, model.class_embedding.kernel.value).numpy()
    assert gradient[1].any() and not gradient[[0, 2]].any()


def test_a_saved_keras_model_keeps_its_classes(tmp_path):
    model = UNet.from_preset(CLASSES)
    golden.assign_random_weights(model, np.random.RandomState(0))
    model.save(str(tmp_path / "unet.keras"))
    loaded = keras.saving.load_model(str(tmp_path / "unet.keras"))
    x, t, labels = tf.ones([2, 8, 8, 1]), tf.constant([3, 700]), tf.constant([1, 2])
    np.testing.assert_array_equal(loaded(x, t, labels), model(x, t, labels))
