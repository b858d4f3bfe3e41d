"""Inception from PyTorch's weights against pytorch-fid's own network, both with the same random weights."""

import functools

import numpy as np
import pytest
import safetensors.numpy
import tensorflow as tf
from support import golden
from support.inception_weights import random_weight

from diffusion_tf.errors import ConfigError, InputError
from diffusion_tf.evaluation.feature_networks import inception_network
from diffusion_tf.evaluation.fid_inception import fid_inception, weight_shapes
from diffusion_tf.runtime.strategies import make_strategy


@functools.cache
def random_weights():
    return {name: random_weight(name, shape) for name, shape in weight_shapes().items()}


def test_features_are_those_of_pytorch_fid(tmp_path):
    """The images go through resizing, scaling and all blocks."""
    path, expected = tmp_path / "inception.safetensors", golden.load("inception_random")
    counters = {"Conv2d_1a_3x3.bn.num_batches_tracked": np.asarray(3)}
    path.write_bytes(safetensors.numpy.save({**random_weights(), **counters}))
    network = inception_network(str(path), make_strategy("one_device"))
    outputs = network.apply(tf.constant(expected["images"], tf.float32))
    assert (network.name, network.resize) == ("inception", "PyTorch bilinear to 299")
    for name, bias in (("features", 0.0), ("logits", random_weights()["fc.bias"])):
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(outputs[name] + bias, expected[name], rtol=1e-4, atol=1e-5 * scale)


def test_weights_of_another_network_are_refused_by_name(tmp_path):
    sound = {name: np.broadcast_to(np.float32(0), shape) for name, shape in weight_shapes().items()}
    for changed, message in (
        (
            {"fc.weight": np.broadcast_to(np.float32(0), (1000, 2048))},
            r"fc.weight is float32 \(1000, 2048\), not float",
        ),
        ({"Mixed_7c.branch1x1.bn.bias": np.zeros(320)}, r"bn.bias is float64 \(320,\), not float32 \(320,\)"),
        ({"blocks.0.0.conv.weight": np.zeros(3)}, "blocks.0.0.conv.weight is unknown"),
    ):
        with pytest.raises(InputError, match=f"x.pth holds another network: .*{message}"):
            fid_inception({**sound, **changed}, "x.pth")
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors.numpy.save({"a": np.zeros(3)}))
    with pytest.raises(ConfigError, match=r"inception: .*x.safetensors holds another network: Conv2d_1a_3x3"):
        inception_network(str(path), make_strategy("one_device"))
    path.write_bytes(b"\x80\x04.")
    with pytest.raises(ConfigError, match=r"inception: .*x.safetensors is a pickle, which may run code: give the"):
        inception_network(str(path), make_strategy("one_device"))
