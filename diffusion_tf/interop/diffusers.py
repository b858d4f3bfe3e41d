"""Reads and writes weights in the folders of diffusers.

Only safetensors files are read, never pickles. Names, shapes and dtypes are compared with the network's before memory
for the arrays is allocated. Weights in half precision become float32, which represents each of them exactly.
"""

import hashlib
import math
import os
import re
from collections.abc import Mapping, Sequence

import numpy as np
import safetensors.numpy
import tensorflow as tf

from diffusion_tf.errors import InputError
from diffusion_tf.interop import DTYPES, diffusers_config
from diffusion_tf.presets import Preset
from diffusion_tf.storage.checkpoints import check_specs
from diffusion_tf.storage.files import Arrays, new_folder, write_file
from diffusion_tf.storage.json_files import write_json
from diffusion_tf.storage.safetensors_header import ArraySpec, read_arrays, read_header
from diffusion_tf.training.state import state_arrays
from diffusion_tf.unet import CLASSES, UNet

_WEIGHTS = "diffusion_pytorch_model.safetensors"
# Files of the hub's variants, read where that file is missing.
_VARIANTS = tuple(_WEIGHTS.replace(".", f".{variant}.") for variant in ("fp16", "bf16"))
_SCHEDULER = "scheduler_config.json"
_LAYERS = {
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
# The layers of attention in files of the first versions of diffusers.
_OLD_LAYERS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def diffusers_name(name: str, levels: int) -> str:
    """Returns diffusers' name for one of our weights: up_0_block_1/conv1/kernel -> up_blocks.1.resnets.1.conv1.weight.

    Diffusers numbers the up blocks in the order in which they run; we number them by resolution level.

    Args:
      name: our name.
      levels: the number of resolution levels.
    """
    kinds = {"block": "resnets", "attn": "attentions", "downsample": "downsamplers", "upsample": "upsamplers"}
    block, *layers = name.split("/")
    if match := re.fullmatch(r"(down|up)_(\d+)_(block|attn|downsample|upsample)_(\d+|conv)", block):
        way, level, kind, index = match.groups()
        number = int(level) if way == "down" else levels - 1 - int(level)
        block = f"{way}_blocks.{number}.{kinds[kind]}.{'0.conv' if index == 'conv' else index}"
    elif match := re.fullmatch(r"mid_(block|attn)_(\d+)", block):
        block = f"mid_block.{kinds[match[1]]}.{int(match[2]) - 1}"
    return ".".join(_LAYERS.get(layer, layer) for layer in (block, *layers))


def to_diffusers(name: str, array: np.ndarray) -> np.ndarray:
    """Returns one of our weights in PyTorch's layout: kernels are [out, in, H, W] or [out, in]."""
    if name == CLASSES:
        return array  # a dense layer here, an embedding in diffusers
    if name.endswith("nin_shortcut/kernel"):
        return array.T[:, :, None, None]  # a dense layer here, a 1x1 convolution in diffusers
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def from_diffusers(name: str, array: np.ndarray) -> np.ndarray:
    """The inverse of `to_diffusers`."""
    if name == CLASSES:
        return array
    if name.endswith("nin_shortcut/kernel"):
        return array[:, :, 0, 0].T
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def read_diffusers(folder: str, preset: Preset, model: UNet) -> Arrays:
    """Reads a saved DDPMPipeline or UNet2DModel, named as in a checkpoint of a run at step 0.

    The files lie in `folder` itself, or in its subfolders `unet` and `scheduler`; without a scheduler, only the
    configuration of the network is checked. The EMA weights are those of a subfolder `unet_ema`, as diffusers' training
    scripts write it, or the same weights.

    Args:
      folder: a folder written by `save_pretrained`, or cloned from the hub.
      preset: the preset that the configurations must match.
      model: the preset's network.

    Raises:
      InputError: a file is missing, damaged or a pickle, or belongs to another network or diffusion.
    """
    networks, scheduler = diffusers_config.network_folders(folder), diffusers_config.find_scheduler(folder)
    for network in networks:
        diffusers_config.check_unet(os.path.join(network, "config.json"), preset)
    if scheduler:
        diffusers_config.check_scheduler(scheduler, preset)
    weights = [_read_network(network, preset, model) for network in networks]
    return state_arrays(weights[0], weights[-1])


def read_ema(folder: str, preset: Preset, model: UNet) -> tuple[Arrays, str]:
    """Returns the EMA weights that `read_diffusers` reads, by our names, and the SHA-256 that identifies them."""
    arrays = read_diffusers(folder, preset, model)
    weights = {name: arrays[f"ema/{name}"] for name in model.weight_names}
    digest = hashlib.sha256()
    for array in weights.values():
        digest.update(array.tobytes())
    return weights, digest.hexdigest()


def check_size(folder: str, preset: Preset) -> None:
    """Checks, before a network takes memory, that the files in a diffusers folder hold enough numbers for its weights.

    Raises:
      InputError: a file is missing, damaged or too small.
    """
    for network in diffusers_config.network_folders(folder):
        path = _weights_path(network)
        found = sum(math.prod(spec.shape) for spec in read_header(path).specs.values())
        if found < preset.least_weights:
            raise InputError(
                f"{path} holds another network: it has {found:,} weights, and the network of config.json"
                f" {preset.least_weights:,} at least"
            )


def _weights_path(network: str) -> str:
    paths = [os.path.join(network, name) for name in (_WEIGHTS, *_VARIANTS)]
    if found := next(filter(tf.io.gfile.exists, paths), None):
        return found
    pickled = paths[0].replace(".safetensors", ".bin")
    if tf.io.gfile.exists(pickled):
        raise InputError(f"{pickled} is a pickle, which may run code, and is not read: save the weights as {_WEIGHTS}")
    return diffusers_config.require_file(paths[0])


def _read_network(network: str, preset: Preset, model: UNet) -> Arrays:
    """Returns the weights in a folder by our names; they are read only if they are those of the preset's network."""
    names = {name: diffusers_name(name, len(preset.ch_mult)) for name in model.weight_names}
    wanted = {
        names[name]: ArraySpec("float32", to_diffusers(name, np.empty(v.shape, np.float32)).shape)
        for name, v in zip(model.weight_names, model.trainable_variables, strict=True)
    }
    found = _read_weights(_weights_path(network), wanted)
    return {ours: np.ascontiguousarray(from_diffusers(ours, found[theirs])) for ours, theirs in names.items()}


def _read_weights(path: str, wanted: Mapping[str, ArraySpec]) -> Arrays:
    """Returns the arrays of a file as float32 by their new names; they are read only if they are as `wanted`."""
    header = read_header(path)
    found = {_new_name(name): _as_float32(spec) for name, spec in header.specs.items()}
    if len(found) < len(header.specs):
        raise InputError(f"{path} holds layers of attention under both old and new names")
    check_specs(found, wanted, path)
    return {_new_name(name): array.astype(np.float32, copy=False) for name, array in read_arrays(path, header).items()}


def _as_float32(spec: ArraySpec) -> ArraySpec:
    return ArraySpec("float32", spec.shape) if spec.dtype in DTYPES else spec


def _new_name(name: str) -> str:
    match = re.fullmatch(rf"(.*attentions\.\d+\.)({'|'.join(_OLD_LAYERS)})(\..*)", name)
    return match[1] + _OLD_LAYERS[match[2]] + match[3] if match else name


def write_diffusers(
    folder: str,
    preset: Preset,
    weight_names: Sequence[str],
    weights: Sequence[np.ndarray],
    dtype: str = "float32",
) -> None:
    """Writes weights into a new folder, atomically, as a DDPMPipeline that diffusers can load.

    Args:
      folder: the new folder.
      preset: the preset of the weights.
      weight_names: our names of the weights.
      weights: the weights, in the same order.
      dtype: of kernels in the file, one of DTYPES; biases and norms, which are small, stay float32.

    Raises:
      InputError: diffusers cannot express the preset, or the folder cannot be written.
    """
    scheduler, unet = diffusers_config.scheduler_config(preset), diffusers_config.unet_config(preset)
    arrays = {
        diffusers_name(name, len(preset.ch_mult)): np.ascontiguousarray(
            to_diffusers(name, w), tf.as_dtype(dtype).as_numpy_dtype if w.ndim > 1 else np.float32
        )
        for name, w in zip(weight_names, weights, strict=True)
    }
    with new_folder(folder) as temporary:
        write_json(os.path.join(temporary, "model_index.json"), diffusers_config.PIPELINE)
        write_json(os.path.join(temporary, "scheduler", _SCHEDULER), scheduler)
        write_json(os.path.join(temporary, "unet", "config.json"), unet)
        # PyTorch's loader requires the metadata.
        data = safetensors.numpy.save(arrays, {"format": "pt"})
        write_file(os.path.join(temporary, "unet", _WEIGHTS), data)
