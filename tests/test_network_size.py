"""The counted size of networks, beside the networks themselves."""

import pytest

from diffusion_tf.network_size import network_size
from diffusion_tf.presets import PRESETS, Preset, get_preset
from diffusion_tf.unet import UNet

SMALL = {"image_size": 16, "ch": 32, "channels": 3}


@pytest.mark.parametrize(
    ("name", "parameters"), [("cifar10", 35_746_307), ("celebahq256", 113_673_219), ("lsun_bedroom_large", 255_677_955)]
)
def test_the_papers_networks_have_their_number_of_parameters(name, parameters):
    assert network_size(PRESETS[name]).parameters == parameters


@pytest.mark.parametrize(
    "preset",
    [
        get_preset("digits"),
        Preset(dataset="images", **SMALL, ch_mult=(1, 2, 3), num_res_blocks=1, attn_resolutions=(16, 4)),
        Preset(dataset="images", **SMALL, ch_mult=(2,), num_res_blocks=3, attn_resolutions=()),
        Preset(
            dataset="images", **SMALL, image_width=32, ch_mult=(1, 2), attn_resolutions=(8,), model_var_type="learned"
        ),
    ],
)
def test_parameters_are_those_of_the_network(preset):
    assert network_size(preset).parameters == UNet.from_preset(preset).count_params()
