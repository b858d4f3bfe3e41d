"""Compiles StableHLO for Cloud TPUs on any CPU, and says what the compiler makes of it. Nothing runs on a TPU.

libtpu, which holds the TPUs' compiler, is on PyPI; JAX hands it a program and the name of a slice. Both live in a
process of their own, as libtpu need not get along with TensorFlow, and may crash.
"""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from diffusion_tf.errors import InputError

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What is public about a chip.

    Attributes:
      devices: what one chip is to a program: two cores, or one.
      flops_per_second: peak of bfloat16 products.
      hbm_bytes: its memory.
      hbm_bytes_per_second: the memory's bandwidth.
      link_bytes_per_second: of one link to a neighbouring chip, in one direction.
      clock_hertz: what the compiler counts cycles of; None: unknown.
    """

    devices: int
    flops_per_second: float
    hbm_bytes: int
    hbm_bytes_per_second: float
    link_bytes_per_second: float
    clock_hertz: float | None


# Peak and HBM: cloud.google.com/tpu/docs/v3, v4, v5e and v6e. All of v2, and the clock and links of v3: Jouppi et al.,
# "A Domain-Specific Supercomputer for Training Deep Neural Networks", CACM 2020 (links of 496 and 656 Gbit/s). Clock
# and links of v4: Jouppi et al., "TPU v4: An Optically Reconfigurable Supercomputer", ISCA 2023. Links of v5e and v6e:
# half of a quarter of the pages' 400 and 800 GB/s, which count four links and both directions. v5e's clock: its peak
# over what its four matrix units of 128x128 do in a cycle, as the clocks before it are, too.
_V2 = Chip(2, 46e12, 16 * _GIB, 700e9, 62e9, 700e6)
_V3 = Chip(2, 123e12, 32 * _GIB, 900e9, 82e9, 940e6)
_V4 = Chip(1, 275e12, 32 * _GIB, 1200e9, 50e9, 1050e6)
_V5E = Chip(1, 197e12, 16 * _GIB, 819e9, 50e9, 1500e6)
_V6E = Chip(1, 918e12, 32 * _GIB, 1638e9, 100e9, None)


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice that is one machine.

    Attributes:
      chip: what it is made of.
      num_chips: in a ring, each chip beside its neighbours.
      libtpu_name: how libtpu calls it.
      chip_config: libtpu's name for how a chip's cores are used, where there is a choice; `megacore`: as one device.
    """

    chip: Chip
    num_chips: int
    libtpu_name: str
    chip_config: str | None = None

    @property
    def num_devices(self) -> int:
        """Devices of the slice, each of which runs one replica."""
        return self.num_chips * self.chip.devices

    @property
    def hbm_bytes(self) -> int:
        """Memory of one device."""
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
    """What the compiler says of a program for one device; None where it says nothing (sensible).

    Attributes:
      compile_seconds: how long it took.
      error: why it does not compile, in one line; None: it does.
      hbm_bytes: arguments, results and temporaries, those that share memory counted once.
      flops: floating point operations.
      bytes_accessed: read and written in HBM by all operations.
      estimated_seconds: each operation at the chip's peak or bandwidth, whichever takes longer, one after the other.
      cycles_seconds: the cycles that the scheduler expects of each operation, at the chip's clock.
    """

    compile_seconds: float
    error: str | None = None
    hbm_bytes: int | None = None
    flops: float | None = None
    bytes_accessed: float | None = None
    estimated_seconds: float | None = None
    cycles_seconds: float | None = None


def require_compiler() -> None:
    """Raises InputError where JAX or libtpu is not installed."""
    missing = [name for name in ("jax", "libtpu") if not importlib.util.find_spec(name)]
    if missing:
        raise InputError(f"compiling for TPUs needs {' and '.join(missing)}: pip install '.[tpu_report]'")


def roofline_seconds(flops: float, bytes_accessed: float, chip: Chip) -> float:
    """The least time in which one device can do so much: max(flops / peak, bytes / HBM bandwidth)."""
    return chip.devices * max(flops / chip.flops_per_second, bytes_accessed / chip.hbm_bytes_per_second)


def all_reduce_seconds(num_bytes: float, topology: Topology) -> float:
    """The time to sum `num_bytes` of each device over all of them, without latency and as if nothing else went on.

    With n chips in a ring that sends both ways, 2 (n - 1) / n * bytes / (2 * link). Where a chip is two devices, before
    it the pair's sum (two reads, one write) and after it a copy of the result (one read, one write):
    5 * bytes / HBM bandwidth more.
    """
    chip, n = topology.chip, topology.num_chips
    ring = (n - 1) / n * num_bytes / chip.link_bytes_per_second
    return ring + (5 * num_bytes / chip.hbm_bytes_per_second if chip.devices == 2 else 0.0)


def largest_batch(fits: Callable[[int], bool], start: int) -> int:
    """The largest batch that fits, to an eighth; 0: not even one image does. Doubles or halves, then bisects."""
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
    choices = range(low, high, max(1, low // 8))
    left, right = 0, len(choices)
    while right - left > 1:
        middle = (left + right) // 2
        left, right = (middle, right) if fits(choices[middle]) else (left, middle)
    return choices[left]


def compile_stablehlo(text: str, topology: Topology, in_place: Mapping[int, int] | None = None) -> Compiled:
    """Compiles a program of one device of the slice, in a process of its own; that takes seconds to minutes.

    Args:
      text: StableHLO whose entry is `main`.
      topology: the slice.
      in_place: results that take the memory of an argument of the same shape: argument's index to result's.

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
        cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
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
    if "error" in answer:
        return Compiled(answer["seconds"], answer["error"])
    flops, bytes_accessed = answer["flops"], answer["bytes_accessed"]
    # Custom calls, which only rearrange, count as -1 second each.
    estimate = answer["optimal_seconds"] + (answer["custom_calls"] if answer["optimal_seconds"] < 0 else 0)
    roofline = roofline_seconds(flops, bytes_accessed, chip)
    return Compiled(
        compile_seconds=answer["seconds"],
        hbm_bytes=answer["hbm_bytes"],
        flops=flops,
        bytes_accessed=bytes_accessed,
        estimated_seconds=estimate if 0.9 * roofline <= estimate <= 10 * roofline else None,
        cycles_seconds=answer["cycles"] / chip.clock_hertz if chip.clock_hertz else None,
    )


def _worker() -> None:
    """Reads a request of `compile_stablehlo` from stdin, and prints the answer as one line of JSON."""
    # Else libtpu is not loaded (diffusion_tf/__init__.py), asks Google's metadata server what machine this is, and may
    # not be in two processes at once.
    os.environ.update(TPU_LOAD_LIBRARY="1", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", JAX_PLATFORMS="cpu")
    import jax

    request = json.load(sys.stdin)
    start = time.monotonic()
    try:
        answer = _describe(_compile(request))
    except jax.errors.JaxRuntimeError as error:
        answer = {"error": " ".join(str(error).splitlines()[0].split())[:300]}
    print(json.dumps({**answer, "seconds": time.monotonic() - start}))


def _compile(request: dict[str, Any]) -> Any:
    # No public function of JAX compiles text for a topology: hence the locked version.
    from jax._src.interpreters import mlir
    from jax._src.lib import xla_client
    from jax.experimental import topologies
    from jaxlib.mlir import ir

    config = {"chip_config_name": request["chip_config"]} if request["chip_config"] else {}
    topology = topologies.get_topology_desc(platform="tpu", topology_name=request["libtpu_name"], **config)
    device: Any = topology.devices[0]
    # TensorFlow's name for what StableHLO calls so.
    text = request["text"].replace("mhlo.copy", "stablehlo.optimization_barrier")
    with mlir.make_ir_context():
        module = ir.Module.parse(text)
        share_memory(module, {int(argument): result for argument, result in request["in_place"].items()}, ir)
        return device.client.compile(module, xla_client.DeviceList((device,)), xla_client.CompileOptions())


def share_memory(module: Any, in_place: dict[int, int], ir: Any) -> None:
    """Marks arguments of `main` as those whose memory a result takes, as a training step's variables are."""
    (main,) = (op for op in module.body.operations if ir.StringAttr(op.attributes["sym_name"]).value == "main")
    int32 = ir.IntegerType.get_signless(32)
    main.attributes["arg_attrs"] = ir.ArrayAttr.get(
        [
            ir.DictAttr.get({"tf.aliasing_output": ir.IntegerAttr.get(int32, in_place[i])} if i in in_place else {})
            for i in range(len(main.arguments))
        ]
    )


def _describe(executable: Any) -> dict[str, Any]:
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
        "cycles": sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', entry))),
        "hbm_bytes": memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes,
    }


if __name__ == "__main__":
    _worker()
