"""Compiles a preset's steps for Cloud TPUs, on any CPU, and projects how fast it trains and samples there.

  python -m experiments.tpu_report --dataset=cifar10 --precision=bfloat16 --topology=v3-8 --topology=v5e-8

For each slice: whether a training step of --batch_size images over its devices, and a sampling step of
--sample_batch_size, compile; what memory they need; how long they may take. Each takes a minute or more to compile at
the paper's sizes, and --find_batch compiles about eight times. Nothing runs on a TPU.
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from absl import flags

from diffusion_tf.errors import InputError
from diffusion_tf.interop import export
from diffusion_tf.interop.tpu_compiler import (
    TOPOLOGIES,
    Compiled,
    all_reduce_seconds,
    compile_stablehlo,
    largest_batch,
    require_compiler,
    roofline_seconds,
)
from diffusion_tf.presets import PRESETS, Preset
from diffusion_tf.reports import paper_numbers as paper
from diffusion_tf.storage.files import write_json
from experiments import common

FLAGS = flags.FLAGS
common.define_preset_flags()
flags.DEFINE_multi_enum("topology", ["v3-8"], list(TOPOLOGIES), "The slice to compile for; may be given several times.")
flags.DEFINE_integer(
    "sample_batch_size",
    None,
    "Images sampled at once. Default: the paper's, 256 for images up to 64x64 and 128 beyond.",
    lower_bound=1,
)
flags.DEFINE_boolean("find_batch", False, "Look for the largest training batch that fits.")
flags.DEFINE_string("out", None, "The JSON file to write.")

_NOTE = (
    "Projections from a compiler's estimates and the chips' public figures: nothing ran on a TPU.\n"
    "A step is projected by the compiler's estimate, each operation at the peak or the bandwidth, or by the roofline\n"
    "where there is none; then the all-reduce. Its scheduler expects more cycles, and a real step is hardly shorter."
)
_NETWORK = ("image_size", "channels", "ch", "ch_mult", "num_res_blocks", "attn_resolutions", "num_timesteps")


@dataclasses.dataclass(frozen=True)
class _Lowered:
    stablehlo: str
    in_place: dict[int, int]
    num_parameters: int


@functools.lru_cache(maxsize=4)
def _lower(what: str, preset: Preset) -> _Lowered:
    """A program of export.py; what one call's result is the next one's argument stays where it is."""
    program = export.build(what, preset)
    index = {argument.name: i for i, argument in enumerate(program.arguments)}
    in_place = {index[result.feeds]: i for i, result in enumerate(program.results) if result.feeds}
    params = [math.prod(array.shape) for array in program.arguments if array.name.startswith("params/")]
    return _Lowered(program.stablehlo(), in_place, sum(params))


@functools.cache
def _compile(what: str, preset: Preset, name: str) -> Compiled:
    """The program for one device of the slice, for `preset.batch_size` images."""
    print(f"{name}: compiling {what} for {preset.batch_size} images a device", file=sys.stderr, flush=True)
    lowered = _lower(what, preset)
    return compile_stablehlo(lowered.stablehlo, TOPOLOGIES[name], lowered.in_place)


def _per_device(preset: Preset, flag: str, batch_size: int, name: str) -> Preset:
    devices = TOPOLOGIES[name].num_devices
    if batch_size % devices:
        raise InputError(f"--{flag}={batch_size} must be divisible by the {devices} devices of {name}")
    return dataclasses.replace(preset, batch_size=batch_size // devices)


def _measure(what: str, preset: Preset, name: str) -> dict[str, Any]:
    """A program at `preset.batch_size` images a device: what the compiler says, and the step's time from that."""
    topology, compiled = TOPOLOGIES[name], _compile(what, preset, name)
    batch_size = preset.batch_size * topology.num_devices
    sizes = {"batch_size": batch_size, "images_per_device": preset.batch_size}
    row = {**sizes, "hbm_available_bytes": topology.hbm_bytes, **dataclasses.asdict(compiled)}
    if compiled.flops is None or compiled.bytes_accessed is None:
        return row
    row["roofline_seconds"] = roofline_seconds(compiled.flops, compiled.bytes_accessed, topology.chip)
    after = 0.0
    if what == "train_step":
        # float32, whatever --precision is.
        after = row["all_reduce_seconds"] = all_reduce_seconds(4 * _lower(what, preset).num_parameters, topology)
    seconds = (compiled.estimated_seconds or row["roofline_seconds"]) + after
    if compiled.cycles_seconds:
        row["steps_per_second_by_cycles"] = 1 / (compiled.cycles_seconds + after)
    row |= {"step_seconds": seconds, "steps_per_second": 1 / seconds, "images_per_second": batch_size / seconds}
    if what == "sample_step":
        row["all_steps_seconds"] = preset.num_timesteps * seconds
        row["images_per_second"] /= preset.num_timesteps
    return row


def _beside_paper(preset: Preset, train: dict[str, Any], sample: dict[str, Any]) -> None:
    """Adds the paper's figures and how many times as fast ours are, where network and batch are the paper's."""
    recipe = PRESETS[preset.dataset]
    if preset.dataset not in paper.SPEED_V3_8 or any(getattr(preset, f) != getattr(recipe, f) for f in _NETWORK):
        return
    train_batch_size, steps_per_second, sample_batch_size, all_steps_seconds = paper.SPEED_V3_8[preset.dataset]
    if train["batch_size"] == train_batch_size and "step_seconds" in train:
        train |= {"paper_steps_per_second": steps_per_second}
        train |= {"times_the_papers_speed": train["steps_per_second"] / steps_per_second}
    if sample["batch_size"] == sample_batch_size and "step_seconds" in sample:
        sample |= {"paper_all_steps_seconds": all_steps_seconds}
        sample |= {"times_the_papers_speed": all_steps_seconds / sample["all_steps_seconds"]}


def _find_batch(preset: Preset, name: str) -> dict[str, Any]:
    def fits(batch_size: int) -> bool:
        compiled = _compile("train_step", dataclasses.replace(preset, batch_size=batch_size), name)
        print(f"{name}: {batch_size} images a device: {compiled.error or 'fits'}", file=sys.stderr, flush=True)
        return compiled.error is None

    batch_size = largest_batch(fits, preset.batch_size)
    if not batch_size:
        return {"images_per_device": 0}
    return _measure("train_step", dataclasses.replace(preset, batch_size=batch_size), name)


_ROWS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("images", "batch_size", str),
    ("images of a device", "images_per_device", str),
    ("compiled in", "compile_seconds", "{:.0f} s".format),
    ("HBM needed", "hbm_bytes", lambda n: f"{n / 2**30:.3g} GiB"),
    ("HBM of a device", "hbm_available_bytes", lambda n: f"{n / 2**30:.3g} GiB"),
    ("its floating point operations", "flops", "{:.3e}".format),
    ("bytes it accesses", "bytes_accessed", "{:.3e}".format),
    ("roofline", "roofline_seconds", lambda s: f"{1e3 * s:.2f} ms"),
    ("the compiler's estimate", "estimated_seconds", lambda s: f"{1e3 * s:.2f} ms"),
    ("sum of the scheduled cycles", "cycles_seconds", lambda s: f"{1e3 * s:.2f} ms"),
    ("all-reduce of the gradients", "all_reduce_seconds", lambda s: f"{1e3 * s:.2f} ms"),
    ("projected step", "step_seconds", lambda s: f"{1e3 * s:.2f} ms"),
    ("projected steps/s", "steps_per_second", "{:.3g}".format),
    ("steps/s by the scheduled cycles", "steps_per_second_by_cycles", "{:.3g}".format),
    ("the paper's steps/s, measured", "paper_steps_per_second", "{:.3g}".format),
    ("projected time of all steps", "all_steps_seconds", "{:.3g} s".format),
    ("the paper's time, measured", "paper_all_steps_seconds", "{:.3g} s".format),
    ("projected images/s", "images_per_second", "{:.4g}".format),
    ("times the paper's speed", "times_the_papers_speed", "{:.2f}".format),
)


def _print_table(name: str, columns: dict[str, dict[str, Any]]) -> None:
    print(f"\n{name:32}" + "".join(f"{column:>20}" for column in columns))
    for label, key, text in _ROWS:
        values = [column.get(key) for column in columns.values()]
        if any(value is not None for value in values):
            print(f"{label:32}" + "".join(f"{'-' if value is None else text(value):>20}" for value in values))
    for column, row in columns.items():
        if row.get("error"):
            print(f"{column} does not compile: {row['error']}")


def main() -> None:
    require_compiler()
    preset = common.preset_from_flags()
    out = common.out_path("", ".json") if FLAGS.out else None
    sample_batch_size = FLAGS.sample_batch_size or (256 if preset.image_size <= 64 else 128)
    slices = {
        name: (
            _per_device(preset, "batch_size", preset.batch_size, name),
            _per_device(preset, "sample_batch_size", sample_batch_size, name),
        )
        for name in FLAGS.topology
    }
    report: dict[str, Any] = {
        "note": _NOTE,
        "libtpu": version("libtpu"),
        "preset": dataclasses.asdict(preset),
        "topologies": {},
    }
    for name, (train_preset, sample_preset) in slices.items():
        columns = {"train_step": _measure("train_step", train_preset, name)}
        columns["sample_step"] = _measure("sample_step", sample_preset, name)
        if name == "v3-8":
            _beside_paper(preset, columns["train_step"], columns["sample_step"])
        if FLAGS.find_batch:
            columns["largest train_step"] = _find_batch(train_preset, name)
        _print_table(name, columns)
        report["topologies"][name] = columns
    print(f"\n{_NOTE}")
    if out:
        write_json(out, report)
        print(f"numbers: {out}")


if __name__ == "__main__":
    common.run(main)
