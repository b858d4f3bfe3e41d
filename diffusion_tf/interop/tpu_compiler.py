"""Lowers the programs of a TPUStrategy and compiles them for Cloud TPUs on any CPU. Nothing runs on a TPU.

The compiler is in libtpu, which is on PyPI; JAX passes it a program and the name of a slice. TensorFlow lowers in one
process and libtpu compiles in another, because they may not work together, and libtpu may crash. Both may be those of
another Python environment, such as one that holds what runs on a TPU VM.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from diffusion_tf.errors import ConfigError, InputError
from diffusion_tf.interop.tpu_cycles import Operation, all_reduces, operations
from diffusion_tf.interop.tpu_slices import Chip, Topology, roofline_seconds
from diffusion_tf.presets import Preset

_MAX_ERROR_LENGTH = 300  # characters of the compiler's error that are kept
# The compiler's time estimate is discarded unless it is between these multiples of the roofline.
_MIN_ESTIMATE, _MAX_ESTIMATE = 0.9, 10.0
_BATCH_STEPS = 8  # `largest_batch` is exact to an eighth


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A program of one device as StableHLO.

    Attributes:
      stablehlo: the text, with the entry point `main`.
      in_place: index of an argument to the index of the result that takes its memory.
      num_steps: how often the program runs its loop; 1 without one.
      calls: how many calls of it make one training step, or all steps of sampling.
      kernels: whose kernels lowered it: TPU or CPU.
    """

    stablehlo: str
    in_place: dict[int, int]
    num_steps: int = 1
    calls: int = 1
    kernels: str = "CPU"


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The compiler's report on a program for one device; None for a missing or implausible figure.

    Loops count once, except in `cycles`.

    Attributes:
      compile_seconds: the time that compilation took.
      error: why compilation failed, in one line; None if it succeeded.
      libtpu: the version of the compiler.
      hbm_bytes: memory of arguments, results and temporaries, counted once if shared.
      flops: floating-point operations.
      bytes_accessed: bytes that all operations read from and write to HBM.
      estimated_seconds: the sum over operations of the time at the chip's peak or bandwidth, whichever is longer.
      cycles: the sum of the scheduler's estimated cycles of each operation, without all-reduces.
      all_reduce_bytes: what each all-reduce sums over the devices.
      operations: all operations that take cycles, the longest first.
    """

    compile_seconds: float
    error: str | None = None
    libtpu: str | None = None
    hbm_bytes: int | None = None
    flops: float | None = None
    bytes_accessed: float | None = None
    estimated_seconds: float | None = None
    cycles: int | None = None
    all_reduce_bytes: tuple[int, ...] = ()
    operations: tuple[Operation, ...] = ()


def require_compiler(python: str | None = None) -> None:
    """Raises InputError if JAX or libtpu is not installed, or if another `python` is to compile and is no program."""
    if python:
        if not shutil.which(python):
            raise InputError(f"{python} is no program: name the Python of an environment with tensorflow-tpu and JAX")
        return
    missing = [name for name in ("jax", "libtpu") if not importlib.util.find_spec(name)]
    if missing:
        raise InputError(f"compiling for TPUs needs {' and '.join(missing)}: pip install '.[tpu-report]'")


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


@functools.lru_cache(maxsize=4)  # slices with equally many devices share a program
def lower(what: str, preset: Preset, num_replicas: int, python: str | None = None) -> Lowered:
    """Lowers a program for one of `num_replicas` devices, each with `preset.batch_size` images; takes up to minutes.

    Args:
      what: one of TPU_PROGRAMS.
      preset: the recipe.
      num_replicas: the number of devices.
      python: the Python whose TensorFlow lowers; default: this one.

    Raises:
      ConfigError: the preset's network cannot be built.
      InputError: `python` cannot lower the program.
    """
    request = {"what": what, "preset": dataclasses.asdict(preset), "num_replicas": num_replicas}
    answer, error = _ask("tpu_program", request, python)
    if error:
        raise InputError(f"{python or sys.executable} cannot lower {what}: {error}")
    if isinstance(answer, list):
        raise ConfigError(*answer)
    return Lowered(**{**answer, "in_place": {int(i): result for i, result in answer["in_place"].items()}})


def compile_stablehlo(
    text: str,
    topology: Topology,
    in_place: Mapping[int, int] | None = None,
    *,
    num_replicas: int = 1,
    num_steps: int = 1,
    python: str | None = None,
) -> Compiled:
    """Compiles a program for devices of a slice, which takes seconds to minutes.

    Args:
      text: StableHLO with the entry point `main`.
      topology: the slice.
      in_place: index of an argument to the index of the result that takes its memory.
      num_replicas: the number of devices that run the program together.
      num_steps: how often its loop runs, for the cycles.
      python: the Python whose JAX and libtpu compile; default: this one.

    Raises:
      InputError: JAX or libtpu is not installed.
    """
    require_compiler(python)
    request = {
        "text": text,
        "libtpu_name": topology.libtpu_name,
        "chip_config": topology.chip_config,
        "in_place": dict(in_place or {}),
        "num_replicas": num_replicas,
    }
    start = time.monotonic()
    answer, error = _ask("tpu_compiler", request, python)
    if error:
        return Compiled(time.monotonic() - start, f"the compiler's process {error}")
    return _read_answer(answer, topology.chip, num_steps)


def _ask(module: str, request: dict[str, Any], python: str | None) -> tuple[Any, str]:
    """Runs a module of this package with a request on stdin; returns its answer, or None and an error."""
    root = pathlib.Path(__file__).parents[2]
    process = subprocess.run(
        [python or sys.executable, "-m", f"diffusion_tf.interop.{module}"],
        input=json.dumps(request),
        # A checkout may not be installed. Site-packages must not hide those of another Python.
        cwd=root if python is None or (root / "setup.py").exists() else None,
        env={**os.environ, "TPU_LOAD_LIBRARY": "0", "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode != 0:
        says = (process.stderr.strip().splitlines() or ["nothing"])[-1].strip()
        return None, f"ended with code {process.returncode} and said: {says}"
    return json.loads(process.stdout.splitlines()[-1]), ""


def _read_answer(answer: dict[str, Any], chip: Chip, num_steps: int) -> Compiled:
    """Returns the report that the answer of the separate process makes."""
    if "error" in answer:
        return Compiled(answer["seconds"], answer["error"], answer["libtpu"])
    flops, bytes_accessed = answer["flops"], answer["bytes_accessed"]
    by_cycles = sorted((Operation(**fields) for fields in answer["operations"]), key=lambda op: -op.cycles)
    # The compiler counts each custom call, which only moves data, as -1 second.
    estimate = answer["optimal_seconds"] + (answer["custom_calls"] if answer["optimal_seconds"] < 0 else 0)
    roofline = roofline_seconds(flops, bytes_accessed, chip)
    return Compiled(
        compile_seconds=answer["seconds"],
        libtpu=answer["libtpu"],
        hbm_bytes=answer["hbm_bytes"],
        flops=flops,
        bytes_accessed=bytes_accessed,
        estimated_seconds=estimate if _MIN_ESTIMATE * roofline <= estimate <= _MAX_ESTIMATE * roofline else None,
        cycles=sum(op.cycles * (num_steps if op.loop else 1) for op in by_cycles),
        all_reduce_bytes=tuple(answer["all_reduce_bytes"]),
        operations=tuple(by_cycles),
    )


def _worker() -> None:
    """Reads a request of `compile_stablehlo` from stdin and prints the answer as one line of JSON."""
    # diffusion_tf/__init__.py prevents loading libtpu; libtpu asks Google's metadata server for the type of this
    # machine, and by default runs in only one process at a time.
    os.environ.update(TPU_LOAD_LIBRARY="1", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", JAX_PLATFORMS="cpu")
    from importlib.metadata import version

    import jax

    request = json.load(sys.stdin)
    start = time.monotonic()
    try:
        answer = _describe(_compile(request))
    except jax.errors.JaxRuntimeError as error:
        answer = {"error": " ".join(str(error).splitlines()[0].split())[:_MAX_ERROR_LENGTH]}
    print(json.dumps({**answer, "seconds": time.monotonic() - start, "libtpu": version("libtpu")}))


def _compile(request: dict[str, Any]) -> Any:
    from jax.experimental import topologies

    from diffusion_tf.interop import stablehlo

    config = {"chip_config_name": request["chip_config"]} if request["chip_config"] else {}
    topology = topologies.get_topology_desc(platform="tpu", topology_name=request["libtpu_name"], **config)
    in_place = {int(argument): result for argument, result in request["in_place"].items()}
    devices = topology.devices[: request["num_replicas"]]
    return stablehlo.compile_for(devices, request["text"], in_place, load=False)


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
        "all_reduce_bytes": all_reduces(text),
        "operations": [dataclasses.asdict(operation) for operation in operations(text)],
        "hbm_bytes": memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes,
    }


if __name__ == "__main__":
    _worker()
