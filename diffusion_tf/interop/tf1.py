"""Reads checkpoints of the authors' TensorFlow 1 program.

Names, shapes and dtypes are compared with the network's before memory for the arrays is allocated.
"""

import re
from collections.abc import Collection

import tensorflow as tf

from diffusion_tf.errors import ConfigError, InputError
from diffusion_tf.storage.checkpoints import check_specs
from diffusion_tf.storage.files import Arrays, first_line
from diffusion_tf.storage.safetensors_header import ArraySpec
from diffusion_tf.training.state import state_arrays
from diffusion_tf.unet import UNet

_SUFFIXES = {"params": "", "ema": "/ExponentialMovingAverage", "adam_m": "/Adam", "adam_v": "/Adam_1"}
_ADAM_POWERS = ("beta1_power", "beta2_power")  # beta ** step, which follows from the step


def tf1_name(name: str) -> str:
    """Returns the authors' name for one of our weights: down_0_block_0/conv1/kernel -> model/down_0/block_0/conv1/W."""
    name = re.sub(r"^(down_\d+|up_\d+|mid|temb)_", r"\1/", name)
    name = re.sub(r"(down|up)sample_conv", r"\1sample/conv", name)
    return "model/" + name.replace("kernel", "W").replace("bias", "b")


def read_tf1(prefix: str, model: UNet) -> Arrays:
    """Reads weights, EMA weights, Adam's moments and the step, named as in a checkpoint of a run.

    If the checkpoint has no moments, training starts from step 0.

    Args:
      prefix: the checkpoint's name for tf.train.Saver, such as `.../model.ckpt-790000`.
      model: the network that the checkpoint must fit.

    Raises:
      InputError: the checkpoint cannot be read, holds another network, or has no EMA weights.
    """
    try:
        reader = tf.train.load_checkpoint(prefix)
    except (tf.errors.OpError, ValueError) as error:
        raise ConfigError(
            "source",
            f"={prefix} is not a TF1 checkpoint ({first_line(error)}): give its prefix, as .../model.ckpt-790000",
        ) from error
    dtypes = reader.get_variable_to_dtype_map()
    found = {
        name: ArraySpec(dtypes[name].name, tuple(shape)) for name, shape in reader.get_variable_to_shape_map().items()
    }
    groups = _groups(prefix, found)
    wanted = {
        tf1_name(name) + _SUFFIXES[group]: ArraySpec("float32", tuple(v.shape))
        for group in groups
        for name, v in zip(model.weight_names, model.trainable_variables, strict=True)
    }
    wanted["global_step"] = ArraySpec("int64", ())
    check_specs({name: spec for name, spec in found.items() if name not in _ADAM_POWERS}, wanted, prefix)
    try:
        arrays = {
            group: {name: reader.get_tensor(tf1_name(name) + _SUFFIXES[group]) for name in model.weight_names}
            for group in groups
        }
        step = int(reader.get_tensor("global_step"))
    except (tf.errors.OpError, IndexError) as error:
        raise InputError(f"{prefix} is damaged or incomplete ({first_line(error)})") from error
    if step < 0:
        raise InputError(f"{prefix}: global_step is {step}")
    adam = (arrays["adam_m"], arrays["adam_v"]) if "adam_m" in groups else None
    return state_arrays(arrays["params"], arrays["ema"], adam, step)


def _groups(prefix: str, names: Collection[str]) -> list[str]:
    """Returns which groups of variables a checkpoint has: all, or all but Adam's moments."""
    if "global_step" not in names:
        raise InputError(f"{prefix} is not of the authors' training program: it has no global_step")
    has = {group: any(name.endswith(suffix) for name in names) for group, suffix in _SUFFIXES.items()}
    if not has["ema"]:
        raise InputError(f"{prefix} has no EMA weights (.../ExponentialMovingAverage), which samples are drawn with")
    return [group for group in _SUFFIXES if has["adam_m"] or not group.startswith("adam")]
