"""Starts a run with the weights of another run or of a diffusers folder."""

import dataclasses
import os
from typing import Any

from diffusion_tf.errors import ConfigError, InputError
from diffusion_tf.interop import diffusers
from diffusion_tf.interop.diffusers_config import is_diffusers_folder, preset_from_folder
from diffusion_tf.presets import Preset
from diffusion_tf.storage import checkpoints
from diffusion_tf.storage.files import is_local
from diffusion_tf.storage.workdir import Workdir
from diffusion_tf.training.state import InitialWeights
from diffusion_tf.unet import UNet

# The settings that the weights depend on, besides the levels with attention and whether variances are learned.
_NETWORK = (
    "channels", "ch", "ch_mult", "num_res_blocks", "attention_head_dim", "mid_attention", "norm_eps", "flip_sin_to_cos",
    "freq_shift", "downsample_padding", "num_timesteps", "beta_schedule", "beta_start", "beta_end",
    "model_mean_type",
)  # fmt: skip


def fine_tuning_preset(init_from: str, overrides: dict[str, Any]) -> Preset:
    """The recipe of a new run that starts with the weights at `init_from`.

    Network, diffusion process and recipe are those of the source; a diffusers folder has the default recipe. The
    warm-up takes a 40th of the training steps, and the EMA averages over a tenth, where the source's are longer. At
    another image size, attention stays at the same levels. There are no classes: those are the new images'.

    Args:
      init_from: a run's folder, one of its checkpoints, or a diffusers folder.
      overrides: other values for some fields.

    Raises:
      InputError: there is no source, or a value is out of range.
    """
    source = _source_preset(init_from, overrides.get("image_size", 0), overrides.get("image_width", 0))
    preset = dataclasses.replace(source, **overrides)
    attends = (preset.image_size // 2**level for level in source.attention_levels)
    defaults = {
        "num_classes": 0,
        "attn_resolutions": tuple(sorted(attends, reverse=True)),
        "warmup_steps": min(source.warmup_steps, preset.num_steps // 40),
        "ema_decay": min(source.ema_decay, max(0.0, 1 - 10 / preset.num_steps)),
    }
    return dataclasses.replace(preset, **{**defaults, **overrides})


def initial_weights(workdir: Workdir, init_from: str | None, preset: Preset) -> InitialWeights | None:
    """The weights with which the run in a folder starts; None if it has a checkpoint, or starts with random ones.

    Args:
      workdir: the run's folder.
      init_from: as for `fine_tuning_preset`; None: as config.json says, if there is a run.
      preset: the run's recipe.

    Raises:
      ConfigError: the run that is there started from something else, or the source holds another network.
      InputError: a file is missing or damaged, or has changed since the run recorded it.
    """
    path = None if init_from is None else _absolute(init_from)
    recorded = workdir.read_init_from() if workdir.holds_run() else None
    if path and workdir.holds_run() and path != (recorded or {}).get("path"):
        started = f"the weights of {recorded['path']}" if recorded else "random weights"
        raise ConfigError(
            "init_from", f"={init_from}: the run in {workdir.path} started with {started}: choose another `workdir`"
        )
    path = path or (recorded or {}).get("path")
    if path is None or checkpoints.all_steps(workdir.checkpoints):
        return None
    weights = _read(path, preset)
    if recorded and recorded["sha256"] != weights.sha256:
        raise InputError(f"{path} has changed since {workdir.path} was started with it: choose another `workdir`")
    return weights


def _source_preset(path: str, image_size: int, image_width: int) -> Preset:
    """The preset of a source; the image size is for a diffusers network that states none."""
    if is_diffusers_folder(path):
        return preset_from_folder(path, image_size, image_width)
    workdir = _workdir_of(path)
    if not workdir.holds_run():
        raise ConfigError("init_from", f"={path} is neither a run nor a diffusers folder: it has no config.json")
    return workdir.read_preset()


def _read(path: str, preset: Preset) -> InitialWeights:
    source = _source_preset(path, preset.image_size, preset.image_width)
    _check_network(path, preset, source)
    if is_diffusers_folder(path):
        diffusers.check_size(path, source)
        weights, digest = diffusers.read_ema(path, source, UNet.from_preset(source))
        return InitialWeights(path, digest, weights)
    is_file = path.endswith(".safetensors")
    file = path if is_file else checkpoints.find(_workdir_of(path).checkpoints)[1]
    arrays = checkpoints.load(file)
    weights = {name.removeprefix("ema/"): array for name, array in arrays.items() if name.startswith("ema/")}
    return InitialWeights(path, checkpoints.load_digest(file), weights)


def _workdir_of(path: str) -> Workdir:
    """The run's folder, of which `path` may be a checkpoint."""
    if not path.endswith(".safetensors"):
        return Workdir(path)
    folder = os.path.dirname(path)
    return Workdir(os.path.dirname(folder.removesuffix("/best")))


def _check_network(path: str, preset: Preset, source: Preset) -> None:
    """Raises ConfigError with the settings in which two networks differ so that one cannot take the other's weights."""
    pairs = {name: (getattr(preset, name), getattr(source, name)) for name in _NETWORK}
    pairs["levels with attention"] = preset.attention_levels, source.attention_levels
    if "learned" in (preset.model_var_type, source.model_var_type):
        pairs["model_var_type"] = preset.model_var_type, source.model_var_type
    differences = [f"{name}: {ours} != {theirs}" for name, (ours, theirs) in pairs.items() if ours != theirs]
    if differences:
        raise ConfigError(
            "init_from",
            f"={path} holds the weights of another network ({'; '.join(differences)}, asked != there): leave out"
            " `dataset` and these settings to have the network of the source",
        )


def _absolute(path: str) -> str:
    path = os.path.expanduser(path)
    return os.path.abspath(path) if is_local(path) else path
