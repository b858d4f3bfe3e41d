"""The operations in a TensorFlow graph on a CPU: the same functions as in `ops.xla`; only `ops` imports this."""

from diffusion_tf.ops import hashing
from diffusion_tf.ops.cpu.adam import adam_in_place
from diffusion_tf.ops.cpu.convolutions import (
    conv2d,
    dense,
    dense_side_by_side,
    self_attention,
    side_by_side,
    upsampled_conv2d,
)
from diffusion_tf.ops.cpu.normalization import group_norm
from diffusion_tf.ops.cpu.regions import region

normal, bernoulli = region(hashing.normal), region(hashing.bernoulli)

__all__ = [
    "adam_in_place",
    "bernoulli",
    "conv2d",
    "dense",
    "dense_side_by_side",
    "group_norm",
    "normal",
    "self_attention",
    "side_by_side",
    "upsampled_conv2d",
]
