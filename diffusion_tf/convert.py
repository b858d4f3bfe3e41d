"""Weights from elsewhere: the authors' TF1 checkpoints, and diffusers' folders, which can be written too.

Nothing of a file is trusted. Only formats that hold arrays alone are read (no pickles), and names, shapes and dtypes
are compared with the network's before memory for them is taken.
"""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import tensorflow as tf

from diffusion_tf import diffusers_config
from diffusion_tf.errors import InputError
from diffusion_tf.files import first_line, new_folder, read_file, write_file, write_json
from diffusion_tf.presets import Preset
from diffusion_tf.unet import UNet

Arrays = dict[str, np.ndarray]

FORMATS = ("tf1", "diffusers")
_MAX_HEADER = 2**22  # bytes of a safetensors header: the largest network's has 60 thousand
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_SCHEDULER = "scheduler_config.json"


def state_arrays(weights: Arrays, ema: Arrays, adam: tuple[Arrays, Arrays] | None = None, step: int = 0) -> Arrays:
    """What a run's checkpoint holds; Adam's moments are zeros where there are none, and then the step is 0.

    At a later step Adam would take zeros for converged averages and make steps that are several times too large.
    """
    if adam is None:
        zeros = {name: np.zeros_like(w) for name, w in weights.items()}
        adam, step = (zeros, zeros), 0
    groups = {"params": weights, "ema": ema, "adam_m": adam[0], "adam_v": adam[1]}
    named = {f"{group}/{name}": array for group, arrays in groups.items() for name, array in arrays.items()}
    return {**named, "step": np.asarray(step, np.int64)}


def _check(path: str, found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raises InputError where the names and shapes of a file are not those of the network."""
    if mismatched := sorted(wanted.keys() ^ found.keys()):
        what = "missing" if mismatched[0] in wanted else "unknown"
        raise InputError(f"{path} is of another network: {mismatched[0]} is {what}")
    for name, shape in wanted.items():
        if found[name] != shape:
            raise InputError(f"{path} is of another network: {name} is {found[name]}, not {shape}")


# --- The authors' TF1 checkpoints ------------------------------------------------------------------------------

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
        raise InputError(
            f"--source={prefix} is no TF1 checkpoint ({first_line(error)}): give its prefix, as .../model.ckpt-790000"
        ) from error
    shapes = {name: tuple(shape) for name, shape in reader.get_variable_to_shape_map().items()}
    groups = _tf1_groups(prefix, shapes)
    names = {name: tf1_name(name) for name in model.weight_names}
    wanted = {
        names[name] + _TF1_GROUPS[group]: tuple(v.shape)
        for group in groups
        for name, v in zip(model.weight_names, model.trainable_variables, strict=True)
    }
    _check(prefix, {name: shape for name, shape in shapes.items() if name not in _TF1_SCALARS}, wanted)

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


# --- diffusers ---------------------------------------------------------------------------------------------------

_DIFFUSERS_PARTS = {
    "temb_dense0": "time_embedding.linear_1",
    "temb_dense1": "time_embedding.linear_2",
    "norm_out": "conv_norm_out",
    "temb_proj": "time_emb_proj",
    "nin_shortcut": "conv_shortcut",
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
    "kernel": "weight",
    "gamma": "weight",
    "beta": "bias",
}
# What files of the first versions call the parts of attention.
_OLD_PARTS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def diffusers_name(name: str, levels: int) -> str:
    """Diffusers' name for one of our weights: up_0_block_1/conv1/kernel -> up_blocks.1.resnets.1.conv1.weight.

    Its blocks on the way up are counted in the order in which they act, ours by their resolution level.
    """
    kinds = {"block": "resnets", "attn": "attentions", "downsample": "downsamplers", "upsample": "upsamplers"}
    parts = name.split("/")
    if match := re.fullmatch(r"(down|up)_(\d+)_(block|attn|downsample|upsample)_(\d+|conv)", parts[0]):
        way, level, kind, index = match.groups()
        number = int(level) if way == "down" else levels - 1 - int(level)
        parts[0] = f"{way}_blocks.{number}.{kinds[kind]}.{'0.conv' if index == 'conv' else index}"
    elif match := re.fullmatch(r"mid_(block|attn)_(\d+)", parts[0]):
        parts[0] = f"mid_block.{kinds[match[1]]}.{int(match[2]) - 1}"
    return ".".join(_DIFFUSERS_PARTS.get(part, part) for part in parts)


def to_diffusers(name: str, array: np.ndarray) -> np.ndarray:
    """One of our weights in PyTorch's layout: kernels are [out, in, H, W] or [out, in]."""
    if name.endswith("nin_shortcut/kernel"):
        return array.T[:, :, None, None]  # a 1x1 convolution there
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def from_diffusers(name: str, array: np.ndarray) -> np.ndarray:
    """The inverse of `to_diffusers`."""
    if name.endswith("nin_shortcut/kernel"):
        return array[:, :, 0, 0].T
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def read_diffusers(folder: str, preset: Preset, model: UNet, attention_head_dim: str | None) -> Arrays:
    """A saved DDPMPipeline or UNet2DModel as a run's checkpoint holds it; training would start from step 0.

    Its weights are taken as EMA too. The files lie flat in the folder, or in `unet` and `scheduler` below it.

    Args:
      folder: what `save_pretrained` wrote, or a clone from the hub.
      preset: what its configurations are checked against; a folder without that of a scheduler is only the network.
      model: the preset's network.
      attention_head_dim: stands in where the network's configuration has none, in its syntax: `null` or a number.

    Raises:
      InputError: a file is missing, damaged or a pickle, or is of another network or diffusion.
    """
    unet = os.path.join(folder, "unet") if tf.io.gfile.isdir(os.path.join(folder, "unet")) else folder
    diffusers_config.check_unet(os.path.join(unet, "config.json"), preset, attention_head_dim)
    for path in (os.path.join(folder, "scheduler", _SCHEDULER), os.path.join(folder, _SCHEDULER)):
        if tf.io.gfile.exists(path):
            diffusers_config.check_scheduler(path, preset)
            break
    path = os.path.join(unet, _WEIGHTS)
    pickled = path.replace(".safetensors", ".bin")
    if tf.io.gfile.exists(pickled) and not tf.io.gfile.exists(path):
        raise InputError(f"{pickled} is a pickle, which may hold code to run, and is not read: save it as {_WEIGHTS}")
    wanted = {
        diffusers_name(name, len(preset.ch_mult)): to_diffusers(name, np.empty(v.shape, np.float32)).shape
        for name, v in zip(model.weight_names, model.trainable_variables, strict=True)
    }
    found = _read_safetensors(path, wanted)
    weights = {
        name: np.ascontiguousarray(from_diffusers(name, found[diffusers_name(name, len(preset.ch_mult))]))
        for name in model.weight_names
    }
    return state_arrays(weights, weights)


def _new_key(key: str) -> str:
    match = re.fullmatch(rf"(.*attentions\.\d+\.)({'|'.join(_OLD_PARTS)})(\..*)", key)
    return match[1] + _OLD_PARTS[match[2]] + match[3] if match else key


def _read_safetensors(path: str, wanted: Mapping[str, tuple[int, ...]]) -> Arrays:
    """The arrays of a file by their new keys, where they are `wanted`; only its header is read before that is known."""
    header = _safetensors_header(path)
    header.pop("__metadata__", None)
    try:
        found = {_new_key(key): tuple(entry["shape"]) for key, entry in header.items()}
        dtypes = {key: entry["dtype"] for key, entry in header.items()}
    except (TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} is no safetensors file, or is damaged: its header names no shapes") from error
    if len(found) < len(header):
        raise InputError(f"{path} holds parts of attention under old and new names")
    _check(path, found, wanted)
    for key, dtype in dtypes.items():
        if dtype != "F32":
            raise InputError(f"{path}: {key} is {dtype}, not F32: take the folder's float32 weights")
    size = 8 + _MAX_HEADER + 4 * sum(math.prod(shape) for shape in wanted.values())
    try:
        return {_new_key(key): array for key, array in safetensors.numpy.load(read_file(path, size)).items()}
    except (safetensors.SafetensorError, ValueError) as error:
        raise InputError(f"{path} is damaged, or not all there ({first_line(error)})") from error


def _safetensors_header(path: str) -> dict[str, Any]:
    """The header of a safetensors file, its size checked before it is read."""
    try:
        with tf.io.gfile.GFile(path, "rb") as file:
            start = file.read(8)
            size = int.from_bytes(start, "little")
            fits = len(start) == 8 and size <= min(file.size() - 8, _MAX_HEADER)
            text = file.read(size) if fits else b""
    except (tf.errors.OpError, OSError) as error:
        raise InputError(f"cannot read {path} ({first_line(error)})") from error
    if not fits and start.startswith((b"PK\x03\x04", b"\x80")):  # an archive of torch.save, or pickle's own
        raise InputError(f"{path} is a pickle, which may hold code to run, and is not read")
    if not fits:
        raise InputError(f"{path} is no safetensors file, or not all there: its header would not fit")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no safetensors file, or is damaged: its header is no JSON") from error
    if not isinstance(header, dict):
        raise InputError(f"{path} is no safetensors file, or is damaged: its header is no JSON object")
    return header


def write_diffusers(folder: str, preset: Preset, weight_names: Sequence[str], weights: Sequence[np.ndarray]) -> None:
    """Writes weights as a DDPMPipeline that diffusers loads: a new folder, whole or absent.

    Raises:
      InputError: diffusers has no words for the preset, or the folder cannot be written.
    """
    scheduler, unet = diffusers_config.scheduler_config(preset), diffusers_config.unet_config(preset)
    arrays = {
        diffusers_name(name, len(preset.ch_mult)): np.ascontiguousarray(to_diffusers(name, w))
        for name, w in zip(weight_names, weights, strict=True)
    }
    with new_folder(folder) as temporary:
        write_json(os.path.join(temporary, "model_index.json"), diffusers_config.PIPELINE)
        write_json(os.path.join(temporary, "scheduler", _SCHEDULER), scheduler)
        write_json(os.path.join(temporary, "unet", "config.json"), unet)
        # PyTorch's loader wants to be told whose arrays these are.
        data = safetensors.numpy.save(arrays, {"format": "pt"})
        write_file(os.path.join(temporary, "unet", _WEIGHTS), data)
