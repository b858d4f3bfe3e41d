"""Writes a preset as configurations of diffusers, and checks configurations against a preset."""

import json
import os
from collections.abc import Collection, Mapping
from typing import Any

import tensorflow as tf

from diffusion_tf.errors import ConfigError, InputError
from diffusion_tf.layers import NUM_GROUPS
from diffusion_tf.presets import Preset
from diffusion_tf.storage.files import first_line, listed
from diffusion_tf.storage.json_files import read_json

PIPELINE = {
    "_class_name": "DDPMPipeline",
    "_diffusers_version": "0.35.0",
    "scheduler": ["diffusers", "DDPMScheduler"],
    "unet": ["diffusers", "UNet2DModel"],
}
# The defaults of diffusers' UNet2DModel and DDPMScheduler, for fields that a configuration leaves out.
_UNET_DEFAULTS = {
    "sample_size": None, "in_channels": 3, "out_channels": 3, "center_input_sample": False,
    "time_embedding_type": "positional", "time_embedding_dim": None, "freq_shift": 0, "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896], "layers_per_block": 2, "mid_block_scale_factor": 1,
    "downsample_padding": 1, "downsample_type": "conv", "upsample_type": "conv", "act_fn": "silu",
    "norm_num_groups": 32, "attn_norm_num_groups": None, "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default", "class_embed_type": None,
    "num_class_embeds": None, "num_train_timesteps": None, "add_attention": True, "attention_head_dim": 8,
}  # fmt: skip
_SCHEDULER_DEFAULTS = {
    "num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "trained_betas": None,
    "prediction_type": "epsilon", "variance_type": "fixed_small", "rescale_betas_zero_snr": False,
}  # fmt: skip
# How the schedulers of diffusers clip and choose timesteps. The samplers here do as these defaults say.
_SAMPLING_DEFAULTS = {
    "clip_sample": True, "clip_sample_range": 1.0, "thresholding": False, "timestep_spacing": "leading",
    "steps_offset": 0, "timestep_values": None,
}  # fmt: skip
_SCHEDULERS = {
    "DDPMScheduler": {**_SCHEDULER_DEFAULTS, **_SAMPLING_DEFAULTS, "predict_epsilon": True},
    "DDIMScheduler": {**_SCHEDULER_DEFAULTS, **_SAMPLING_DEFAULTS, "set_alpha_to_one": True},
}
del _SCHEDULERS["DDIMScheduler"]["variance_type"]
# Further fields, which change nothing: parameters of a thresholding that is off; what EMAModel notes beside a network.
_UNUSED_BY_SCHEDULERS = ("dynamic_thresholding_ratio", "sample_max_value", "tensor_format")
_EMA_NOTES = (
    "decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power"
)  # fmt: skip
_PIPELINES = ("DDPMPipeline", "DDIMPipeline")
_COMPONENTS = {"unet": ("UNet2DModel",), "scheduler": tuple(_SCHEDULERS)}
# The settings of a preset that decide a field.
_SETTINGS = {
    "sample_size": "`image_size` and `image_width`", "in_channels": "`channels`", "out_channels": "`channels`",
    "block_out_channels": "`ch` and `ch_mult`", "layers_per_block": "`num_res_blocks`",
    "down_block_types": "`attn_resolutions`", "up_block_types": "`attn_resolutions`",
    "attention_head_dim": "`attention_head_dim`", "add_attention": "`mid_attention`", "norm_eps": "`norm_eps`",
    "flip_sin_to_cos": "`flip_sin_to_cos`", "freq_shift": "`freq_shift`", "downsample_padding": "`downsample_padding`",
    "num_train_timesteps": "`num_timesteps`", "beta_schedule": "`beta_schedule`", "beta_start": "`beta_start`",
    "beta_end": "`beta_end`", "prediction_type": "`model_mean_type`", "variance_type": "`model_var_type`",
    "num_class_embeds": "`num_classes`",
}  # fmt: skip
_PREDICTION_TYPES = {"eps": "epsilon", "xstart": "sample"}
_VARIANCE_TYPES = {"fixedlarge": "fixed_large", "fixedsmall": "fixed_small"}


def unet_config(preset: Preset) -> dict[str, Any]:
    """Returns the `unet/config.json` of the preset's network, with every field."""
    attention = [level in preset.attention_levels for level in range(len(preset.ch_mult))]
    return {
        "_class_name": "UNet2DModel",
        "_diffusers_version": PIPELINE["_diffusers_version"],
        **_UNET_DEFAULTS,
        "sample_size": list(preset.image_shape[:2]) if preset.image_width else preset.image_size,
        "in_channels": preset.channels,
        "out_channels": preset.channels,
        "freq_shift": preset.freq_shift,
        "flip_sin_to_cos": preset.flip_sin_to_cos,
        "down_block_types": ["AttnDownBlock2D" if has else "DownBlock2D" for has in attention],
        "up_block_types": ["AttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)],
        "block_out_channels": [preset.ch * mult for mult in preset.ch_mult],
        "layers_per_block": preset.num_res_blocks,
        "downsample_padding": preset.downsample_padding,
        "norm_num_groups": NUM_GROUPS,
        "norm_eps": preset.norm_eps,
        "add_attention": preset.mid_attention,
        "attention_head_dim": preset.attention_head_dim or None,
        "num_class_embeds": preset.num_classes or None,
        "dropout": preset.dropout,
    }


def scheduler_config(preset: Preset) -> dict[str, Any]:
    """Returns the `scheduler/scheduler_config.json` of the preset's diffusion.

    Raises:
      ConfigError: diffusers cannot express a setting.
    """
    known = {"model_mean_type": _PREDICTION_TYPES, "model_var_type": _VARIANCE_TYPES, "beta_schedule": ("linear",)}
    for name, values in known.items():
        if getattr(preset, name) not in values:
            raise ConfigError(
                name, f"={getattr(preset, name)} is unknown to diffusers, which knows {', '.join(values)}"
            )
    return {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": PIPELINE["_diffusers_version"],
        **_SCHEDULER_DEFAULTS,
        "num_train_timesteps": preset.num_timesteps,
        "beta_start": preset.beta_start,
        "beta_end": preset.beta_end,
        "prediction_type": _PREDICTION_TYPES[preset.model_mean_type],
        "variance_type": _VARIANCE_TYPES[preset.model_var_type],
        "clip_sample": True,
    }


def check_unet(path: str, preset: Preset) -> None:
    """Checks that the network's configuration at `path` is that of the preset.

    Raises:
      InputError: a field is unknown, or belongs to another network; the message names it.
    """
    config, wanted = _read_unet(path), unet_config(preset)
    if config["sample_size"] is None:  # a network for images of any size
        config["sample_size"] = wanted["sample_size"]
    for values in (config, wanted):
        values["attention_head_dim"] = _head_dim(values["attention_head_dim"], preset)
    # Weights do not depend on the dropout, which the preset chooses.
    wanted = {name: wanted[name] for name in _UNET_DEFAULTS}
    _compare(path, config, wanted, "the preset's network or diffusion has {}")


def _head_dim(value: Any, preset: Preset) -> Any:
    """An `attention_head_dim`; None if it makes one head wherever the preset's network has attention."""
    levels = [*preset.attention_levels, *([-1] if preset.mid_attention else [])]
    return None if all(preset.ch * preset.ch_mult[level] == value for level in levels) else value


def check_scheduler(path: str, preset: Preset) -> None:
    """Checks that the scheduler's configuration at `path` is that of the preset's diffusion and of the samplers here.

    Raises:
      InputError: the class or a field is unknown, or belongs to another diffusion; the message names it.
    """
    config = _read_scheduler(path)
    wanted = {name: value for name, value in scheduler_config(preset).items() if name in _SCHEDULER_DEFAULTS}
    wanted = {name: value for name, value in wanted.items() if name in _SCHEDULERS[config["_class_name"]]}
    _compare(path, config, wanted, "the preset's network or diffusion has {}")


def _read_unet(path: str) -> dict[str, Any]:
    """Returns the configuration of a network with diffusers' defaults, its synonyms spelled as in `unet_config`."""
    config = _read(path, {"UNet2DModel": _UNET_DEFAULTS}, ("dropout", *_EMA_NOTES))
    if config["act_fn"] == "swish":
        config["act_fn"] = "silu"
    size = config["sample_size"]
    if isinstance(size, list) and len(size) == 2 and size[0] == size[1]:
        config["sample_size"] = size[0]
    return config


def _read_scheduler(path: str) -> dict[str, Any]:
    """Returns the configuration of a scheduler, with diffusers' defaults, after checking how it samples."""
    config = _read(path, _SCHEDULERS, _UNUSED_BY_SCHEDULERS)
    fields = _SCHEDULERS[config["_class_name"]]
    fixed = {name: value for name, value in fields.items() if name not in _SCHEDULER_DEFAULTS}
    _compare(path, config, fixed, "samples are drawn here with {}: change the file to accept that")
    return config


def _read(path: str, classes: Mapping[str, Mapping[str, Any]], unused: Collection[str]) -> dict[str, Any]:
    """Returns a configuration of diffusers, with defaults for fields that it leaves out.

    Args:
      path: the file.
      classes: the defaults of each known class.
      unused: fields that are known, and have no default.

    Raises:
      InputError: the file cannot be read, or its class or a field is unknown.
    """
    config = read_json(require_file(path))
    if not isinstance(config, dict):
        raise InputError(f"{path} is not a configuration: it is not a JSON object")
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in classes:
        raise InputError(f"{path} has _class_name={_shown(name)}: only {' and '.join(classes)} can be read")
    known = {*classes[name], *unused}
    for field, value in config.items():
        if not field.startswith("_") and field not in known:  # diffusers ignores fields that start with "_"
            raise InputError(f"{path} has {field}={_shown(value)}, which this program does not know")
    return {**classes[name], **config}


def _shown(value: Any) -> str:
    """A JSON value in an error message, which is one short line."""
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _compare(path: str, found: Mapping[str, Any], wanted: Mapping[str, Any], what: str) -> None:
    """Raises InputError for the first field that is not as wanted; the message ends with `what` of the wanted value."""
    for name, value in wanted.items():
        if found[name] != value or isinstance(found[name], bool) != isinstance(value, bool):
            setting = f" ({_SETTINGS[name]})" if name in _SETTINGS else ""
            raise InputError(f"{path} has {name}={_shown(found[name])}, and {what.format(_shown(value))}{setting}")


def require_file(path: str) -> str:
    """Returns the path of a file; raises InputError if there is none, with the names of those that there are."""
    if not tf.io.gfile.exists(path):
        folder = os.path.dirname(path)
        there = f"{folder} holds {listed(sorted(tf.io.gfile.listdir(folder)))}" if tf.io.gfile.isdir(folder) else ""
        raise InputError(f"cannot read {path}: {there or 'there is no such folder'}")
    return path


def network_folders(folder: str) -> list[str]:
    """The folders of the network in a diffusers folder: `unet`, `unet_ema`, or both; the folder itself if none exists.

    `unet_ema` is what the training scripts of diffusers write beside `unet`: the same network with its EMA weights.
    """
    paths = [os.path.join(folder, name) for name in ("unet", "unet_ema")]
    return list(filter(tf.io.gfile.isdir, paths)) or [folder]


def find_scheduler(folder: str) -> str | None:
    """The configuration of the scheduler in a diffusers folder, in `scheduler` or, as on the hub, flat; None if none.

    Raises:
      InputError: the folder holds a pipeline with other parts than a network and a scheduler, such as an autoencoder,
        or the scheduler that it names is missing.
    """
    path = os.path.join(folder, "model_index.json")
    index = _read(path, {name: {} for name in _PIPELINES}, _COMPONENTS) if tf.io.gfile.exists(path) else {}
    for component, classes in _COMPONENTS.items():
        value = index.get(component)
        # The library is a string of its own: a custom class may have the name of one of diffusers.
        if component in index and value not in [["diffusers", name] for name in classes]:
            known = " or ".join(classes)
            raise InputError(f"{path} has {component}={_shown(value)}: only {known} of diffusers can be read")
    places = [os.path.join(folder, *parts, "scheduler_config.json") for parts in (("scheduler",), ())]
    found = next(filter(tf.io.gfile.exists, places), None)
    if found is None and ("scheduler" in index or tf.io.gfile.isdir(os.path.dirname(places[0]))):
        require_file(places[0])  # the defaults may not be what is missing
    return found


def is_diffusers_folder(folder: str) -> bool:
    """Whether the folder holds a diffusers network; the config.json of a run is another one.

    Raises:
      InputError: the configuration is damaged.
    """
    if network_folders(folder) != [folder]:
        return True
    path = os.path.join(folder, "config.json")
    config = read_json(path) if tf.io.gfile.exists(path) else None
    return isinstance(config, dict) and "_class_name" in config


def preset_from_folder(folder: str, image_size: int = 0, image_width: int = 0) -> Preset:
    """The preset of the network and diffusion in a diffusers folder; its recipe for training is the default one.

    A folder without a scheduler's configuration gets diffusers' defaults: 1000 linear steps, `fixedsmall` variances.

    Args:
      folder: what `save_pretrained` wrote, or a clone from the hub.
      image_size: as in `Preset`, for a network whose configuration states no `sample_size`.
      image_width: likewise.

    Raises:
      InputError: a configuration is missing or damaged, or no preset describes its network or diffusion.
    """
    unet_path, scheduler_path = os.path.join(network_folders(folder)[0], "config.json"), find_scheduler(folder)
    unet = _read_unet(unet_path)
    if unet["sample_size"] is None and not image_size:
        raise ConfigError("image_size", f"is required: {unet_path} has sample_size=null, a network for any size")
    scheduler = {**_SCHEDULER_DEFAULTS, **(_read_scheduler(scheduler_path) if scheduler_path else {})}
    try:
        widths, kinds = unet["block_out_channels"], unet["down_block_types"]
        if (size := unet["sample_size"]) is not None:
            image_size, image_width = size if isinstance(size, list) else (size, 0)
        preset = Preset(
            dataset="diffusers",
            image_size=image_size,
            image_width=image_width,
            channels=unet["in_channels"],
            ch=widths[0],
            ch_mult=tuple(width // widths[0] for width in widths),
            num_res_blocks=unet["layers_per_block"],
            attn_resolutions=tuple(image_size // 2**i for i, kind in enumerate(kinds) if kind == "AttnDownBlock2D"),
            attention_head_dim=unet["attention_head_dim"] or 0,
            mid_attention=unet["add_attention"],
            norm_eps=unet["norm_eps"],
            flip_sin_to_cos=unet["flip_sin_to_cos"],
            freq_shift=unet["freq_shift"],
            downsample_padding=unet["downsample_padding"],
            dropout=unet.get("dropout", 0.0),
            num_classes=unet["num_class_embeds"] or 0,
            num_timesteps=scheduler["num_train_timesteps"],
            beta_start=scheduler["beta_start"],
            beta_end=scheduler["beta_end"],
            model_mean_type=_preset_word(_PREDICTION_TYPES, scheduler["prediction_type"]),
            model_var_type=_preset_word(_VARIANCE_TYPES, scheduler["variance_type"]),
        )
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise InputError(f"no preset describes the network and diffusion of {folder} ({first_line(error)})") from error
    # What the fields above leave out or round, such as the activation or the schedule's shape.
    check_unet(unet_path, preset)
    if scheduler_path:
        check_scheduler(scheduler_path, preset)
    return preset


def _preset_word(words: dict[str, str], theirs: str) -> str:
    """Our value of a setting for that of diffusers."""
    for ours, word in words.items():
        if word == theirs:
            return ours
    raise InputError(f"{theirs!r} is not one of {', '.join(words.values())}")
