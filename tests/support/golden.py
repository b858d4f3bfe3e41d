"""Numbers of the authors' TF1 program, and the small network that they belong to.

The weights are not stored: each fixture's description gives the random stream that they were drawn from.
"""

import pathlib

import numpy as np
import tensorflow as tf

from diffusion_tf import diffusion_utils
from diffusion_tf.diffusion_utils import GaussianDiffusion
from diffusion_tf.interop import tf1
from diffusion_tf.presets import Preset, get_preset
from diffusion_tf.schedules import NoiseSchedule, get_beta_schedule
from diffusion_tf.trained_model import TrainedModel
from diffusion_tf.unet import UNet

_FIXTURES = pathlib.Path(__file__).parent.parent / "fixtures"

# The authors' small network: unet_small.npz, train_small.npz and the outputs of their small checkpoint.
SMALL = Preset(
    dataset="golden", image_size=16, random_flip=False, ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(8,),
    learning_rate=2e-4, batch_size=4, num_steps=6, warmup_steps=4,
)  # fmt: skip


# In exact arithmetic these have no gradient at all (attention's k biases; biases and timestep projections before
# groups of one channel), so that the authors' float32 values are rounding noise.
ZERO_GRADIENT = {
    f"model/{name}"
    for name in (
        "down_0/block_0/conv1/b down_0/block_0/temb_proj/W down_0/block_0/temb_proj/b down_1/attn_0/k/b mid/attn_1/k/b"
        " up_1/attn_0/k/b up_1/attn_1/k/b up_0/block_0/conv1/b up_0/block_0/temb_proj/W up_0/block_0/temb_proj/b"
        " up_0/block_1/conv1/b up_0/block_1/temb_proj/W up_0/block_1/temb_proj/b up_0/block_1/conv2/b"
        " up_0/block_1/nin_shortcut/b"
    ).split()
}

# The networks of the authors' whole loops.
DENOISE_FNS = {
    "dn_x": lambda x, t: 0.1 * x,
    "dn_xt": lambda x, t: 0.1 * x + 0.01 * tf.reshape(tf.cast(t, tf.float32), [-1, 1, 1, 1]),
}


def linear_diffusion(mean_type, var_type, num_timesteps):
    """The diffusion of the linear schedule."""
    betas = get_beta_schedule("linear", beta_start=1e-4, beta_end=0.02, num_timesteps=num_timesteps)
    return GaussianDiffusion(NoiseSchedule(betas), model_mean_type=mean_type, model_var_type=var_type, loss_type="kl")


def tiny_model(strategy) -> TrainedModel:
    """A small network for digits with visible weights, T = 8."""
    preset = get_preset("digits", num_timesteps=8, beta_start=0.05, beta_end=0.6, ch_mult=(1,))
    trained = TrainedModel(preset, strategy)
    assign_random_weights(trained.model, np.random.RandomState(0))
    return trained


def load(name: str) -> dict[str, np.ndarray]:
    """The arrays of a fixture."""
    with np.load(_FIXTURES / f"{name}.npz", allow_pickle=False) as archive:
        return dict(archive)


def tf1_name(path: str) -> str:
    """The authors' variable for one of ours: unet/down_0_block_0/conv1/kernel -> model/down_0/block_0/conv1/W."""
    return tf1.tf1_name(path.removeprefix("unet/"))


def tf1_order(model: UNet) -> list[str]:
    """The model's variables by their TF1 names, in the order in which the authors' graph creates them."""
    names = [tf1_name(v.path) for v in model.trainable_variables]
    stages = ["temb/", "conv_in/", "down_", "mid/", "up_", "norm_out/", "conv_out/"]
    parts = ["norm1", "conv1", "temb_proj", "norm2", "conv2", "nin_shortcut", "norm", "q", "k", "v", "proj_out"]
    blocks = {"down": ["block_0", "attn_0", "block_1", "attn_1", "downsample"], "mid": ["block_1", "attn_1", "block_2"]}
    blocks["up"] = ["block_0", "attn_0", "block_1", "attn_1", "upsample"]

    def key(name):
        name = name.removeprefix("model/")
        stage = next(i for i, prefix in enumerate(stages) if name.startswith(prefix))
        section, *rest = name.split("/")
        kind, _, level = section.partition("_")
        if len(rest) == 3 or (len(rest) == 2 and rest[0] in ("downsample", "upsample")):
            level = -int(level or 0) if kind == "up" else int(level or 0)
            part = parts.index(rest[1]) if rest[1] in parts else 0
            inner = (level, blocks[kind].index(rest[0]), part)
        else:
            inner = (0, 0, 0) if len(rest) == 1 else (0, ["dense0", "dense1"].index(rest[0]), 0)
        return (stage, *inner, ["W", "b", "beta", "gamma"].index(rest[-1]))

    return sorted(names, key=key)


def assign_random_weights(model: UNet, stream: np.random.RandomState, scale: float = 0.05) -> None:
    """Draws every variable from `stream` in TF1's order; group normalisation's gamma is 1 more."""
    by_name = {tf1_name(v.path): v for v in model.trainable_variables}
    for name in tf1_order(model):
        values = (scale * stream.standard_normal(by_name[name].shape)).astype(np.float32)
        by_name[name].assign(values + 1.0 if name.endswith("gamma") else values)


def decoder_atol(diffusion, denoise_fn, x_start, x_t, t, clip):
    """How far apart two float32 evaluations of the bound's term at t may lie, [B] in bits/dim; 0 where t > 0.

    The decoder's probability is the difference of two CDFs, each good to 1.2e-7, so that an unlikely pixel's logarithm
    (floored at 1e-12) says little: the interval of each pixel's logarithm follows from that.
    """
    p = diffusion.p_mean_variance(denoise_fn, x_t, t, clip_denoised=clip)
    log_likelihood = diffusion_utils.discretized_gaussian_log_likelihood(
        x_start, means=p.mean, log_scales=0.5 * p.log_variance
    )
    probability = np.exp(log_likelihood.numpy().astype(np.float64))
    upper, lower = np.log(probability + 2.4e-7), np.log(np.maximum(probability - 2.4e-7, 1e-12))
    return np.where(t == 0, (upper - lower).mean(axis=(1, 2, 3)) / np.log(2), 0.0)


class KnownModel(TrainedModel):
    """A network that is a function, and any diffusion, where a `TrainedModel` is wanted."""

    def __init__(self, preset, strategy, diffusion, network):
        self.preset, self.strategy, self.diffusion, self.network = preset, strategy, diffusion, network

    def denoise_fn(self):
        return self.network
