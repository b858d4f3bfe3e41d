"""The Keras U-Net of Appendix B.

Residual blocks of two 3x3 convolutions, group normalisation and swish, conditioned on the timestep by an added
projection; single-head self-attention at the chosen resolutions; strided convolutions down, nearest-neighbour
repeats up, and every feature map of the way down concatenated on the way up.
"""

import math
import zlib

import keras
import tensorflow as tf

from diffusion_tf.errors import InputError
from diffusion_tf.presets import Preset
from diffusion_tf.rng import CounterRng

NUM_GROUPS = 32


def timestep_embedding(t: tf.Tensor, dim: int) -> tf.Tensor:
    """Sinusoidal embedding [B, dim] of int timesteps [B]: sines then cosines, a zero column when dim is odd."""
    half = dim // 2
    frequencies = tf.exp(-math.log(10000.0) / (half - 1) * tf.range(half, dtype=tf.float32))
    angles = tf.cast(t, tf.float32)[:, None] * frequencies[None, :]
    return tf.pad(tf.concat([tf.sin(angles), tf.cos(angles)], axis=1), [[0, 0], [0, dim % 2]])


class _Initializers:
    """Variance-scaling initialisers, each seeded by the run's seed and the name of the layer that it fills."""

    def __init__(self, seed: int):
        self.seed = seed

    def __call__(self, name: str, scale: float = 1.0) -> keras.initializers.Initializer:
        seed = zlib.crc32(f"{self.seed}/{name}".encode()) >> 1
        return keras.initializers.VarianceScaling(scale, mode="fan_avg", distribution="uniform", seed=seed)


# The last layer of each branch starts near zero, so that every block starts as the identity.
_NEAR_ZERO = 1e-10


def _conv(channels: int, init: keras.initializers.Initializer, name: str, strides: int = 1) -> keras.layers.Layer:
    return keras.layers.Conv2D(channels, 3, strides, padding="same", kernel_initializer=init, name=name)


def _group_norm(name: str) -> keras.layers.Layer:
    return keras.layers.GroupNormalization(NUM_GROUPS, epsilon=1e-6, name=name)  # Keras' own epsilon is 1e-3


class ResnetBlock(keras.layers.Layer):
    """norm, swish, conv, + temb, norm, swish, dropout, conv, + shortcut: [B, H, W, in] -> [B, H, W, channels]."""

    def __init__(self, in_channels: int, channels: int, dropout: float, init: _Initializers, name: str):
        super().__init__(name=name)
        self.dropout = dropout
        self.channels = channels
        self.norm1 = _group_norm("norm1")
        self.conv1 = _conv(channels, init(f"{name}/conv1"), "conv1")
        self.temb_proj = keras.layers.Dense(channels, kernel_initializer=init(f"{name}/temb_proj"), name="temb_proj")
        self.norm2 = _group_norm("norm2")
        self.conv2 = _conv(channels, init(f"{name}/conv2", _NEAR_ZERO), "conv2")
        self.nin_shortcut = None
        if in_channels != channels:
            self.nin_shortcut = keras.layers.Dense(
                channels, kernel_initializer=init(f"{name}/nin_shortcut"), name="nin_shortcut"
            )

    def call(self, x, temb, rng: CounterRng | None = None):
        """Maps x [B, H, W, in] and temb [B, 4 ch]; dropout acts where `rng` is given."""
        h = self.conv1(tf.nn.silu(self.norm1(x)))
        h += self.temb_proj(tf.nn.silu(temb))[:, None, None, :]
        h = tf.nn.silu(self.norm2(h))
        if rng is not None and self.dropout > 0.0:
            keep = rng.uniform(f"dropout/{self.name}", h.shape) >= self.dropout
            h = tf.where(keep, h / (1.0 - self.dropout), 0.0)
        h = self.conv2(h)
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class AttentionBlock(keras.layers.Layer):
    """Single-head self-attention over all positions, added to its input: [B, H, W, C] -> [B, H, W, C]."""

    def __init__(self, channels: int, init: _Initializers, name: str):
        super().__init__(name=name)
        self.scale = channels**-0.5
        self.norm = _group_norm("norm")
        self.q, self.k, self.v = (
            keras.layers.Dense(channels, kernel_initializer=init(f"{name}/{part}"), name=part) for part in "qkv"
        )
        self.proj_out = keras.layers.Dense(
            channels, kernel_initializer=init(f"{name}/proj_out", _NEAR_ZERO), name="proj_out"
        )

    def call(self, x):
        """Maps x [B, H, W, C]."""
        _, height, width, channels = x.shape
        h = tf.reshape(self.norm(x), [-1, height * width, channels])
        logits = tf.einsum("bqc,bkc->bqk", self.q(h), self.k(h)) * self.scale
        weights = tf.cast(tf.nn.softmax(tf.cast(logits, tf.float32)), h.dtype)
        h = tf.einsum("bqk,bkc->bqc", weights, self.v(h))
        return x + tf.reshape(self.proj_out(h), [-1, height, width, channels])


class UNet(keras.Model):
    """The denoising network: `model(x_t, t)`, [B, H, W, C] and int32 [B] to [B, H, W, out_channels] float32.

    Dropout acts only where a `CounterRng` is given: `model(x_t, t, rng=rng)`.

    Variables are named as in the authors' checkpoints, `down_0_block_0/conv1/kernel` for their
    `model/down_0/block_0/conv1/W`.

    Args:
      image_shape: (H, W, C) of x_t, H and W divisible by 2^(levels - 1).
      out_channels: C, or 2C for learned variances.
      ch, ch_mult, num_res_blocks, attn_resolutions, dropout: as in `Preset`.
      seed: of the initial weights.

    Raises:
      InputError: channels not divisible by 32 groups, a resolution that cannot be halved as often as asked, or an
        attention resolution that never occurs.
    """

    def __init__(self, *, image_shape, out_channels, ch, ch_mult, num_res_blocks, attn_resolutions, dropout, seed=0):
        super().__init__(name="unet")
        image_size, levels = image_shape[0], len(ch_mult)
        if image_size % 2 ** (levels - 1):
            raise InputError(
                f"--ch_mult has {levels} levels, but {image_size} pixels cannot be halved {levels - 1} times"
            )
        resolutions = [image_size // 2**level for level in range(levels)]
        for resolution in set(attn_resolutions) - set(resolutions):
            raise InputError(f"--attn_resolutions={resolution} never occurs: the network's are {resolutions}")
        if any(ch * mult % NUM_GROUPS for mult in ch_mult):
            raise InputError(f"--ch={ch}: every level needs a multiple of {NUM_GROUPS} channels (group normalisation)")

        init = _Initializers(seed)
        self.ch = ch
        self.temb_dense0 = keras.layers.Dense(4 * ch, kernel_initializer=init("temb/dense0"), name="temb_dense0")
        self.temb_dense1 = keras.layers.Dense(4 * ch, kernel_initializer=init("temb/dense1"), name="temb_dense1")
        self.conv_in = _conv(ch, init("conv_in"), "conv_in")

        # A list of blocks for each level, and the convolutions between the levels.
        self.down, self.downsample, self.up, self.upsample = [], [], [], []
        channels, skip_channels = ch, [ch]
        for level, mult in enumerate(ch_mult):
            blocks = []
            for i in range(num_res_blocks):
                blocks.append(ResnetBlock(channels, ch * mult, dropout, init, f"down_{level}_block_{i}"))
                if resolutions[level] in attn_resolutions:
                    blocks.append(AttentionBlock(ch * mult, init, f"down_{level}_attn_{i}"))
                channels = ch * mult
                skip_channels.append(channels)
            self.down.append(blocks)
            if level != levels - 1:
                name = f"down_{level}_downsample_conv"
                self.downsample.append(_conv(channels, init(name), name, strides=2))
                skip_channels.append(channels)

        self.mid = [
            ResnetBlock(channels, channels, dropout, init, "mid_block_1"),
            AttentionBlock(channels, init, "mid_attn_1"),
            ResnetBlock(channels, channels, dropout, init, "mid_block_2"),
        ]

        for level, mult in reversed(list(enumerate(ch_mult))):
            blocks = []
            for i in range(num_res_blocks + 1):
                in_channels = channels + skip_channels.pop()
                blocks.append(ResnetBlock(in_channels, ch * mult, dropout, init, f"up_{level}_block_{i}"))
                if resolutions[level] in attn_resolutions:
                    blocks.append(AttentionBlock(ch * mult, init, f"up_{level}_attn_{i}"))
                channels = ch * mult
            self.up.append(blocks)
            if level != 0:
                name = f"up_{level}_upsample_conv"
                self.upsample.append(_conv(channels, init(name), name))

        self.norm_out = _group_norm("norm_out")
        self.conv_out = _conv(out_channels, init("conv_out", _NEAR_ZERO), "conv_out")
        # One symbolic call creates the variables, so that the model is complete from here on.
        self(keras.Input(image_shape), keras.Input((), dtype="int32"))

    @classmethod
    def from_preset(cls, preset: Preset) -> "UNet":
        """The network that `preset` describes."""
        return cls(
            image_shape=preset.image_shape,
            out_channels=preset.channels * (2 if preset.model_var_type == "learned" else 1),
            ch=preset.ch,
            ch_mult=preset.ch_mult,
            num_res_blocks=preset.num_res_blocks,
            attn_resolutions=preset.attn_resolutions,
            dropout=preset.dropout,
            seed=preset.seed,
        )

    def call(self, x_t, t, rng: CounterRng | None = None):
        """Maps x_t [B, H, W, C] and t int32 [B]; dropout acts where `rng` is given."""
        temb = self.temb_dense1(tf.nn.silu(self.temb_dense0(timestep_embedding(t, self.ch))))

        h = self.conv_in(x_t)
        skips = [h]
        for level, blocks in enumerate(self.down):
            for block in blocks:
                if isinstance(block, AttentionBlock):
                    skips[-1] = h = block(h)
                else:
                    h = block(h, temb, rng=rng)
                    skips.append(h)
            if level < len(self.downsample):
                h = self.downsample[level](h)
                skips.append(h)

        for block in self.mid:
            h = block(h) if isinstance(block, AttentionBlock) else block(h, temb, rng=rng)

        for level, blocks in enumerate(self.up):
            for block in blocks:
                if isinstance(block, AttentionBlock):
                    h = block(h)
                else:
                    h = block(tf.concat([h, skips.pop()], axis=-1), temb, rng=rng)
            if level < len(self.upsample):
                h = self.upsample[level](tf.repeat(tf.repeat(h, 2, axis=1), 2, axis=2))

        return tf.cast(self.conv_out(tf.nn.silu(self.norm_out(h))), tf.float32)
