"""The network as a Keras model: what people know of Keras works on `dtf.UNet`."""

import io
import json

import keras
import numpy as np
import pytest
import tensorflow as tf

import diffusion_tf as dtf

X_T = np.random.RandomState(0).standard_normal((2, 8, 8, 1)).astype(np.float32)
T = np.array([1, 6], np.int32)


def randomized(unet):
    """The same network, its weights drawn so that each of them shows in the output."""
    stream = np.random.RandomState(1)
    for w in unet.trainable_variables:
        w.assign(0.2 * stream.standard_normal(w.shape).astype(np.float32) + (1 if w.path.endswith("gamma") else 0))
    return unet


def output(unet):
    return np.asarray(unet(tf.constant(X_T), tf.constant(T)))


@pytest.mark.parametrize(("name", "parameters"), [("digits", 651_041), ("cifar10", 35_746_307)])
def test_parameters_are_counted(name, parameters):
    unet = dtf.UNet.from_preset(dtf.get_preset(name))
    assert unet.count_params() == parameters
    text = io.StringIO()
    unet.summary(print_fn=lambda line: text.write(line + "\n"))
    assert f"Total params: {parameters:,}" in text.getvalue()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_config_describes_the_network(precision):
    unet = dtf.UNet.from_preset(dtf.get_preset("digits", ch_mult=(1, 2), precision=precision))
    config = json.loads(json.dumps(unet.get_config()))
    again = dtf.UNet.from_config(config)
    assert [(w.path, w.shape) for w in again.trainable_variables] == [
        (w.path, w.shape) for w in unet.trainable_variables
    ]
    assert again.get_config() == unet.get_config()
    np.testing.assert_array_equal(output(randomized(again)), output(randomized(unet)))


@pytest.mark.parametrize("weights", ["trainable", "inference", "frozen"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_saved_model_loads_with_equal_outputs(weights, precision, tmp_path):
    preset = dtf.get_preset("digits", ch_mult=(1, 2), attn_resolutions=(4,), precision=precision)
    unet = randomized(dtf.UNet.from_preset(preset, weights=weights))
    path = str(tmp_path / "x.keras")
    unet.save(path)
    loaded = keras.saving.load_model(path)
    assert isinstance(loaded, dtf.UNet) and [w.dtype for w in loaded.weights] == [w.dtype for w in unet.weights]
    np.testing.assert_array_equal(output(loaded), output(unet))
