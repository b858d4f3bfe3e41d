"""Projects how fast a preset trains and samples on Cloud TPUs, from programs compiled for them on any machine."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

from diffusion_tf.errors import ConfigError
from diffusion_tf.interop import export
from diffusion_tf.interop.tpu_compiler import (
    TOPOLOGIES,
    Compiled,
    all_reduce_seconds,
    compile_stablehlo,
    largest_batch,
    roofline_seconds,
)
from diffusion_tf.presets import PRESETS, Preset
from diffusion_tf.reports import paper_numbers as paper

NOTE = (
    "Projections from a compiler's estimates and published figures of the chips: nothing ran on a TPU.\n"
    "A projected step is the compiler's estimate, with each operation at peak FLOPS or bandwidth, or the roofline if\n"
    "there is none, plus the all-reduce. The scheduler expects more cycles, and a real step is hardly shorter."
)
TOP = 10  # operations of a profile
_NETWORK = ("image_shape", "ch", "ch_mult", "num_res_blocks", "attn_resolutions", "num_timesteps")


@dataclasses.dataclass(frozen=True)
class _Lowered:
    """A program as StableHLO; `in_place` maps results to the arguments whose memory they take over."""

    stablehlo: str
    in_place: dict[int, int]
    num_parameters: int


@functools.lru_cache(maxsize=4)
def _lower(what: str, preset: Preset) -> _Lowered:
    """Exports a program. A result that is the next call's argument stays where it is."""
    program = export.build(what, preset)
    index = {argument.name: i for i, argument in enumerate(program.arguments)}
    in_place = {index[result.feeds]: i for i, result in enumerate(program.results) if result.feeds}
    params = [math.prod(array.shape) for array in program.arguments if array.name.startswith("params/")]
    return _Lowered(program.stablehlo(), in_place, sum(params))


class SliceProjector:
    """Compiles programs for one slice, and projects their speed.

    Args:
      name: a name in TOPOLOGIES.
      log: takes lines about the progress, because a program takes a minute or more to compile.
    """

    def __init__(self, name: str, log: Callable[[str], None]):
        self.name = name
        self._topology, self._log = TOPOLOGIES[name], log
        self._compiled: dict[tuple[str, Preset], Compiled] = {}

    def per_device(self, preset: Preset, field: str, batch_size: int) -> Preset:
        """The preset with a device's share of `batch_size` images; `field` is the setting that errors name.

        Raises:
          ConfigError: the devices cannot share the images equally.
        """
        devices = self._topology.num_devices
        if batch_size % devices:
            raise ConfigError(field, f"={batch_size} must be divisible by the {devices} devices of {self.name}")
        return dataclasses.replace(preset, batch_size=batch_size // devices)

    def project(self, what: str, preset: Preset) -> dict[str, Any]:
        """Projects a program of `export` with `preset.batch_size` images per device, as JSON values."""
        topology, compiled = self._topology, self._compile(what, preset)
        batch_size = preset.batch_size * topology.num_devices
        sizes = {"batch_size": batch_size, "images_per_device": preset.batch_size}
        row = {**sizes, "hbm_available_bytes": topology.hbm_bytes, **dataclasses.asdict(compiled)}
        row["operations"] = row["operations"][:TOP]
        if compiled.flops is None or compiled.bytes_accessed is None:
            return row
        row["roofline_seconds"] = roofline_seconds(compiled.flops, compiled.bytes_accessed, topology.chip)
        all_reduce = 0.0
        if what == "train_step":
            # Gradients are float32 at any precision.
            num_bytes = 4 * _lower(what, preset).num_parameters
            all_reduce = row["all_reduce_seconds"] = all_reduce_seconds(num_bytes, topology)
        seconds = (compiled.estimated_seconds or row["roofline_seconds"]) + all_reduce
        if compiled.cycles_seconds:
            row["steps_per_second_by_cycles"] = 1 / (compiled.cycles_seconds + all_reduce)
        row |= {"step_seconds": seconds, "steps_per_second": 1 / seconds, "images_per_second": batch_size / seconds}
        if what == "sample_step":
            row["all_steps_seconds"] = preset.num_timesteps * seconds
            row["images_per_second"] /= preset.num_timesteps
        return row

    def project_largest_batch(self, preset: Preset) -> dict[str, Any]:
        """Projects a training step with the most images per device that fit; compiles about eight programs."""

        def fits(batch_size: int) -> bool:
            compiled = self._compile("train_step", dataclasses.replace(preset, batch_size=batch_size))
            self._log(f"{self.name}: {batch_size} images a device: {compiled.error or 'fits'}")
            return compiled.error is None

        batch_size = largest_batch(fits, preset.batch_size)
        if not batch_size:
            return {"images_per_device": 0}
        return self.project("train_step", dataclasses.replace(preset, batch_size=batch_size))

    def _compile(self, what: str, preset: Preset) -> Compiled:
        """The program for one device; compiled once."""
        if (what, preset) not in self._compiled:
            self._log(f"{self.name}: compiling {what} for {preset.batch_size} images a device")
            lowered = _lower(what, preset)
            self._compiled[what, preset] = compile_stablehlo(lowered.stablehlo, self._topology, lowered.in_place)
        return self._compiled[what, preset]


def compare_with_paper(preset: Preset, train: dict[str, Any], sample: dict[str, Any]) -> None:
    """Adds the paper's speed on a v3-8 to projections for it, if network and batch size are the paper's.

    Args:
      preset: the configuration.
      train: the projection of its training step.
      sample: the projection of its sampling step.
    """
    if preset.dataset not in paper.SPEED_V3_8:
        return
    recipe = PRESETS[preset.dataset]
    if any(getattr(preset, name) != getattr(recipe, name) for name in _NETWORK):
        return
    train_batch_size, steps_per_second, sample_batch_size, all_steps_seconds = paper.SPEED_V3_8[preset.dataset]
    if train["batch_size"] == train_batch_size and "step_seconds" in train:
        train |= {"paper_steps_per_second": steps_per_second}
        train |= {"times_the_papers_speed": train["steps_per_second"] / steps_per_second}
    if sample["batch_size"] == sample_batch_size and "step_seconds" in sample:
        sample |= {"paper_all_steps_seconds": all_steps_seconds}
        sample |= {"times_the_papers_speed": all_steps_seconds / sample["all_steps_seconds"]}


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"


def _gibibytes(count: int) -> str:
    return f"{count / 2**30:.3g} GiB"


_ROWS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("images", "batch_size", str),
    ("images per device", "images_per_device", str),
    ("compile time", "compile_seconds", "{:.0f} s".format),
    ("HBM needed", "hbm_bytes", _gibibytes),
    ("HBM of a device", "hbm_available_bytes", _gibibytes),
    ("floating point operations", "flops", "{:.3e}".format),
    ("bytes accessed", "bytes_accessed", "{:.3e}".format),
    ("roofline", "roofline_seconds", _milliseconds),
    ("the compiler's estimate", "estimated_seconds", _milliseconds),
    ("sum of the scheduled cycles", "cycles_seconds", _milliseconds),
    ("all-reduce of the gradients", "all_reduce_seconds", _milliseconds),
    ("projected step", "step_seconds", _milliseconds),
    ("projected steps/s", "steps_per_second", "{:.3g}".format),
    ("steps/s by the scheduled cycles", "steps_per_second_by_cycles", "{:.3g}".format),
    ("the paper's steps/s, measured", "paper_steps_per_second", "{:.3g}".format),
    ("projected time of all steps", "all_steps_seconds", "{:.3g} s".format),
    ("the paper's time, measured", "paper_all_steps_seconds", "{:.3g} s".format),
    ("projected images/s", "images_per_second", "{:.4g}".format),
    ("times the paper's speed", "times_the_papers_speed", "{:.2f}".format),
)


def to_table(title: str, columns: Mapping[str, Mapping[str, Any]]) -> str:
    """A text table of projections, one column each, and the errors of programs that do not compile."""
    lines = [f"{title:32}" + "".join(f"{column:>20}" for column in columns)]
    for label, key, text in _ROWS:
        values = [column.get(key) for column in columns.values()]
        if any(value is not None for value in values):
            lines.append(f"{label:32}" + "".join(f"{'-' if value is None else text(value):>20}" for value in values))
    errors = {name: column["error"] for name, column in columns.items() if column.get("error")}
    return "\n".join([*lines, *(f"{name} does not compile: {error}" for name, error in errors.items())])


def to_profile(title: str, row: Mapping[str, Any], clock_hertz: float | None) -> str:
    """A text table of the operations of a projection that take the most cycles."""
    lines = [f"{title}: the operations that take the most cycles"]
    for op in row["operations"]:
        time = f"{1e3 * op['cycles'] / clock_hertz:8.3f} ms" if clock_hertz else ""
        lines.append(f"{op['cycles']:12,} {time}  {op['source'] or '-'}  {op['result']}  {op['name']}")
    return "\n".join(lines)
