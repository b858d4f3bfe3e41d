"""The U-Net of Appendix B.

Residual blocks of two 3x3 convolutions, group normalisation and swish, conditioned on the timestep by an added
projection; single-head self-attention at the chosen resolutions; strided convolutions down, nearest-neighbour
upsampling and convolutions up; every feature map of the way down concatenated on the way up. Options make the
variants that diffusers' UNet2DModel has, such as attention of several heads.
"""

import functools
import math
from collections.abc import Callable, Sequence

import keras
import tensorflow as tf

from diffusion_tf import layers, ops
from diffusion_tf.errors import ConfigError
from diffusion_tf.layers import NEAR_ZERO, NUM_GROUPS, LayerBuilder, WeightsMode
from diffusion_tf.presets import Preset
from diffusion_tf.rng import CounterRng


def timestep_embedding(t: tf.Tensor, dim: int, flip_sin_to_cos: bool = False, freq_shift: int = 1) -> tf.Tensor:
    """Sinusoidal embedding [B, dim] of int timesteps [B]: sines then cosines, a zero column when dim is odd.

    Args:
      t: the timesteps.
      dim: at least 4.
      flip_sin_to_cos: whether the cosines come first.
      freq_shift: 1 or 0: the frequencies are 10000^(-i / (dim // 2 - freq_shift)) for i < dim // 2.
    """
    half = dim // 2
    frequencies = tf.exp(-math.log(10000.0) / (half - freq_shift) * tf.range(half, dtype=tf.float32))
    angles = tf.cast(t, tf.float32)[:, None] * frequencies[None, :]
    parts = [tf.sin(angles), tf.cos(angles)]
    return tf.pad(tf.concat(parts[::-1] if flip_sin_to_cos else parts, axis=1), [[0, 0], [0, dim % 2]])


class ResnetBlock(keras.layers.Layer):
    """norm, swish, conv, + temb, norm, swish, dropout, conv, + shortcut: [B, H, W, in] -> [B, H, W, channels]."""

    def __init__(
        self, in_channels: int, channels: int, temb_channels: int, dropout: float, build: LayerBuilder, name: str
    ):
        super().__init__(name=name, autocast=False)
        self.dropout = dropout
        with keras.name_scope(name):
            self.norm1 = build.norm(in_channels, "norm1", swish=True)
            self.conv1 = build.conv(in_channels, channels, f"{name}/conv1", layers.ConvAndBias)
            self.temb_proj = build.dense(temb_channels, channels, f"{name}/temb_proj")
            self.norm2 = build.norm(channels, "norm2", swish=True)
            self.conv2 = build.conv(channels, channels, f"{name}/conv2", layers.ConvPlus, scale=NEAR_ZERO)
            self.nin_shortcut = None
            if in_channels != channels:
                self.nin_shortcut = build.dense(in_channels, channels, f"{name}/nin_shortcut", layers.DenseAndBias)

    def call(self, x: Sequence[tf.Tensor], temb: tf.Tensor, rng: CounterRng | None = None) -> tf.Tensor:
        """Maps x [B, H, W, C_i], side by side, and temb [B, 4 ch], swish applied; dropout acts if `rng` is given."""
        x = ops.side_by_side(x)
        h, bias = self.conv1(self.norm1(x))
        keep = rng.keep(f"dropout/{self.name}", h.shape, self.dropout) if rng and self.dropout else None
        h = self.norm2([h], offset=self.temb_proj(temb) + bias, keep=keep, rate=self.dropout)
        if self.nin_shortcut is None:
            return self.conv2(h, tf.concat(x, axis=-1))
        return self.conv2(h, *self.nin_shortcut(x))


class AttentionBlock(keras.layers.Layer):
    """Self-attention over all positions, added to its input: [B, H, W, C] -> [B, H, W, C].

    Args:
      channels: C.
      head_dim: channels of each head; 0: one head.
      build: builds the layers.
      name: the first part of the variables' names.
    """

    def __init__(self, channels: int, head_dim: int, build: LayerBuilder, name: str):
        super().__init__(name=name, autocast=False)
        self.heads = channels // (head_dim or channels)
        with keras.name_scope(name):
            self.norm = build.norm(channels, "norm")
            project = functools.partial(build.dense, channels, channels, kind=layers.Projection)
            self.q, self.k, self.v = (project(f"{name}/{part}") for part in "qkv")
            self.proj_out = project(f"{name}/proj_out", scale=NEAR_ZERO)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Maps x [B, H, W, C]; the softmax is float32."""
        dense_layers = (self.q, self.k, self.v, self.proj_out)
        projections = ops.Projections(*(layer.kernel_and_bias() for layer in dense_layers))
        return x + ops.self_attention(self.norm([x]), projections, heads=self.heads)


CLASSES = "class_embedding/kernel"  # the name of the table of classes


@keras.saving.register_keras_serializable(package="diffusion_tf")
class UNet(layers.Network):
    """The denoising network: `model(x_t, t)`, [B, H, W, C] and int32 [B] to [B, H, W, out_channels] float32.

    With classes, `model(x_t, t, labels)` is conditioned on labels int32 [B]. The label -1 means none, and so does
    leaving them out. Dropout acts only if a `CounterRng` is given: `model(x_t, t, rng=rng)`. Variables are named as in
    the authors' checkpoints, `down_0_block_0/conv1/kernel` for their `model/down_0/block_0/conv1/W`.

    Args:
      image_shape: (H, W, C) of x_t, H and W divisible by 2^(levels - 1).
      out_channels: C, or 2C for learned variances.
      ch: as in `Preset`, like all other arguments up to precision.
      seed: of the initial weights.
      num_classes: as in `Preset`, like all other arguments up to downsample_padding.
      weights: `trainable` holds them in float32; `inference` in the dtype of the products, too coarse for training;
        `frozen` as `inference`, and from `freeze()` on they cannot be assigned, so that a CPU may keep them reordered.

    Raises:
      ConfigError: channels not divisible by 32 groups, an image that cannot be halved as often as asked, or an
        attention resolution that never occurs.
    """

    def __init__(
        self,
        *,
        image_shape: Sequence[int],
        out_channels: int,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        dropout: float,
        precision: str,
        seed: int = 0,
        num_classes: int = 0,
        attention_head_dim: int = 0,
        mid_attention: bool = True,
        norm_eps: float = 1e-6,
        flip_sin_to_cos: bool = False,
        freq_shift: int = 1,
        downsample_padding: int = 0,
        weights: WeightsMode = "trainable",
    ):
        config = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__("unet", config, weights)
        num_levels = len(ch_mult)
        for pixels in image_shape[:2]:
            if pixels % 2 ** (num_levels - 1):
                raise ConfigError(
                    "ch_mult", f"has {num_levels} levels, but {pixels} pixels cannot be halved {num_levels - 1} times"
                )
        resolutions = [image_shape[0] // 2**level for level in range(num_levels)]
        for resolution in set(attn_resolutions) - set(resolutions):
            raise ConfigError("attn_resolutions", f"={resolution} never occurs: the network's are {resolutions}")
        if any(ch * mult % NUM_GROUPS for mult in ch_mult):
            raise ConfigError(
                "ch", f"={ch}: every level needs a multiple of {NUM_GROUPS} channels (group normalisation)"
            )
        self.ch, self.num_classes = ch, num_classes
        self._embed = functools.partial(
            timestep_embedding, dim=ch, flip_sin_to_cos=flip_sin_to_cos, freq_shift=freq_shift
        )
        levels = [(ch * mult, size in attn_resolutions) for mult, size in zip(ch_mult, resolutions, strict=True)]
        attending = [channels for channels, attends in levels if attends] + [levels[-1][0]] * mid_attention
        if attention_head_dim and any(channels % attention_head_dim for channels in attending):
            raise ConfigError(
                "attention_head_dim", f"={attention_head_dim} does not divide the channels with attention: {attending}"
            )
        build = LayerBuilder(seed, precision, trainable=weights == "trainable", norm_eps=norm_eps)
        with keras.name_scope(self.name):  # float32 costs nothing for temb, and the model's output stays float32
            self.temb_dense0 = build.dense(ch, 4 * ch, "temb/dense0", name="temb_dense0", dtype="float32")
            self.temb_dense1 = build.dense(4 * ch, 4 * ch, "temb/dense1", name="temb_dense1", dtype="float32")
            if num_classes:
                # The table [num_classes, 4 ch] of an embedding: a product with one-hot rows suits a TPU, and maps the
                # label -1 to 0. Its initial values are those of the other layers.
                self.class_embedding = build.dense(
                    num_classes, 4 * ch, "class_embedding", use_bias=False, dtype="float32"
                )
            self.conv_in = build.conv(image_shape[-1], ch, "conv_in")
            self._make_blocks(
                levels,
                num_res_blocks,
                block=functools.partial(ResnetBlock, temb_channels=4 * ch, dropout=dropout, build=build),
                attention=functools.partial(AttentionBlock, head_dim=attention_head_dim, build=build),
                mid_attention=mid_attention,
                downsample=functools.partial(
                    build.conv, strides=2, kind=layers.PaddedConv2D if downsample_padding else layers.Conv2D
                ),
                upsample=functools.partial(build.conv, kind=layers.UpsampleConv2D),
            )
            self.norm_out = build.norm(levels[0][0], "norm_out", swish=True)
            self.conv_out = build.conv(levels[0][0], out_channels, "conv_out", scale=NEAR_ZERO, dtype="float32")
        self.built = True

    @classmethod
    def from_preset(cls, preset: Preset, *, weights: WeightsMode = "trainable") -> "UNet":
        """The network that `preset` describes; `weights` as above."""
        names = (
            "image_shape", "ch", "ch_mult", "num_res_blocks", "attn_resolutions", "dropout", "precision", "seed",
            "num_classes", "attention_head_dim", "mid_attention", "norm_eps", "flip_sin_to_cos", "freq_shift",
            "downsample_padding",
        )  # fmt: skip
        out_channels = preset.channels * (2 if preset.model_var_type == "learned" else 1)
        return cls(out_channels=out_channels, weights=weights, **{name: getattr(preset, name) for name in names})

    def _make_blocks(
        self,
        levels: Sequence[tuple[int, bool]],
        num_res_blocks: int,
        *,
        block: Callable[..., ResnetBlock],
        attention: Callable[..., AttentionBlock],
        mid_attention: bool,
        downsample: Callable[..., keras.layers.Layer],
        upsample: Callable[..., keras.layers.Layer],
    ) -> None:
        """Makes the layers of the way down, the middle and the way up; `levels`: (channels, attention or not)."""
        self.down, self.up = [], []
        channels, skip_channels = self.ch, [self.ch]
        for level, (level_channels, attends) in enumerate(levels):
            for i in range(num_res_blocks):
                self.down.append(block(channels, level_channels, name=f"down_{level}_block_{i}"))
                channels = level_channels
                if attends:
                    self.down.append(attention(channels, name=f"down_{level}_attn_{i}"))
                skip_channels.append(channels)
            if level != len(levels) - 1:
                self.down.append(downsample(channels, channels, f"down_{level}_downsample_conv"))
                skip_channels.append(channels)

        self.mid_block_1 = block(channels, channels, name="mid_block_1")
        self.mid_attn_1 = attention(channels, name="mid_attn_1") if mid_attention else None
        self.mid_block_2 = block(channels, channels, name="mid_block_2")

        for level, (level_channels, attends) in reversed(list(enumerate(levels))):
            for i in range(num_res_blocks + 1):
                self.up.append(block(channels + skip_channels.pop(), level_channels, name=f"up_{level}_block_{i}"))
                channels = level_channels
                if attends:
                    self.up.append(attention(channels, name=f"up_{level}_attn_{i}"))
            if level != 0:
                self.up.append(upsample(channels, channels, f"up_{level}_upsample_conv"))

    def call(
        self, x_t: tf.Tensor, t: tf.Tensor, labels: tf.Tensor | None = None, rng: CounterRng | None = None
    ) -> tf.Tensor:
        """Maps x_t [B, H, W, C], t int32 [B] and labels int32 [B]; dropout acts if `rng` is given."""
        temb = self.temb_dense1(tf.nn.silu(self.temb_dense0(self._embed(t))))
        if labels is not None:
            temb += self.class_embedding(tf.one_hot(labels, self.num_classes))
        temb = tf.nn.silu(temb)  # here, not in every block
        h = self.conv_in(x_t)
        skips = [h]
        for layer in self.down:
            h = layer([h], temb, rng=rng) if isinstance(layer, ResnetBlock) else layer(h)
            if isinstance(layer, AttentionBlock):
                skips.pop()  # the attention's output takes the place of its block's
            skips.append(h)

        h = self.mid_block_1([h], temb, rng=rng)
        h = h if self.mid_attn_1 is None else self.mid_attn_1(h)
        h = self.mid_block_2([h], temb, rng=rng)

        for layer in self.up:
            h = layer([h, skips.pop()], temb, rng=rng) if isinstance(layer, ResnetBlock) else layer(h)

        return self.conv_out(self.norm_out([h]))
