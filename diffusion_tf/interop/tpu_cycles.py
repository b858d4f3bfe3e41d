"""Reads the scheduler's cycles of each operation from an optimised program of the TPU compiler."""

import dataclasses
import math
import re
from collections.abc import Iterator

_COMPUTATION = re.compile(r"^(?:ENTRY )?%(\S+) \(.*\{$")
_INSTRUCTION = re.compile(r"^  (?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w-]+)\(")
_CALLED = re.compile(r"\b(?:body|condition|to_apply|true_computation|false_computation)=%([\w.-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_CALLERS = ("while", "conditional", "call")  # a fusion's computation is counted with the fusion


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation of an optimised program.

    Attributes:
      name: the compiler's name for it, unique in the program.
      cycles: the scheduler's estimate for one execution.
      loop: whether it is in the body of a loop.
      result: dtypes and shapes of its results, without layouts.
      source: the name of the TensorFlow operation that it stems from, or of one of several that are fused.
    """

    name: str
    cycles: int
    loop: bool
    result: str
    source: str


def operations(text: str) -> list[Operation]:
    """Returns the operations of an optimised program, in HLO's text form, that take cycles; loops only once."""
    computations, entry = _computations(text)
    return list(_walk(computations, entry, loop=False))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Returns the lines of each computation, and the name of the entry computation."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            lines = computations.setdefault(match[1], [])
            entry = match[1] if line.startswith("ENTRY") else entry
        else:
            lines.append(line)
    return computations, entry


def _walk(computations: dict[str, list[str]], name: str, *, loop: bool) -> Iterator[Operation]:
    for line in computations[name]:
        if not (instruction := _INSTRUCTION.match(line)):
            continue
        if cycles := re.search(r'"estimated_cycles":"(\d+)"', line):
            source = re.search(r'op_name="([^"]*)"', line)
            result = re.sub(r"\{[^}]*\}|/\*.*?\*/", "", instruction[2])
            yield Operation(instruction[1], int(cycles[1]), loop, result, source[1] if source else "")
        if instruction[3] in _CALLERS:
            branches = [called.strip(" %") for found in _BRANCHES.findall(line) for called in found.split(",")]
            for called in [*_CALLED.findall(line), *branches]:
                yield from _walk(computations, called, loop=loop or instruction[3] == "while")


def all_reduces(text: str) -> list[int]:
    """Returns the bytes that each all-reduce of an optimised program sums over the devices."""
    found = (_INSTRUCTION.match(line) for line in text.splitlines())
    return [_num_bytes(match[2]) for match in found if match and match[3] in ("all-reduce", "all-reduce-start")]


def _num_bytes(shapes: str) -> int:
    """Returns the size of the arrays of a result, such as `(f32[32]{0}, bf16[3,32]{1,0})`."""
    arrays = re.findall(r"\b[a-z]+(\d+)\[([\d,]*)\]", shapes)
    return sum(int(bits) // 8 * math.prod(int(n) for n in dims.split(",") if n) for bits, dims in arrays)
