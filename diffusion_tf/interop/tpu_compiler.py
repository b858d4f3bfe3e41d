"""Compiles StableHLO for Cloud TPUs on any CPU, and reports memory, cost and estimated time. Nothing runs on a TPU.

The compiler is in libtpu, which is on PyPI; JAX passes it a program and the name of a slice. Both run in a separate
process, because libtpu may crash and may not work beside TensorFlow.
"""

import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from diffusion_tf.errors import InputError
from diffusion_tf.interop.tpu_cycles import Operation, operations

_GIB = 2**30  # bytes
_MAX_ERROR_LENGTH = 300  # characters of the compiler's error that are kept
# The compiler's time estimate is discarded unless it is between these multiples of the roofline.
_MIN_ESTIMATE, _MAX_ESTIMATE = 0.9, 10.0
_BATCH_STEPS = 8  # `largest_batch` is exact to an eighth


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of a TPU chip.

    Attributes:
      devices: devices that one chip presents to a program: one for each core, or one for all.
      flops_per_second: peak of bfloat16 matrix products.
      hbm_bytes: memory.
      hbm_bytes_per_second: memory bandwidth.
      link_bytes_per_second: bandwidth of one link to a neighbouring chip, in one direction.
      clock_hertz: clock of the cycles that the compiler counts; None: unknown.
    """

    devices: int
    flops_per_second: float
    hbm_bytes: int
    hbm_bytes_per_second: float
    link_bytes_per_second: float
    clock_hertz: float | None


# Peak and HBM: cloud.google.com/tpu/docs/v3, v4, v5e and v6e. v2, and the clock and links of v3 (496 and 656 Gbit/s):
# Jouppi et al., "A Domain-Specific Supercomputer for Training Deep Neural Networks", CACM 2020. Clock and links of v4:
# Jouppi et al., "TPU v4: An Optically Reconfigurable Supercomputer", ISCA 2023. Links of v5e and v6e: the pages state
# 400 and 800 GB/s for four links in both directions. Clock of v5e: its peak divided by the operations per cycle of four
# 128x128 matrix units; the same division gives the published clocks of v2 to v4.
_V2 = Chip(2, 46e12, 16 * _GIB, 700e9, 62e9, 700e6)
_V3 = Chip(2, 123e12, 32 * _GIB, 900e9, 82e9, 940e6)
_V4 = Chip(1, 275e12, 32 * _GIB, 1200e9, 50e9, 1050e6)
_V5E = Chip(1, 197e12, 16 * _GIB, 819e9, 50e9, 1500e6)
_V6E = Chip(1, 918e12, 32 * _GIB, 1638e9, 100e9, None)


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of one machine.

    Attributes:
      chip: the type of its chips.
      num_chips: the number of chips, which form a ring.
      libtpu_name: libtpu's name of the slice.
      chip_config: libtpu's name for the use of a chip's cores, where there is a choice; `megacore`: as one device.
    """

    chip: Chip
    num_chips: int
    libtpu_name: str
    chip_config: str | None = None

    @property
    def num_devices(self) -> int:
        """The number of devices; each runs one replica."""
        return self.num_chips * self.chip.devices

    @property
    def hbm_bytes(self) -> int:
        """The memory of one device."""
        return self.chip.hbm_bytes // self.chip.devices


TOPOLOGIES = {
    "v2-8": Topology(_V2, 4, "v2:2x2x1"),
    "v3-8": Topology(_V3, 4, "v3:2x2x1"),
    "v4-8": Topology(_V4, 4, "v4:2x2x1", "megacore"),
    "v5e-8": Topology(_V5E, 8, "v5e:2x4"),
    "v6e-8": Topology(_V6E, 8, "v6e:2x4"),
}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The compiler's report on a program for one device; None for a missing or implausible figure.

    Attributes:
      compile_seconds: the time that compilation took.
      error: why compilation failed, in one line; None if it succeeded.
      hbm_bytes: memory of arguments, results and temporaries, counted once if shared.
      flops: floating-point operations.
      bytes_accessed: bytes that all operations read from and write to HBM.
      estimated_seconds: the sum over operations of the time at the chip's peak or bandwidth, whichever is longer.
      cycles_seconds: the sum of the scheduler's estimated cycles of each operation, at the chip's clock.
      operations: all operations that take cycles, the longest first.
    """

    compile_seconds: float
    error: str | None = None
    hbm_bytes: int | None = None
    flops: float | None = None
    bytes_accessed: float | None = None
    estimated_seconds: float | None = None
    cycles_seconds: float | None = None
    operations: tuple[Operation, ...] = ()


def require_compiler() -> None:
    """Raises InputError if JAX or libtpu is not installed."""
    missing = [name for name in ("jax", "libtpu") if not importlib.util.find_spec(name)]
    if missing:
        raise InputError(f"compiling for TPUs needs {' and '.join(missing)}: pip install '.[tpu_report]'")


def roofline_seconds(flops: float, bytes_accessed: float, chip: Chip) -> float:
    """Returns the least time that one device needs: max(flops / peak, bytes / HBM bandwidth)."""
    return chip.devices * max(flops / chip.flops_per_second, bytes_accessed / chip.hbm_bytes_per_second)


def all_reduce_seconds(num_bytes: float, topology: Topology) -> float:
    """Returns the time of an all-reduce of `num_bytes` per device, without latency or other traffic.

    A ring of n chips that sends both ways takes 2 (n - 1) / n * bytes / (2 * link). A chip with two devices first sums
    the two (two reads, one write) and at last copies the result (one read, one write): 5 * bytes / HBM bandwidth more.
    """
    chip, n = topology.chip, topology.num_chips
    ring = (n - 1) / n * num_bytes / chip.link_bytes_per_second
    return ring + (5 * num_bytes / chip.hbm_bytes_per_second if chip.devices == 2 else 0.0)


def largest_batch(fits: Callable[[int], bool], start: int) -> int:
    """Returns the largest batch size that fits, to an eighth, by doubling or halving and bisection.

    Args:
      fits: whether a batch size fits.
      start: the batch size to try first.

    Returns:
      The batch size; 0 if not even one image fits.
    """
    low, high = 0, start
    if fits(start):
        low, high = start, 2 * start
        while fits(high):
            low, high = high, 2 * high
    while not low and high > 1:
        half = high // 2
        low, high = (half, high) if fits(half) else (0, half)
    if not low:
        return 0
    choices = range(low, high, max(1, low // _BATCH_STEPS))
    left, right = 0, len(choices)
    while right - left > 1:
        middle = (left + right) // 2
        left, right = (middle, right) if fits(choices[middle]) else (left, middle)
    return choices[left]


def compile_stablehlo(text: str, topology: Topology, in_place: Mapping[int, int] | None = None) -> Compiled:
    """Compiles a program for one device of a slice in a separate process, which takes seconds to minutes.

    Args:
      text: StableHLO with the entry point `main`.
      topology: the slice.
      in_place: index of an argument to the index of the result that takes its memory.

    Raises:
      InputError: JAX or libtpu is not installed.
    """
    require_compiler()
    request = {
        "text": text,
        "libtpu_name": topology.libtpu_name,
        "chip_config": topology.chip_config,
        "in_place": dict(in_place or {}),
    }
    start = time.monotonic()
    process = subprocess.run(
        [sys.executable, "-m", "diffusion_tf.interop.tpu_compiler"],
        input=json.dumps(request),
        cwd=pathlib.Path(__file__).parents[2],  # where the package is found even if it is not installed
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.monotonic() - start
    if process.returncode != 0:
        says = (process.stderr.strip().splitlines() or ["nothing"])[-1].strip()
        return Compiled(seconds, f"the compiler's process ended with code {process.returncode} and said: {says}")
    return _read_answer(json.loads(process.stdout.splitlines()[-1]), topology.chip)


def _read_answer(answer: dict[str, Any], chip: Chip) -> Compiled:
    """Returns the report that the answer of the separate process makes."""
    if "error" in answer:
        return Compiled(answer["seconds"], answer["error"])
    flops, bytes_accessed = answer["flops"], answer["bytes_accessed"]
    by_cycles = sorted((Operation(**fields) for fields in answer["operations"]), key=lambda op: -op.cycles)
    # The compiler counts each custom call, which only moves data, as -1 second.
    estimate = answer["optimal_seconds"] + (answer["custom_calls"] if answer["optimal_seconds"] < 0 else 0)
    roofline = roofline_seconds(flops, bytes_accessed, chip)
    return Compiled(
        compile_seconds=answer["seconds"],
        hbm_bytes=answer["hbm_bytes"],
        flops=flops,
        bytes_accessed=bytes_accessed,
        estimated_seconds=estimate if _MIN_ESTIMATE * roofline <= estimate <= _MAX_ESTIMATE * roofline else None,
        cycles_seconds=sum(op.cycles for op in by_cycles) / chip.clock_hertz if chip.clock_hertz else None,
        operations=tuple(by_cycles),
    )


def _worker() -> None:
    """Reads a request of `compile_stablehlo` from stdin and prints the answer as one line of JSON."""
    # diffusion_tf/__init__.py prevents loading libtpu; libtpu asks Google's metadata server for the type of this
    # machine, and by default runs in only one process at a time.
    os.environ.update(TPU_LOAD_LIBRARY="1", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", JAX_PLATFORMS="cpu")
    import jax

    request = json.load(sys.stdin)
    start = time.monotonic()
    try:
        answer = _describe(_compile(request))
    except jax.errors.JaxRuntimeError as error:
        answer = {"error": " ".join(str(error).splitlines()[0].split())[:_MAX_ERROR_LENGTH]}
    print(json.dumps({**answer, "seconds": time.monotonic() - start}))


def _compile(request: dict[str, Any]) -> Any:
    from jax.experimental import topologies

    from diffusion_tf.interop import stablehlo

    config = {"chip_config_name": request["chip_config"]} if request["chip_config"] else {}
    topology = topologies.get_topology_desc(platform="tpu", topology_name=request["libtpu_name"], **config)
    in_place = {int(argument): result for argument, result in request["in_place"].items()}
    return stablehlo.compile_for(topology.devices[:1], request["text"], in_place, load=False)


def _describe(executable: Any) -> dict[str, Any]:
    """Returns the memory, cost and cycles that the compiler reports, as JSON values."""
    costs = executable.cost_analysis()
    costs = costs[0] if isinstance(costs, list) else costs
    memory = executable.get_compiled_memory_stats()
    text = executable.hlo_modules()[0].to_string()
    entry = text[text.index("\nENTRY") :]
    return {
        "flops": costs["flops"],
        "bytes_accessed": costs["bytes accessed"],
        "optimal_seconds": costs["optimal_seconds"],
        "custom_calls": len(re.findall(r"\bcustom_call_target=", entry)),
        "operations": [dataclasses.asdict(operation) for operation in operations(text)],
        "hbm_bytes": memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes,
    }


if __name__ == "__main__":
    _worker()
