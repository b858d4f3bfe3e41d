"""Outputs of the authors' TF1 program (tests/fixtures), their small network, and models for tests.

The fixtures hold no weights: the README there gives the random stream of each.
"""

import pathlib

import numpy as np
import tensorflow as tf

from diffusion_tf import diffusion_utils
from diffusion_tf.diffusion_utils import GaussianDiffusion
from diffusion_tf.interop import tf1
from diffusion_tf.presets import Preset, get_preset
from diffusion_tf.schedules import NoiseSchedule, get_beta_schedule
from diffusion_tf.trained_model import TrainedModel, guided
from diffusion_tf.unet import UNet

_FIXTURES = pathlib.Path(__file__).parent.parent / "fixtures"

# The small network of unet_small.npz, train_small.npz and tf1_small.index.
SMALL = Preset(
    dataset="golden", image_size=16, random_flip=False, ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(8,),
    learning_rate=2e-4, batch_size=4, num_steps=6, warmup_steps=4,
)  # fmt: skip


# Parameters whose exact gradient is 0, so the authors' float32 gradients are rounding noise: biases of attention's k,
# and biases and timestep projections before a group norm with one channel in each group.
ZERO_GRADIENT = {
    f"model/{name}"
    for name in (
        "down_0/block_0/conv1/b down_0/block_0/temb_proj/W down_0/block_0/temb_proj/b down_1/attn_0/k/b mid/attn_1/k/b"
        " up_1/attn_0/k/b up_1/attn_1/k/b up_0/block_0/conv1/b up_0/block_0/temb_proj/W up_0/block_0/temb_proj/b"
        " up_0/block_1/conv1/b up_0/block_1/temb_proj/W up_0/block_1/temb_proj/b up_0/block_1/conv2/b"
        " up_0/block_1/nin_shortcut/b"
    ).split()
}

# A small network for digits, T = 8.
TINY = get_preset("digits", num_timesteps=8, beta_start=0.05, beta_end=0.6, ch_mult=(1,))

# The networks with which the authors' program ran whole loops.
DENOISE_FNS = {
    "dn_x": lambda x, t: 0.1 * x,
    "dn_xt": lambda x, t: 0.1 * x + 0.01 * tf.reshape(tf.cast(t, tf.float32), [-1, 1, 1, 1]),
}


def linear_diffusion(mean_type: str, var_type: str, num_timesteps: int) -> GaussianDiffusion:
    """The diffusion with the paper's schedule and the kl loss."""
    betas = get_beta_schedule("linear", beta_start=1e-4, beta_end=0.02, num_timesteps=num_timesteps)
    return GaussianDiffusion(NoiseSchedule(betas), model_mean_type=mean_type, model_var_type=var_type, loss_type="kl")


def tiny_model(strategy: tf.distribute.Strategy) -> TrainedModel:
    """The network of TINY with random weights, none of them 0."""
    trained = TrainedModel(TINY, strategy)
    assign_random_weights(trained.model, np.random.RandomState(0))
    return trained


def load(name: str) -> dict[str, np.ndarray]:
    """The arrays of tests/fixtures/NAME.npz."""
    with np.load(_FIXTURES / f"{name}.npz", allow_pickle=False) as archive:
        return dict(archive)


def tf1_name(path: str) -> str:
    """The authors' name of our variable: unet/down_0_block_0/conv1/kernel -> model/down_0/block_0/conv1/W."""
    return tf1.tf1_name(path.removeprefix("unet/"))


def tf1_order(model: UNet) -> list[str]:
    """TF1 names of the model's variables, in the order in which the authors' graph creates them."""
    names = [tf1_name(v.path) for v in model.trainable_variables]
    stages = ["temb/", "conv_in/", "down_", "mid/", "up_", "norm_out/", "conv_out/", "class_embedding/"]
    layers = ["norm1", "conv1", "temb_proj", "norm2", "conv2", "nin_shortcut", "norm", "q", "k", "v", "proj_out"]
    blocks = {"down": ["block_0", "attn_0", "block_1", "attn_1", "downsample"], "mid": ["block_1", "attn_1", "block_2"]}
    blocks["up"] = ["block_0", "attn_0", "block_1", "attn_1", "upsample"]

    def key(name: str) -> tuple[int, ...]:
        name = name.removeprefix("model/")
        stage = next(i for i, prefix in enumerate(stages) if name.startswith(prefix))
        section, *rest = name.split("/")
        kind, _, level = section.partition("_")
        if len(rest) == 3 or (len(rest) == 2 and rest[0] in ("downsample", "upsample")):
            level = -int(level or 0) if kind == "up" else int(level or 0)
            layer = layers.index(rest[1]) if rest[1] in layers else 0
            inner = (level, blocks[kind].index(rest[0]), layer)
        else:
            inner = (0, 0, 0) if len(rest) == 1 else (0, ["dense0", "dense1"].index(rest[0]), 0)
        return (stage, *inner, ["W", "b", "beta", "gamma"].index(rest[-1]))

    return sorted(names, key=key)


def assign_random_weights(model: UNet, stream: np.random.RandomState, scale: float = 0.05) -> None:
    """Assigns scale * N(0, 1) to every variable, in TF1's order, plus 1 for the gamma of a group norm."""
    by_name = {tf1_name(v.path): v for v in model.trainable_variables}
    for name in tf1_order(model):
        values = (scale * stream.standard_normal(by_name[name].shape)).astype(np.float32)
        by_name[name].assign(values + 1.0 if name.endswith("gamma") else values)


def decoder_atol(
    diffusion: GaussianDiffusion,
    denoise_fn: diffusion_utils.DenoiseFn,
    x_start: np.ndarray,
    x_t: np.ndarray,
    t: np.ndarray,
    clip: bool,
) -> np.ndarray:
    """By how much two float32 evaluations of the bound's term at t may differ, [B] in bits/dim; 0 if t > 0.

    The decoder's probability is a difference of two CDFs, each with an error of up to 1.2e-7. For an unlikely pixel
    that error exceeds the probability itself, so the logarithm has a large error.

    Args:
      diffusion: the process.
      denoise_fn: the network.
      x_start: [B, H, W, C].
      x_t: [B, H, W, C].
      t: int [B].
      clip: whether the predicted x_0 is clipped.
    """
    p = diffusion.p_mean_variance(denoise_fn, x_t, t, clip_denoised=clip)
    log_likelihood = diffusion_utils.discretized_gaussian_log_likelihood(
        x_start, means=p.mean, log_scales=0.5 * p.log_variance
    )
    probability = np.exp(log_likelihood.numpy().astype(np.float64))
    upper, lower = np.log(probability + 2.4e-7), np.log(np.maximum(probability - 2.4e-7, 1e-12))
    return np.where(t == 0, (upper - lower).mean(axis=(1, 2, 3)) / np.log(2), 0.0)


class KnownModel(TrainedModel):
    """A model with a given function as its network, which takes labels if the preset has classes, and any diffusion."""

    def __init__(
        self,
        preset: Preset,
        strategy: tf.distribute.Strategy,
        diffusion: GaussianDiffusion,
        network: diffusion_utils.DenoiseFn,
    ):
        self.preset, self.strategy, self.diffusion, self.network = preset, strategy, diffusion, network

    def denoise_fn(self, labels: tf.Tensor | None = None, guidance: float = 0.0) -> diffusion_utils.DenoiseFn:
        if labels is None or not self.preset.num_classes:
            return self.network
        return guided(self.network, labels, guidance, self.preset.channels)


def known_model(
    network: diffusion_utils.DenoiseFn, strategy: tf.distribute.Strategy, preset: Preset = TINY
) -> KnownModel:
    """`network` with the diffusion of `preset`."""
    return KnownModel(preset, strategy, GaussianDiffusion.from_preset(preset, shows_overflow=True), network)


def overflowing_model(strategy: tf.distribute.Strategy, value: float, below: int) -> KnownModel:
    """A model of TINY whose network gives `value` for images of a negative first pixel at timesteps t < `below`."""

    def network(x: tf.Tensor, t: tf.Tensor) -> tf.Tensor:
        overflows = (x[:, :1, :1] < 0.0) & (t[:, None, None, None] < below)
        return tf.where(overflows, value, 0.1 * x)

    return known_model(network, strategy)
