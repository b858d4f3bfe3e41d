"""Reads checkpoints of the authors' TensorFlow 1 program.

Names, shapes and dtypes are compared with the network's before memory for the arrays is allocated.
"""

import os
import re
from collections.abc import Collection

import tensorflow as tf

from diffusion_tf.errors import ConfigError, DamagedFileError, InputError
from diffusion_tf.interop.tf1_index import check_index
from diffusion_tf.storage.checkpoints import check_specs
from diffusion_tf.storage.files import Arrays, first_line, list_folder, listed
from diffusion_tf.storage.safetensors_header import ArraySpec
from diffusion_tf.training.state import state_arrays
from diffusion_tf.unet import UNet

# A checkpoint's files: the index, the data, and the graph.
_FILE = re.compile(r"\.(index|data-\d{5}-of-\d{5}|meta)$")
_SUFFIXES = {"params": "", "ema": "/ExponentialMovingAverage", "adam_m": "/Adam", "adam_v": "/Adam_1"}
_ADAM_POWERS = ("beta1_power", "beta2_power")  # beta ** step, which follows from the step


def tf1_name(name: str) -> str:
    """Returns the authors' name for one of our weights: down_0_block_0/conv1/kernel -> model/down_0/block_0/conv1/W."""
    name = re.sub(r"^(down_\d+|up_\d+|mid|temb)_", r"\1/", name)
    name = re.sub(r"(down|up)sample_conv", r"\1sample/conv", name)
    return "model/" + name.replace("kernel", "W").replace("bias", "b")


def find_prefix(source: str) -> str:
    """Returns the prefix of the checkpoint that a path names, as tf.train.load_checkpoint takes it.

    Args:
      source: the prefix itself, one of the checkpoint's files, the file `checkpoint` that tf.train.Saver writes beside
        them, or their folder.

    Raises:
      ConfigError: there is no checkpoint, or a folder holds several and its file `checkpoint` names none of them.
    """
    path = _FILE.sub("", os.path.expanduser(source))
    if tf.io.gfile.exists(f"{path}.index"):
        return path
    folder = path if tf.io.gfile.isdir(path) else os.path.dirname(path) or "."
    state = os.path.join(path, "checkpoint") if folder == path else path
    there = _prefixes(folder)
    newest = os.path.basename(_newest(state))  # the folder may have moved
    if newest in there:
        return os.path.join(folder, newest)
    if folder == path and len(there) == 1:
        return os.path.join(folder, there[0])
    raise ConfigError(
        "source",
        f"={source} is not a TF1 checkpoint: give its prefix, as .../model.ckpt-790000; there are: {listed(there)}",
    )


def _newest(state: str) -> str:
    """Returns the newest checkpoint that a file `checkpoint` names; empty if the file is missing or damaged."""
    try:
        found = tf.train.get_checkpoint_state(os.path.dirname(state), os.path.basename(state))
    except (ValueError, tf.errors.OpError):  # not text, or it names no checkpoint
        return ""
    return found.model_checkpoint_path if found else ""


def _prefixes(folder: str) -> list[str]:
    """Returns the names of the checkpoints in a folder."""
    return sorted(name.removesuffix(".index") for name in list_folder(folder) if name.endswith(".index"))


def read_tf1(source: str, model: UNet) -> Arrays:
    """Reads weights, EMA weights, Adam's moments and the step, named as in a checkpoint of a run.

    If the checkpoint has no moments, training starts from step 0.

    Args:
      source: the checkpoint's name for tf.train.Saver, such as `.../model.ckpt-790000`, or what `find_prefix` takes.
      model: the network that the checkpoint must fit.

    Raises:
      InputError: the checkpoint cannot be read, holds another network, or has no EMA weights.
    """
    prefix = find_prefix(source)
    try:
        check_index(f"{prefix}.index")
        reader = tf.train.load_checkpoint(prefix)
        dtypes, shapes = reader.get_variable_to_dtype_map(), reader.get_variable_to_shape_map()
        found = {name: ArraySpec(dtypes[name].name, tuple(shape)) for name, shape in shapes.items()}
    except Exception as error:  # TensorFlow raises OpError, ValueError and RuntimeError
        raise DamagedFileError(
            f"{prefix}.index is not a TF1 checkpoint, or is damaged ({first_line(error)})"
        ) from error
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
    there = f"there are: {listed(sorted(names))}"
    if "global_step" not in names:
        raise InputError(f"{prefix} is not of the authors' training program: it has no global_step; {there}")
    has = {group: any(name.endswith(suffix) for name in names) for group, suffix in _SUFFIXES.items()}
    if not has["ema"]:
        raise InputError(
            f"{prefix} has no EMA weights (.../ExponentialMovingAverage), which samples are drawn with; {there}"
        )
    return [group for group in _SUFFIXES if has["adam_m"] or not group.startswith("adam")]
