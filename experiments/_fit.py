"""--fit: the recipe that fits, and what `train` prints about it before it trains."""

import os
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import tensorflow as tf

from diffusion_tf.budgets import USABLE, Budget, Choices, Cost, fit_memory, fit_time
from diffusion_tf.errors import InputError
from diffusion_tf.interop.tpu_compiler import require_compiler
from diffusion_tf.interop.tpu_projection import SliceProjector
from diffusion_tf.interop.tpu_slices import TOPOLOGIES
from diffusion_tf.network_size import network_size, training_bytes
from diffusion_tf.presets import Preset
from diffusion_tf.recipes import copying_warning
from diffusion_tf.training.step import microbatch_size
from diffusion_tf.training.step_time import measure_cost


class Fitted(NamedTuple):
    """A recipe that fits, and lines about memory and time.

    Attributes:
      preset: the recipe.
      memory: the predicted memory.
      time: the predicted time.
    """

    preset: Preset
    memory: str
    time: str


def fit(choices: Choices, budget: Budget, strategy: tf.distribute.Strategy) -> Fitted:
    """The largest recipe that fits, by `budgets.py`; measuring and compiling take a minute or so.

    Raises:
      InputError: none fits, or the TPU compiler is not installed.
    """
    if budget.slice_name:
        return _fit_slice(choices, budget)
    if budget.memory_bytes is not None:
        usable = USABLE * budget.memory_bytes
        preset = fit_memory(choices, lambda p: training_bytes(p, p.batch_size) <= usable, budget)
        memory = f"{_gibibytes(training_bytes(preset, preset.batch_size))} estimated, of {_gibibytes(usable)} usable"
        return Fitted(preset, memory, "not predicted: it takes the GPU itself; --fit=minutes:N measures where it runs")
    if budget.seconds is not None:
        preset, cost = fit_time(choices, budget.seconds, lambda p: measure_cost(p, strategy))
    else:
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        preset = fit_memory(choices, lambda p: _bytes_on_cpu(p) <= USABLE * physical, budget)
        cost = measure_cost(preset, strategy)
    return Fitted(preset, f"{_gibibytes(_bytes_on_cpu(preset))} estimated, on a CPU", _measured(preset, cost))


def _fit_slice(choices: Choices, budget: Budget) -> Fitted:
    assert budget.slice_name
    require_compiler()
    topology = TOPOLOGIES[budget.slice_name]
    projector = SliceProjector(budget.slice_name, lambda line: print(line, file=sys.stderr, flush=True))
    rows: dict[Preset, Mapping[str, Any]] = {}

    def fits(preset: Preset) -> bool:
        share = projector.per_device(preset, "batch_size", preset.batch_size)
        if training_bytes(share, share.batch_size) > 2 * topology.hbm_bytes:  # far from it: no need to compile
            return False
        row = rows[preset] = projector.project("train_step", share)
        if row["error"] and "RESOURCE_EXHAUSTED" not in row["error"]:
            raise InputError(f"{budget.name}: {row['error']}")
        return row["error"] is None

    preset = fit_memory(choices, fits, budget)
    row = rows[preset]
    memory = f"{_gibibytes(row['hbm_bytes'])} of the {_gibibytes(topology.hbm_bytes)} of a device, by the TPU compiler"
    step = row["step_seconds"]
    return Fitted(preset, memory, f"{step:.3g} s a step at least: {_duration(preset.num_steps * step)} in all")


def describe(preset: Preset, num_images: int | None, fitted: Fitted | None) -> str:
    """A short table of a recipe, what --fit predicts, and a warning if the images are few."""
    shape = "x".join(map(str, preset.image_shape))
    sides = "-".join(str(preset.image_size >> level) for level in range(len(preset.ch_mult)))
    heights = " and ".join(map(str, preset.attn_resolutions))
    attention = f", attention at {heights}" if heights else ""
    rows = {
        "images": shape if num_images is None else f"{num_images:,} of {shape}",
        "network": f"{network_size(preset).parameters:,} parameters: ch={preset.ch}, heights {sides}{attention}",
        "training": f"{preset.num_steps:,} steps of {preset.batch_size} images, learning_rate={preset.learning_rate},"
        f" dropout={preset.dropout}, ema_decay={preset.ema_decay}",
    }
    if fitted:
        rows |= {"memory": fitted.memory, "time": fitted.time}
    lines = [f"{name:10}{text}" for name, text in rows.items()]
    if num_images and (warning := copying_warning(preset, num_images)):
        lines.append(f"warning: {warning}")
    return "\n".join(lines)


def _bytes_on_cpu(preset: Preset) -> int:
    return training_bytes(preset, microbatch_size(preset))


def _measured(preset: Preset, cost: Cost) -> str:
    total = cost.compile_seconds + preset.num_steps * cost.step_seconds
    return (
        f"{_duration(total)} in all: {cost.compile_seconds:.0f} s to compile, then {cost.step_seconds:.3g} s a step,"
        " as measured on this machine"
    )


def _duration(seconds: float) -> str:
    """A time with the unit that suits it."""
    for size, unit, limit in ((1, "s", 120), (60, "min", 120), (3600, "h", 72)):
        if seconds < limit * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 86400:,.3g} days"


def _gibibytes(count: float) -> str:
    return f"{count / 2**30:.2g} GiB"
