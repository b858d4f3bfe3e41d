"""Projects how fast a preset trains and samples on Cloud TPUs at most, from its programs compiled on any machine."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from diffusion_tf.errors import ConfigError
from diffusion_tf.interop.tpu_compiler import Compiled, Lowered, compile_stablehlo, largest_batch, lower
from diffusion_tf.interop.tpu_slices import TOPOLOGIES, all_reduce_seconds, roofline_seconds
from diffusion_tf.presets import PRESETS, Preset
from diffusion_tf.reports import paper_numbers as paper

NOTE = """\
Nothing ran on a TPU. The programs are those that a TPUStrategy starts, for one device of the slice, with their
all-reduces; the times are lower bounds, and the speeds upper ones. A program takes the scheduler's cycles at the chip's
clock, or where that is unknown the compiler's own estimate, and no less than the roofline; and then the all-reduces, at
the bandwidth of the links. The host starts the next training step while the device computes one. It waits for the
device after `steps_per_loop` of them, and after each call that samples; a start is assumed to take {start_ms:g} ms. Not
counted: reading data, checkpoints, samples during training."""
START_SECONDS = 1e-3  # in which the host starts a program: an assumption
TOP = 10  # operations of a profile
_NETWORK = ("image_shape", "ch", "ch_mult", "num_res_blocks", "attn_resolutions", "num_timesteps")


class SliceProjector:
    """Compiles programs for one slice, and projects their speed.

    Args:
      name: a name in TOPOLOGIES.
      log: takes lines about the progress, because a program takes a minute or more to compile.
      start_seconds: assumed time in which the host starts a program.
      python: the Python that lowers and compiles; default: this one.
    """

    def __init__(
        self, name: str, log: Callable[[str], None], start_seconds: float = START_SECONDS, python: str | None = None
    ):
        self.name = name
        self._topology, self._log, self._start_seconds, self._python = TOPOLOGIES[name], log, start_seconds, python
        self._compiled: dict[tuple[str, Preset], tuple[Lowered, Compiled]] = {}

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
        """Projects one of TPU_PROGRAMS with `preset.batch_size` images per device, as JSON values."""
        lowered, compiled = self._compile(what, preset)
        batch_size = preset.batch_size * self._topology.num_devices
        sizes = {"batch_size": batch_size, "images_per_device": preset.batch_size, "kernels": lowered.kernels}
        row = {**sizes, "hbm_available_bytes": self._topology.hbm_bytes, **dataclasses.asdict(compiled)}
        row["operations"] = row["operations"][:TOP]
        if compiled.error:
            return row
        row |= self._bounds(compiled, lowered.num_steps)
        program = row["program_seconds"]
        if what == "train_step":
            seconds = max(program, self._start_seconds) + self._start_seconds / preset.steps_per_loop
            row |= {"step_seconds": seconds, "steps_per_second": 1 / seconds, "images_per_second": batch_size / seconds}
            row |= {"num_steps": preset.num_steps, "run_hours": preset.num_steps * seconds / 3600}
        else:
            seconds = lowered.calls * (program + self._start_seconds)
            row |= {"calls": lowered.calls, "all_steps_seconds": seconds, "images_per_second": batch_size / seconds}
        return row

    def _bounds(self, compiled: Compiled, steps: int) -> dict[str, Any]:
        """Lower bounds of the time of a program with a loop of `steps`."""
        assert compiled.cycles is not None and compiled.flops is not None and compiled.bytes_accessed is not None
        chip = self._topology.chip
        cycles = compiled.cycles / chip.clock_hertz if chip.clock_hertz else None
        estimate = steps * compiled.estimated_seconds if compiled.estimated_seconds else None
        roofline = steps * roofline_seconds(compiled.flops, compiled.bytes_accessed, chip)
        all_reduce = all_reduce_seconds(sum(compiled.all_reduce_bytes), self._topology)
        return {
            "program_steps": steps,
            "cycles_seconds": cycles,
            "estimated_seconds": estimate,
            "roofline_seconds": roofline,
            "all_reduce_seconds": all_reduce,
            "program_seconds": max(cycles or estimate or 0.0, roofline) + all_reduce,
        }

    def project_largest_batch(self, preset: Preset) -> dict[str, Any]:
        """Projects a training step with the most images per device that fit; compiles about eight programs."""

        def fits(batch_size: int) -> bool:
            _, compiled = self._compile("train_step", dataclasses.replace(preset, batch_size=batch_size))
            self._log(f"{self.name}: {batch_size} images a device: {compiled.error or 'fits'}")
            return compiled.error is None

        batch_size = largest_batch(fits, preset.batch_size)
        if not batch_size:
            return {"images_per_device": 0}
        return self.project("train_step", dataclasses.replace(preset, batch_size=batch_size))

    def _compile(self, what: str, preset: Preset) -> tuple[Lowered, Compiled]:
        """The program for one device; compiled once."""
        if (what, preset) not in self._compiled:
            self._log(f"{self.name}: compiling {what} for {preset.batch_size} images a device")
            replicas = self._topology.num_devices
            lowered = lower(what, preset, replicas, self._python)
            self._compiled[what, preset] = (
                lowered,
                compile_stablehlo(
                    lowered.stablehlo,
                    self._topology,
                    lowered.in_place,
                    num_replicas=replicas,
                    num_steps=lowered.num_steps,
                    python=self._python,
                ),
            )
        return self._compiled[what, preset]


def compare_with_paper(preset: Preset, train: dict[str, Any], sample: dict[str, Any]) -> None:
    """Adds the paper's speed on a v3-8 to projections for it, if network and batch size are the paper's.

    Args:
      preset: the configuration.
      train: the projection of its training step.
      sample: the projection of its sampler.
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
    if sample["batch_size"] == sample_batch_size and "all_steps_seconds" in sample:
        sample |= {"paper_all_steps_seconds": all_steps_seconds}
        sample |= {"times_the_papers_speed": all_steps_seconds / sample["all_steps_seconds"]}


def price(run_hours: float | None, topology_name: str, prices: Mapping[str, float | None]) -> float | None:
    """The price of a run, from `prices` of a chip of each type for an hour; None if either is unknown."""
    topology = TOPOLOGIES[topology_name]
    of_chip = prices.get(topology.chip_type)
    return None if run_hours is None or of_chip is None else run_hours * topology.num_chips * of_chip


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"


def _gibibytes(count: int) -> str:
    return f"{count / 2**30:.3g} GiB"


def _all_reduces(sizes: tuple[int, ...]) -> str:
    return f"{len(sizes)} of {sum(sizes) / 2**20:.4g} MiB" if sizes else "none"


_ROWS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("images", "batch_size", str),
    ("images per device", "images_per_device", str),
    ("steps of a program", "program_steps", str),
    ("kernels that lowered it", "kernels", str),
    ("libtpu that compiled it", "libtpu", str),
    ("compile time", "compile_seconds", "{:.0f} s".format),
    ("HBM needed", "hbm_bytes", _gibibytes),
    ("HBM of a device", "hbm_available_bytes", _gibibytes),
    ("all-reduces", "all_reduce_bytes", _all_reduces),
    ("scheduled cycles", "cycles", "{:,}".format),
    ("scheduled cycles, at the clock", "cycles_seconds", _milliseconds),
    ("the compiler's estimate", "estimated_seconds", _milliseconds),
    ("roofline", "roofline_seconds", _milliseconds),
    ("time of the all-reduces", "all_reduce_seconds", _milliseconds),
    ("program, at least", "program_seconds", _milliseconds),
    ("training step, at least", "step_seconds", _milliseconds),
    ("steps/s, at most", "steps_per_second", "{:.3g}".format),
    ("the paper's steps/s, measured", "paper_steps_per_second", "{:.3g}".format),
    ("calls for all steps", "calls", str),
    ("all steps, at least", "all_steps_seconds", "{:.3g} s".format),
    ("the paper's time, measured", "paper_all_steps_seconds", "{:.3g} s".format),
    ("images/s, at most", "images_per_second", "{:.4g}".format),
    ("times the paper's speed, at most", "times_the_papers_speed", "{:.2f}".format),
    ("steps of the recipe", "num_steps", "{:,}".format),
    ("hours for them, at least", "run_hours", "{:.3g}".format),
    ("price of them, at least", "price", "{:,.0f}".format),
)


def to_table(title: str, columns: Mapping[str, Mapping[str, Any]]) -> str:
    """A text table of projections, one column each, and the errors of programs that do not compile."""
    lines = [f"{title:34}" + "".join(f"{column:>20}" for column in columns)]
    for label, key, text in _ROWS:
        values = [column.get(key) for column in columns.values()]
        if any(value is not None for value in values):
            lines.append(f"{label:34}" + "".join(f"{'-' if value is None else text(value):>20}" for value in values))
    errors = {name: column["error"] for name, column in columns.items() if column.get("error")}
    return "\n".join([*lines, *(f"{name} does not compile: {error}" for name, error in errors.items())])


def to_profile(title: str, row: Mapping[str, Any]) -> str:
    """A text table of the operations of a projection that take the most cycles; those of a loop count once."""
    lines = [f"{title}: the operations with the most cycles"]
    for op in row.get("operations", ()):
        source = op["source"] or "-"
        lines.append(f"{op['cycles']:12,}  {'loop' if op['loop'] else '    '}  {source}  {op['result']}  {op['name']}")
    return "\n".join(lines)


def to_summary(slices: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """A Markdown table with a line for each slice, from the projections `train_step` and `sample`."""
    titles: tuple[str, ...] = (
        "slice",
        "fits",
        "train: cycles",
        "steps/s, at most",
        "hours, at least",
        "price, at least",
    )
    titles += ("sample: images", "cycles of a call", "seconds, at least")
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for name, columns in slices.items():
        train, sample = columns["train_step"], columns["sample"]
        fits = train["error"] is None and sample["error"] is None
        cells = (
            name,
            "yes" if fits else "no",
            _cell(train.get("cycles"), "{:,}"),
            _cell(train.get("steps_per_second"), "{:.3g}"),
            _cell(train.get("run_hours"), "{:.3g}"),
            _cell(train.get("price"), "{:,.0f}"),
            str(sample["batch_size"]),
            _cell(sample.get("cycles"), "{:,}"),
            _cell(sample.get("all_steps_seconds"), "{:.3g}"),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(value: float | None, text: str) -> str:
    return "" if value is None else text.format(value)
