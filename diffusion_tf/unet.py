"""The Keras U-Net of Appendix B.

Residual blocks of two 3x3 convolutions, group normalisation and swish, conditioned on the timestep by an added
projection; single-head self-attention at the chosen resolutions; strided convolutions down, nearest-neighbour
repeats up, and every feature map of the way down concatenated on the way up.
"""

import functools
import itertools
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from diffusion_tf.diffusion_utils import DenoiseFn
from diffusion_tf.errors import ConfigError
from diffusion_tf.ops.cpu import onednn
from diffusion_tf.ops.cpu.regions import in_cpu_graph, quick_cast, region, region_without_gradient, sum_of_rows
from diffusion_tf.ops.cpu.winograd import along_both_axes, conv3x3, stacked, transposed, unstacked
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


class _Layers:
    """Makes the layers that multiply: in `precision`, of weights in float32, or as multiplied, that their names seed.

    Each is built at once, in the name scope of the layer that it is part of: to build it on demand, Keras would trace
    the network, several times over.
    """

    def __init__(self, seed: int, precision: str, for_inference: bool):
        self._init = _Initializers(seed)
        self._policy = "mixed_bfloat16" if precision == "bfloat16" and not for_inference else precision

    def conv(self, in_channels: int, channels: int, path: str, kind=None, **kwargs) -> keras.layers.Layer:
        """A 3x3 convolution."""
        return _built((kind or Conv)(channels, 3, padding="same", **self._arguments(path, **kwargs)), in_channels)

    def dense(
        self, in_channels: int, channels: int, path: str, kind=keras.layers.Dense, **kwargs
    ) -> keras.layers.Layer:
        """A matrix product along the channels."""
        return _built(kind(channels, **self._arguments(path, **kwargs)), in_channels)

    def _arguments(self, path: str, scale: float = 1.0, **kwargs) -> dict[str, Any]:
        name = path.split("/")[-1]
        return {"kernel_initializer": self._init(path, scale), "name": name, "dtype": self._policy, **kwargs}


def _built(layer: keras.layers.Layer, in_channels: int) -> keras.layers.Layer:
    """The layer, its variables made for maps [B, H, W, in_channels]."""
    layer.build((None, None, None, in_channels))
    return layer


class GroupNorm(keras.layers.Layer):
    """Group normalisation over (H, W, C / 32), in float32: feature maps [B, H, W, C_i] to one [B, H, W, sum C_i].

    From the sums of each channel and of its square, which a compiler takes as it writes the feature map; Keras' layer
    reads the map twice more, in a layout by groups. The channels come in parts, so that a skip connection's sums are
    those of the way down; on a CPU side by side, as one.
    """

    def __init__(self, channels: int, name: str, swish: bool = False):
        super().__init__(name=name, dtype="float32", autocast=False)
        self.swish = swish
        _built(self, channels)

    def build(self, shape):
        """Makes the variables for parts that side by side have this shape."""
        self.gamma = self.add_weight(name="gamma", shape=shape[-1:], initializer="ones")
        self.beta = self.add_weight(name="beta", shape=shape[-1:], initializer="zeros")

    def call(self, parts, offset=None, keep=None, rate=0.0):
        """Normalises the channels of all parts together, in their dtype.

        `offset` [B, C] is added to them before. It only moves the channels' means, and its gradient is one of the sums
        that are taken anyway; added to the map, it would ask for one more sum over the map's gradient. Swish may
        follow, and dropout by a mask of what to keep.
        """
        weights = [tf.convert_to_tensor(w) for w in (self.gamma, self.beta)]
        more = [tensor for tensor in (offset, keep) if tensor is not None]
        return group_norm(list(parts), *weights, *more, swish=self.swish, rate=rate)


@region
def group_norm(
    parts: list[tf.Tensor], gamma: tf.Tensor, beta: tf.Tensor, *more: tf.Tensor, swish: bool, rate: float
) -> tf.Tensor:
    """What `GroupNorm` computes; `more` is nothing, the offset, or the offset and the mask."""
    floats = [quick_cast(part, tf.float32) for part in parts]
    mean = tf.concat([_spatial_mean(x) for x in floats], axis=-1)
    mean_square = tf.concat([_spatial_mean(tf.square(x)) for x in floats], axis=-1)
    offset = tf.cast(more[0], tf.float32) if more else 0.0
    mean_square = _over_groups(mean_square + offset * (2.0 * mean + offset))
    mean = _over_groups(mean + offset)
    variance = tf.maximum(mean_square - tf.square(mean), 0.0)
    scale = gamma * tf.math.rsqrt(variance + 1e-6)  # Keras' own epsilon is 1e-3
    shift = beta + (offset - mean) * scale
    y = _scale_and_shift(tf.concat(floats, axis=-1), scale, shift)
    if not in_cpu_graph():
        y = tf.cast(y, parts[0].dtype)  # a TPU keeps it for the gradient
    if swish:
        y = _swish(y)
    if len(more) > 1:
        y = tf.where(more[1], y / (1.0 - rate), 0.0)
    return quick_cast(y, parts[0].dtype)


def _over_groups(moments: tf.Tensor) -> tf.Tensor:
    """Moments [B, C] of each channel to those of its whole group."""
    size = moments.shape[-1] // NUM_GROUPS
    if in_cpu_graph():  # XLA would work what is repeated out anew, by divisions, for every pixel
        members = np.repeat(np.eye(NUM_GROUPS, dtype=np.float32), size, axis=1)
        return tf.matmul(tf.matmul(moments, members / size, transpose_b=True), members)
    groups = tf.reshape(moments, [-1, NUM_GROUPS, size])
    return tf.repeat(tf.reduce_mean(groups, axis=2), size, axis=1)


def _spatial_mean(x: tf.Tensor) -> tf.Tensor:
    """Means [B, C] of the channels of a map [B, H, W, C]."""
    if in_cpu_graph():
        return _spatial_sum(x) / (x.shape[1] * x.shape[2])
    return tf.reduce_mean(x, axis=[1, 2])


def _spatial_sum(x: tf.Tensor) -> tf.Tensor:
    return sum_of_rows(tf.reshape(x, [-1, x.shape[1] * x.shape[2], x.shape[3]]))


def _scale_and_shift(x: tf.Tensor, scale: tf.Tensor, shift: tf.Tensor) -> tf.Tensor:
    """The sum x scale + shift, of a map [B, H, W, C] and [B, C]."""

    def plain(x, scale, shift):
        return x * scale[:, None, None] + shift[:, None, None]

    @tf.custom_gradient
    def with_quick_sums(x, scale, shift):
        def grad(grad_y):
            return grad_y * scale[:, None, None], _spatial_sum(grad_y * x), _spatial_sum(grad_y)

        return plain(x, scale, shift), grad

    return (with_quick_sums if in_cpu_graph() else plain)(x, scale, shift)


def _swish(x: tf.Tensor) -> tf.Tensor:
    @tf.custom_gradient
    def with_quick_gradient(x):
        def grad(grad_y):
            # XLA repeats cheap work wherever its result goes, here to two sums and a map. A quotient it keeps.
            denominator = 1.0 + tf.exp(-x)
            return grad_y * (1.0 + x * (1.0 - 1.0 / denominator)) / denominator

        return tf.nn.silu(x), grad

    return with_quick_gradient(x) if in_cpu_graph() else tf.nn.silu(x)


_FEW_PIXELS = 512  # of a batch; below, the sums of taps cost what they save


class Conv(keras.layers.Conv2D):
    """Keras' convolution, in graphs for a CPU by what is fastest there."""

    def convolution_op(self, inputs, kernel, *summands):
        """Without the layer's bias; summands are none, or a bias [channels] and a map to add."""
        kernel = tf.convert_to_tensor(kernel)
        batch, height, width, channels = inputs.shape
        direct = not in_cpu_graph() or inputs.dtype != tf.float32 or self.strides != (1, 1) or height % 2 or width % 2
        direct = direct or min(channels, self.filters) < NUM_GROUPS or batch * height * width < _FEW_PIXELS
        if direct and onednn.keeps_kernels(inputs.dtype):
            return onednn.conv(inputs, kernel, *summands, strides=self.strides)
        y = super().convolution_op(inputs, kernel) if direct else conv3x3(inputs, kernel)
        if not summands:
            return y
        bias, added = summands
        return tf.nn.bias_add(y, bias) + added


class _ConvAndBias(Conv):
    """A convolution whose bias [channels] is returned beside the feature map, for what follows to add."""

    def call(self, x):
        return self.convolution_op(x, self.kernel), tf.convert_to_tensor(self.bias)


class _ConvAndShortcut(Conv):
    """A convolution, and what is added to it: a map, and a bias [channels] of the map if it has one."""

    def call(self, x, shortcut, shortcut_bias=None):
        bias = tf.convert_to_tensor(self.bias)
        if shortcut_bias is not None:
            bias += shortcut_bias
        return self.convolution_op(x, self.kernel, bias, shortcut)


class _Dense(keras.layers.Dense):
    """Keras' layer, along the channels of positions [B, N, C]."""

    def call(self, x):
        if not onednn.keeps_kernels(x.dtype):
            return super().call(x)
        kernel, bias = tf.convert_to_tensor(self.kernel), tf.convert_to_tensor(self.bias)
        return tf.squeeze(onednn.conv(x[:, :, None], kernel[None, None], bias), axis=2)


@tf.custom_gradient
def dense_of_parts(kernel: tf.Tensor, *parts: tf.Tensor):
    """The product of the parts [B, H, W, C_i], side by side, with kernel [sum C_i, channels]; a gradient for each part.

    The gradient by all of them at once would be written, and read again by each part that takes its slice.
    """

    def grad(grad_y):
        kernels = tf.split(kernel, [part.shape[-1] for part in parts], axis=0)
        grad_kernel = tf.concat([tf.einsum("bhwi,bhwo->io", part, grad_y) for part in parts], axis=0)
        return grad_kernel, *(tf.einsum("bhwo,io->bhwi", grad_y, k) for k in kernels)

    return tf.einsum("bhwi,io->bhwo", tf.concat(parts, axis=-1), kernel), grad


class _Shortcut(keras.layers.Layer):
    """Keras' Dense, along the channels of several parts; its bias is returned beside the product."""

    def __init__(self, units: int, kernel_initializer: keras.initializers.Initializer, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.kernel_initializer = kernel_initializer

    def build(self, shape):
        """Makes the variables for parts that side by side have this shape."""
        self.kernel = self.add_weight(name="kernel", shape=(shape[-1], self.units), initializer=self.kernel_initializer)
        self.bias = self.add_weight(name="bias", shape=(self.units,), initializer="zeros")

    def call(self, parts):
        """Maps a list of [B, H, W, C_i]."""
        kernel, bias = tf.convert_to_tensor(self.kernel), tf.convert_to_tensor(self.bias)
        if onednn.keeps_kernels(parts[0].dtype):
            return onednn.conv(tf.concat(parts, axis=-1), kernel[None, None]), bias
        return dense_of_parts(kernel, *parts), bias


class ResnetBlock(keras.layers.Layer):
    """norm, swish, conv, + temb, norm, swish, dropout, conv, + shortcut: [B, H, W, in] -> [B, H, W, channels]."""

    def __init__(self, in_channels: int, channels: int, temb_channels: int, dropout: float, layers: _Layers, name: str):
        super().__init__(name=name, autocast=False)
        self.dropout = dropout
        with keras.name_scope(name):
            self.norm1 = GroupNorm(in_channels, "norm1", swish=True)
            self.conv1 = layers.conv(in_channels, channels, f"{name}/conv1", kind=_ConvAndBias)
            self.temb_proj = layers.dense(temb_channels, channels, f"{name}/temb_proj")
            self.norm2 = GroupNorm(channels, "norm2", swish=True)
            self.conv2 = layers.conv(channels, channels, f"{name}/conv2", kind=_ConvAndShortcut, scale=_NEAR_ZERO)
            self.nin_shortcut = None
            if in_channels != channels:
                self.nin_shortcut = layers.dense(in_channels, channels, f"{name}/nin_shortcut", kind=_Shortcut)

    def call(self, parts, temb, rng: CounterRng | None = None):
        """Maps parts [B, H, W, C_i] of `in` channels and temb [B, 4 ch], swish applied; `rng` asks for dropout."""
        if in_cpu_graph():
            parts = [tf.concat(parts, axis=-1)]  # XLA asks of every channel anew which part it lies in
        h, bias = self.conv1(self.norm1(parts))
        keep = None
        if rng is not None and self.dropout > 0.0:
            keep = rng.keep(f"dropout/{self.name}", h.shape, self.dropout)
        offset = self.temb_proj(temb) + bias
        h = self.norm2([h], offset=offset, keep=keep, rate=self.dropout)
        if self.nin_shortcut is None:
            return self.conv2(h, tf.concat(parts, axis=-1))
        return self.conv2(h, *self.nin_shortcut(parts))


class AttentionBlock(keras.layers.Layer):
    """Single-head self-attention over all positions, added to its input: [B, H, W, C] -> [B, H, W, C]."""

    def __init__(self, channels: int, layers: _Layers, name: str):
        super().__init__(name=name, autocast=False)
        self.scale = channels**-0.5
        with keras.name_scope(name):
            self.norm = GroupNorm(channels, "norm")
            self.q, self.k, self.v = (layers.dense(channels, channels, f"{name}/{part}", kind=_Dense) for part in "qkv")
            self.proj_out = layers.dense(channels, channels, f"{name}/proj_out", kind=_Dense, scale=_NEAR_ZERO)

    def call(self, x):
        """Maps x [B, H, W, C]."""
        _, height, width, channels = x.shape
        h = tf.reshape(self.norm([x]), [-1, height * width, channels])
        logits = tf.einsum("bqc,bkc->bqk", self.q(h), self.k(h)) * self.scale
        weights = tf.cast(tf.nn.softmax(tf.cast(logits, tf.float32)), h.dtype)
        h = tf.einsum("bqk,bkc->bqc", weights, self.v(h))
        return x + tf.reshape(self.proj_out(h), [-1, height, width, channels])


# Along one axis: which of the three taps fall on the two pixels that an output reads, m - 1 and m (first two rows) for
# output 2m, m and m + 1 for output 2m + 1.
_PHASE_TAPS = ((1, 0, 0), (0, 1, 1), (1, 1, 0), (0, 0, 1))

_PHASES = tuple(itertools.product(range(2), repeat=2))

# Along one axis: which of the three taps fall on pixel m of the small map, for the outputs 2m - 1 ... 2m + 2.
_TAPS = ((0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0))


@region_without_gradient
def _kernels_of_phases(kernel: tf.Tensor) -> list[tf.Tensor]:
    """The kernel [3, 3, in, out], its taps summed onto the 2x2 pixels that each of _PHASES reads."""
    rows = along_both_axes(_PHASE_TAPS, unstacked(kernel))
    return [stacked([row[2 * b : 2 * b + 2] for row in rows[2 * a : 2 * a + 2]]) for a, b in _PHASES]


@region_without_gradient
def _kernel_of_gradient(kernel: tf.Tensor) -> tf.Tensor:
    """The kernel [3, 3, in, out] as [4, 4, in, out], by which the output's gradient becomes the input's."""
    return stacked(along_both_axes(_TAPS, unstacked(kernel)))


@region_without_gradient
def _gradient_of_taps(grad: tf.Tensor) -> tf.Tensor:
    """The gradient of `_kernel_of_gradient`'s kernel, from that of its result."""
    return stacked(along_both_axes(transposed(_TAPS), unstacked(grad)))


@tf.custom_gradient
def upsampled_conv(x: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor):
    """The 3x3 convolution of x with each pixel repeated 2x2, and its gradients, by 4 products for each 9.

    Of x [B, H, W, C] the outputs [B, 2 H, 2 W, channels] at even and at odd places read 2x2 pixels, by sums of the
    kernel's taps; a pixel of x reaches 4x4 pixels of the output, which its gradient reads as a convolution of stride 2.
    """
    kernels = dict(zip(_PHASES, _kernels_of_phases(kernel), strict=True))

    def phase(a, b):
        padding = [[0, 0], [1 - a, a], [1 - b, b], [0, 0]]
        if onednn.keeps_kernels(x.dtype):
            return onednn.conv(x, kernels[a, b], bias, padding=padding)
        return tf.nn.bias_add(tf.nn.conv2d(x, kernels[a, b], strides=1, padding=padding), bias)

    def grad(grad_y):
        # The kernel and its gradient are transposed here, as on a CPU the regions are slow at it.
        kernel4 = tf.transpose(_kernel_of_gradient(kernel), [0, 1, 3, 2])
        grad_x = tf.nn.conv2d(grad_y, kernel4, strides=2, padding="SAME")
        grad_kernel4 = tf.raw_ops.Conv2DBackpropFilter(
            input=grad_y, filter_sizes=kernel4.shape, out_backprop=x, strides=[1, 2, 2, 1], padding="SAME"
        )
        grad_kernel = _gradient_of_taps(tf.transpose(grad_kernel4, [0, 1, 3, 2]))
        return grad_x, grad_kernel, tf.raw_ops.BiasAddGrad(out_backprop=grad_y)

    if in_cpu_graph():
        return _interleaved([phase(a, b) for a, b in _PHASES]), grad
    return _phases_in_place(phase, x, kernel.shape[-1]), grad


@region_without_gradient
def _interleaved(phases: list[tf.Tensor]) -> tf.Tensor:
    """Four maps [B, H, W, C] as the even and odd rows and columns of one [B, 2 H, 2 W, C]."""
    _, height, width, channels = phases[0].shape
    dtype = phases[0].dtype
    bits = tf.uint16 if dtype == tf.bfloat16 else dtype  # XLA would move bfloat16 as float32
    phases = [tf.bitcast(phase, bits) for phase in phases]
    rows = [tf.stack(phases[2 * a : 2 * a + 2], axis=3) for a in range(2)]
    return tf.bitcast(tf.reshape(tf.stack(rows, axis=2), [-1, 2 * height, 2 * width, channels]), dtype)


def _phases_in_place(phase: Callable[[int, int], tf.Tensor], x: tf.Tensor, channels: int) -> tf.Tensor:
    """What `_interleaved` gives, as a TPU does it.

    Each phase goes into its place as it is worked out. Side by side along batch and width, the phases lie as a TPU
    keeps the upsampled map, (H, W, B, C) from the slowest axis to the fastest: the transposition moves nothing there.
    """
    batch = tf.shape(x)[0] if x.shape[0] is None else x.shape[0]
    _, height, width, _ = x.shape
    y = tf.zeros([2 * batch, height, 2 * width, channels], x.dtype)
    for a, b in _PHASES:
        y = tf.raw_ops.TensorStridedSliceUpdate(
            input=y,
            begin=[b * batch, 0, a * width, 0],
            end=[(b + 1) * batch, height, (a + 1) * width, channels],
            strides=[1] * 4,
            value=phase(a, b),
        )
    y = tf.transpose(tf.reshape(y, [2, batch, height, 2, width, channels]), [1, 2, 3, 4, 0, 5])
    return tf.reshape(y, [batch, 2 * height, 2 * width, channels])


class UpsampleConv(keras.layers.Conv2D):
    """A 3x3 convolution of the nearest-neighbour upsampling: [B, H, W, C] -> [B, 2 H, 2 W, channels]."""

    def call(self, x):
        """Maps x [B, H, W, C]."""
        kernel, bias = tf.convert_to_tensor(self.kernel), tf.convert_to_tensor(self.bias)
        return upsampled_conv(tf.cast(x, self.compute_dtype), kernel, bias)


class UNet(keras.Model):
    """The denoising network: `model(x_t, t)`, [B, H, W, C] and int32 [B] to [B, H, W, out_channels] float32.

    Dropout acts only where a `CounterRng` is given: `model(x_t, t, rng=rng)`.

    Variables are named as in the authors' checkpoints, `down_0_block_0/conv1/kernel` for their
    `model/down_0/block_0/conv1/W`.

    Args:
      image_shape: (H, W, C) of x_t, H and W divisible by 2^(levels - 1).
      out_channels: C, or 2C for learned variances.
      ch, ch_mult, num_res_blocks, attn_resolutions, dropout, precision: as in `Preset`.
      seed: of the initial weights.
      for_inference: the weights are held in the dtype that they are multiplied in, which is too coarse to train them.

    Raises:
      InputError: channels not divisible by 32 groups, a resolution that cannot be halved as often as asked, or an
        attention resolution that never occurs.
    """

    def __init__(
        self,
        *,
        image_shape,
        out_channels,
        ch,
        ch_mult,
        num_res_blocks,
        attn_resolutions,
        dropout,
        precision,
        seed=0,
        for_inference=False,
    ):
        super().__init__(name="unet", autocast=False)
        image_size, levels = image_shape[0], len(ch_mult)
        if image_size % 2 ** (levels - 1):
            raise ConfigError(
                "ch_mult", f"has {levels} levels, but {image_size} pixels cannot be halved {levels - 1} times"
            )
        resolutions = [image_size // 2**level for level in range(levels)]
        for resolution in set(attn_resolutions) - set(resolutions):
            raise ConfigError("attn_resolutions", f"={resolution} never occurs: the network's are {resolutions}")
        if any(ch * mult % NUM_GROUPS for mult in ch_mult):
            raise ConfigError(
                "ch", f"={ch}: every level needs a multiple of {NUM_GROUPS} channels (group normalisation)"
            )

        self.ch = ch
        levels = [(ch * mult, size in attn_resolutions) for mult, size in zip(ch_mult, resolutions, strict=True)]
        layers = _Layers(seed, precision, for_inference)
        with keras.name_scope(self.name):
            # In float32, as it costs nothing.
            self.temb_dense0 = layers.dense(ch, 4 * ch, "temb/dense0", name="temb_dense0", dtype="float32")
            self.temb_dense1 = layers.dense(4 * ch, 4 * ch, "temb/dense1", name="temb_dense1", dtype="float32")
            self.conv_in = layers.conv(image_shape[-1], ch, "conv_in")
            self._make_blocks(layers, levels, num_res_blocks, dropout)
            self.norm_out = GroupNorm(levels[0][0], "norm_out", swish=True)
            # Its output is the model's, which stays float32 all the way.
            self.conv_out = layers.conv(levels[0][0], out_channels, "conv_out", scale=_NEAR_ZERO, dtype="float32")
        self.built = True
        dtypes = {id(v): layer.compute_dtype for layer in self._flatten_layers() for v in layer._trainable_variables}
        self.compute_dtypes = [dtypes[id(v)] for v in self.trainable_variables]

    def _make_blocks(self, layers: _Layers, levels: list[tuple[int, bool]], num_res_blocks: int, dropout: float):
        """Blocks, and convolutions between levels; `levels` says of each how many channels, and whether it attends."""
        block = functools.partial(ResnetBlock, temb_channels=4 * self.ch, dropout=dropout, layers=layers)
        # A list of blocks for each level, and the convolutions between the levels.
        self.down, self.downsample, self.up, self.upsample = [], [], [], []
        channels, skip_channels = self.ch, [self.ch]
        for level, (level_channels, attends) in enumerate(levels):
            blocks = []
            for i in range(num_res_blocks):
                blocks.append(block(channels, level_channels, name=f"down_{level}_block_{i}"))
                channels = level_channels
                if attends:
                    blocks.append(AttentionBlock(channels, layers, f"down_{level}_attn_{i}"))
                skip_channels.append(channels)
            self.down.append(blocks)
            if level != len(levels) - 1:
                self.downsample.append(layers.conv(channels, channels, f"down_{level}_downsample_conv", strides=2))
                skip_channels.append(channels)

        self.mid: list[Any] = [
            block(channels, channels, name="mid_block_1"),
            AttentionBlock(channels, layers, "mid_attn_1"),
            block(channels, channels, name="mid_block_2"),
        ]

        for level, (level_channels, attends) in reversed(list(enumerate(levels))):
            blocks = []
            for i in range(num_res_blocks + 1):
                blocks.append(block(channels + skip_channels.pop(), level_channels, name=f"up_{level}_block_{i}"))
                channels = level_channels
                if attends:
                    blocks.append(AttentionBlock(channels, layers, f"up_{level}_attn_{i}"))
            self.up.append(blocks)
            if level != 0:
                path = f"up_{level}_upsample_conv"
                self.upsample.append(layers.conv(channels, channels, path, kind=UpsampleConv))

    @property
    def weight_names(self) -> list[str]:
        """What checkpoints call the trainable variables, in their order."""
        return [v.path.removeprefix("unet/") for v in self.trainable_variables]

    @classmethod
    def from_preset(cls, preset: Preset, *, for_inference: bool = False) -> "UNet":
        """The network that `preset` describes; `for_inference` as above."""
        return cls(
            image_shape=preset.image_shape,
            out_channels=preset.channels * (2 if preset.model_var_type == "learned" else 1),
            ch=preset.ch,
            ch_mult=preset.ch_mult,
            num_res_blocks=preset.num_res_blocks,
            attn_resolutions=preset.attn_resolutions,
            dropout=preset.dropout,
            precision=preset.precision,
            seed=preset.seed,
            for_inference=for_inference,
        )

    def denoise_fn(self, params: Sequence[tf.Variable | tf.Tensor], rng: CounterRng | None = None) -> DenoiseFn:
        """`model(x_t, t, rng=rng)` as a pure function of x_t and t, with the weights `params`.

        They come in the order of `trainable_variables`, and are cast here, once for many calls, to the dtype that each
        is multiplied in. Keras' `stateless_call` would cast them to float32 again in every call.
        """
        weights = [tf.cast(w, dtype) for w, dtype in zip(params, self.compute_dtypes, strict=True)]

        def denoise(x_t, t):
            with keras.StatelessScope() as scope:
                for variable, weight in zip(self.trainable_variables, weights, strict=True):
                    scope.add_update((variable, weight))
                return self(x_t, t, rng=rng)

        return denoise

    def call(self, x_t, t, rng: CounterRng | None = None):
        """Maps x_t [B, H, W, C] and t int32 [B]; dropout acts where `rng` is given."""
        temb = self.temb_dense1(tf.nn.silu(self.temb_dense0(timestep_embedding(t, self.ch))))
        temb = tf.nn.silu(temb)  # here, not in every block

        h = self.conv_in(x_t)
        skips = [h]
        for level, blocks in enumerate(self.down):
            for block in blocks:
                if isinstance(block, AttentionBlock):
                    skips[-1] = h = block(h)
                else:
                    h = block([h], temb, rng=rng)
                    skips.append(h)
            if level < len(self.downsample):
                h = self.downsample[level](h)
                skips.append(h)

        for block in self.mid:
            h = block(h) if isinstance(block, AttentionBlock) else block([h], temb, rng=rng)

        for level, blocks in enumerate(self.up):
            for block in blocks:
                h = block(h) if isinstance(block, AttentionBlock) else block([h, skips.pop()], temb, rng=rng)
            if level < len(self.upsample):
                h = self.upsample[level](h)

        return self.conv_out(self.norm_out([h]))
