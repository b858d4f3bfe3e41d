"""Weights from elsewhere: the authors' TF1 checkpoints, and diffusers' folders, which can be written too.

Nothing of a file is trusted. Only formats that hold arrays alone are read (no pickles), and names, shapes and dtypes
are compared with the network's before memory for them is taken.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_tf.errors import ConfigError, InputError
from diffusion_tf.storage.checkpoints import check_names_and_shapes
from diffusion_tf.storage.files import first_line
from diffusion_tf.storage.resumable import Arrays
from diffusion_tf.training.state import state_arrays
from diffusion_tf.unet import UNet

_TF1_GROUPS = {"params": "", "ema": "/ExponentialMovingAverage", "adam_m": "/Adam", "adam_v": "/Adam_1"}

_TF1_SCALARS = ("global_step", "beta1_power", "beta2_power")


def tf1_name(name: str) -> str:
    """The authors' variable for one of ours: down_0_block_0/conv1/kernel -> model/down_0/block_0/conv1/W."""
    name = re.sub(r"^(down_\d+|up_\d+|mid|temb)_", r"\1/", name)
    name = re.sub(r"(down|up)sample_conv", r"\1sample/conv", name)
    return "model/" + name.replace("kernel", "W").replace("bias", "b")


def read_tf1(prefix: str, model: UNet) -> Arrays:
    """A checkpoint of the authors' program as a run's checkpoint holds it.

    Weights, EMA, Adam's moments and the step; a checkpoint without the moments starts training from step 0.

    Args:
      prefix: what tf.train.Saver calls it, `.../model.ckpt-790000`.
      model: the network that it should be of.

    Raises:
      InputError: it cannot be read, is of another network, or has no EMA.
    """
    try:
        reader = tf.train.load_checkpoint(prefix)
    except (tf.errors.OpError, ValueError) as error:
        raise ConfigError(
            "source", f"={prefix} is no TF1 checkpoint ({first_line(error)}): give its prefix, as .../model.ckpt-790000"
        ) from error
    shapes = {name: tuple(shape) for name, shape in reader.get_variable_to_shape_map().items()}
    groups = _tf1_groups(prefix, shapes)
    names = {name: tf1_name(name) for name in model.weight_names}
    wanted = {
        names[name] + _TF1_GROUPS[group]: tuple(v.shape)
        for group in groups
        for name, v in zip(model.weight_names, model.trainable_variables, strict=True)
    }
    check_names_and_shapes(prefix, {name: shape for name, shape in shapes.items() if name not in _TF1_SCALARS}, wanted)

    def tensor(name: str, dtype: tf.DType) -> np.ndarray:
        if reader.get_variable_to_dtype_map()[name] != dtype:
            raise InputError(f"{prefix}: {name} is not {dtype.name}")
        return reader.get_tensor(name)

    try:
        arrays = {
            group: {name: tensor(names[name] + _TF1_GROUPS[group], tf.float32) for name in names} for group in groups
        }
        step = int(tensor("global_step", tf.int64))
    except (tf.errors.OpError, IndexError, KeyError) as error:
        raise InputError(f"{prefix} is damaged, or not all there ({first_line(error)})") from error
    if step < 0:
        raise InputError(f"{prefix}: global_step is {step}")
    adam = (arrays["adam_m"], arrays["adam_v"]) if "adam_m" in groups else None
    return state_arrays(arrays["params"], arrays["ema"], adam, step)


def _tf1_groups(prefix: str, shapes: Mapping[str, Any]) -> list[str]:
    """Which groups of variables a TF1 checkpoint has: all, or all but Adam's moments."""
    if shapes.get("global_step") != ():
        raise InputError(f"{prefix} is not of the authors' training program: it has no scalar global_step")
    if not any(name.endswith(_TF1_GROUPS["ema"]) for name in shapes):
        raise InputError(f"{prefix} has no EMA weights (.../ExponentialMovingAverage), which all samples are of")
    has_adam = any(name.endswith(_TF1_GROUPS["adam_m"]) for name in shapes)
    return [group for group in _TF1_GROUPS if has_adam or not group.startswith("adam")]
