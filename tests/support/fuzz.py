"""Feeds damaged files to every reader of files from outside: each is read, or refused with an InputError of one line.

  PYTHONPATH=tests:. python -m support.fuzz 100000
  PYTHONPATH=tests:. python -m support.fuzz npz 17

The first line feeds so many files; the second one feeds file 17 to the reader npz, and shows the traceback. A file is a
function of its reader and its number. The readers run in child processes of bounded memory, whose end by a signal is a
finding too. The exit code is 1 if there are findings.
"""

import functools
import json
import math
import multiprocessing
import os
import pathlib
import random
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

from support.fuzz_readers import READERS

from diffusion_tf.errors import InputError

MEMORY = 2**30  # bytes that a reader may allocate; the files have some kilobytes
_SECONDS = 30  # that a reader may take
_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 0.5, 1e9, -1e300, float("nan"), float("inf"), "", "x", "a\nb",
    "x" * 1000, [], [0], {}, {"x": 1}, [[[[]]]],
)  # fmt: skip
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["support.fuzz_readers"])


def mutate(content: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """Damages a file at one to four places.

    Args:
      content: a sound file.
      rng: decides where and how.
      others: sound files, parts of which are spliced in.
    """
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        place = min(rng.randrange(len(data) + 1), rng.choice((16, 256, len(data))))  # headers are short
        end = place + rng.choice((1, 4, 16, 256))
        match rng.randrange(8):
            case 0 if place < len(data):
                data[place] ^= 1 << rng.randrange(8)
            case 1:
                del data[rng.randrange(len(data) + 1) :]
            case 2:
                del data[place:end]
            case 3:
                data[place:place] = data[place:end] * rng.choice((1, 2, 100))
            case 4:
                other = rng.choice(others)
                first = rng.randrange(len(other) + 1)
                data[place:end] = other[first : first + end - place]
            case 5:  # a size that lies
                width, order = rng.choice((1, 2, 4, 8)), rng.choice(("little", "big"))
                data[place : place + width] = (rng.choice(_NUMBERS) % 256**width).to_bytes(width, order)
            case 6:
                data[place:end] = rng.randbytes(rng.randrange(20))
            case 7:
                data = bytearray(mutate_json(bytes(data), rng))
    return bytes(data)


def mutate_json(content: bytes, rng: random.Random) -> bytes:
    """Replaces or removes a value in JSON, or in the JSON header of a safetensors file, whose length stays right."""
    size = int.from_bytes(content[:8], "little")
    begin, end = (8, 8 + size) if size < len(content) else (0, len(content))
    try:
        value = json.loads(content[begin:end])
    except (ValueError, RecursionError):
        return content
    holder = root = {"": value}
    key: Any = ""
    while rng.random() < 0.7 and isinstance(holder[key], dict | list) and holder[key]:
        holder = holder[key]
        key = rng.choice([*holder] if isinstance(holder, dict) else range(len(holder)))
    if holder is not root and isinstance(holder, dict) and rng.random() < 0.3:
        del holder[key]
    else:
        holder[key] = rng.choice(_VALUES)
    text = json.dumps(root[""]).encode()
    return (len(text).to_bytes(8, "little") if begin else b"") + text + content[end:]


@functools.cache
def sound_files(name: str) -> dict[str, bytes]:
    """The sound files of a reader."""
    return READERS[name].files()


def damaged_file(name: str, number: int) -> tuple[str, bytes]:
    """The path below the reader's folder, and the contents, of its file of this number."""
    reader, rng = READERS[name], random.Random(f"{name} {number}")
    files = sound_files(name)
    path = rng.choice(sorted(files))
    content = mutate(files[path], rng, list(files.values()))
    if reader.seal and rng.random() < 0.5:
        content = reader.seal(content)
    return path, content


def write_sound(name: str, folder: pathlib.Path) -> None:
    """Writes the sound files of a reader below `folder`."""
    for path, content in sound_files(name).items():
        (folder / name / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / name / path).write_bytes(content)


def find(name: str, number: int, folder: pathlib.Path) -> str:
    """Puts a damaged file in place of a sound one, and returns what is wrong with reading it; empty if nothing is."""
    path, content = damaged_file(name, number)
    file = folder / name / path
    file.write_bytes(content)
    try:
        READERS[name].read(folder / name)
    except InputError as error:
        return f"an error of several lines: {error}" if len(str(error).splitlines()) != 1 else ""
    except Exception as error:
        return f"{type(error).__name__}: {error} at {traceback.format_tb(error.__traceback__)[-1].strip()}"
    finally:
        file.write_bytes(sound_files(name)[path])
    return ""


def run(cases: Sequence[tuple[str, int]], folder: pathlib.Path, memory: int = MEMORY) -> list[str]:
    """Feeds damaged files to readers in child processes, and returns the findings.

    Args:
      cases: the name of the reader and the number of the file.
      folder: a folder for the files.
      memory: bytes that a child may allocate.
    """
    done, findings = _FORKS.Value("q", 0), folder / "findings"
    findings.write_text("")
    while done.value < len(cases):
        process = _FORKS.Process(target=_work, args=(cases, done, str(folder), memory))
        process.start()
        process.join()
        if process.exitcode:
            printed = (folder / "stderr").read_text().splitlines()[-1:]
            assert process.exitcode < 0, printed  # by a signal, and not by a fault of this module
            with findings.open("a") as file:
                print(*cases[done.value], f"the process ended with {process.exitcode}", *printed, file=file)
            done.value += 1
    return findings.read_text().splitlines()


def _work(cases: Sequence[tuple[str, int]], done: Any, folder: str, memory: int) -> None:
    file = os.open(os.path.join(folder, "stderr"), os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(file, sys.stderr.fileno())
    warnings.simplefilter("ignore")
    warm = ""
    for i in range(done.value, len(cases)):
        done.value = i
        signal.alarm(_SECONDS)
        if warm != (warm := cases[i][0]):
            _limit_memory(warm, pathlib.Path(folder), memory)
        if finding := find(*cases[i], pathlib.Path(folder)):
            with open(os.path.join(folder, "findings"), "a") as file:
                print(*cases[i], " ".join(finding.split()), file=file, flush=True)
    done.value = len(cases)


def _limit_memory(name: str, folder: pathlib.Path, memory: int) -> None:
    """Limits the memory to what a reader takes that has read its sound files, and `memory` more."""
    unlimited = resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_AS, (unlimited, unlimited))
    write_sound(name, folder)
    READERS[name].read(folder / name)
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory, unlimited))


def main(arguments: Sequence[str]) -> int:
    """Feeds `arguments[0]` files, or file `arguments[1]` to the reader `arguments[0]`; returns the exit code."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        if len(arguments) == 2:
            path, content = damaged_file(arguments[0], int(arguments[1]))
            print(path, content[:200])
            write_sound(arguments[0], folder)
            print(find(arguments[0], int(arguments[1]), folder))
            return 0
        share = int(arguments[0]) / sum(1 / reader.cost for reader in READERS.values())
        findings = []
        for name, reader in READERS.items():
            count = math.ceil(share / reader.cost)
            found = run([(name, number) for number in range(count)], folder)
            print(f"{name}: {count} files, {len(found)} findings", flush=True)
            findings += found
        print("\n".join(findings))
        return bool(findings)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
