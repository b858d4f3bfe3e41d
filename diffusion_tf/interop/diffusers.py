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

from diffusion_tf.errors import InputError
from diffusion_tf.interop import diffusers_config
from diffusion_tf.presets import Preset
from diffusion_tf.storage.checkpoints import check_names_and_shapes
from diffusion_tf.storage.files import first_line, new_folder, read_file, write_file, write_json
from diffusion_tf.storage.resumable import Arrays
from diffusion_tf.training.state import state_arrays
from diffusion_tf.unet import UNet

FORMATS = ("tf1", "diffusers")

_MAX_HEADER = 2**22  # bytes of a safetensors header: the largest network's has 60 thousand

_WEIGHTS = "diffusion_pytorch_model.safetensors"

_SCHEDULER = "scheduler_config.json"

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
    check_names_and_shapes(path, found, wanted)
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
