"""The counted size of networks, beside the networks themselves."""

import pytest

from diffusion_tf.network_size import network_size, training_bytes
from diffusion_tf.presets import PRESETS, Preset, get_preset
from diffusion_tf.recipes import choose_preset
from diffusion_tf.unet import UNet

SMALL = {"image_size": 16, "ch": 32, "channels": 3}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("cifar10", 35_746_307),
        ("cifar10_small", 8_952_067),
        ("celebahq256", 113_673_219),
        ("lsun_bedroom_large", 255_677_955),
    ],
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


@pytest.mark.parametrize(
    ("shape", "ch", "batch_size", "xla_bytes"),
    [
        ((16, 16, 3), 32, 8, 79_783_524),
        ((32, 32, 3), 64, 16, 672_684_196),
        ((32, 32, 3), 64, 64, 2_125_705_636),
        ((32, 64, 1), 32, 32, 892_455_748),
    ],
)
def test_the_estimated_memory_is_that_of_xlas_programs(shape, ch, batch_size, xla_bytes):
    """Arguments and temporaries of the exported train_step, as XLA's compiler for CPUs (jaxlib 0.10.2) counts them."""
    preset = choose_preset(shape, 2000, ch=ch, batch_size=batch_size)
    assert training_bytes(preset, batch_size) == pytest.approx(xla_bytes, rel=0.25)
