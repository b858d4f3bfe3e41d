"""Speed of this project beside diffusers' UNet2DModel on this CPU: `make bench`.

python tests/benchmarks/bench.py [--quick] [PART OF A NAME ...], for example `forward` or `"train cifar10"`

Both are worker processes that stay alive and take turns, so that neither compilation nor a slow hour is timed.
A repetition during which other processes used more than 0.15 cores does not count.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterable, Iterator

import timing

_HERE = pathlib.Path(__file__).parent
_ROOT = _HERE.parent.parent
_BUILD = _ROOT / "build" / "bench"
_PEER = ["torch==2.13.*", "diffusers==0.42.*"]
_PEER_MODES = {"eager": [], "torch.compile": ["--compile"]}
_MAX_FOREIGN_CORES = 0.15
_MAX_SECONDS = 180  # of the repetitions of one row


@dataclasses.dataclass(frozen=True)
class Case:
    """A row: what a worker times, in which preset, batch and precision; `first_step` is a command and has no worker."""

    what: str
    preset: str
    batch: int
    precision: str = "float32"

    @property
    def name(self) -> str:
        """What the table and the filters call it."""
        return f"{self.what} {self.preset} batch {self.batch} {self.precision}"


_CASES = [
    *(Case("forward", "cifar10", batch, p) for p in ("float32", "bfloat16") for batch in (8, 1, 32)),
    *(Case("train", "cifar10", 8, p) for p in ("float32", "bfloat16")),
    *(Case("sample", "cifar10", batch, p) for p in ("float32", "bfloat16") for batch in (8, 1, 32)),
    *(Case(what, "digits", 64, p) for what in ("train", "sample") for p in ("float32", "bfloat16")),
    *(Case("convolution", "cifar10", batch, p) for p in ("float32", "bfloat16") for batch in (8, 1)),
    Case("input", "cifar10", 128),
    Case("input", "lsun_church", 64),
    Case("cached_input", "lsun_church", 64),
    Case("first_step", "digits", 64),
    Case("first_step", "cifar10", 128),
]

# What of ours a row is timed beside, to tell what the rest of it costs.
_BARE = {"train": "gradients", "sample": "forward", "convolution": "constant_convolution"}


class Worker:
    """A process that has warmed up, and times one repetition whenever it is asked."""

    def __init__(self, *command: str):
        # A cache of compiled programs that a killed run left half written would end the next one.
        self._cache = tempfile.TemporaryDirectory()
        cache = {"TORCHINDUCTOR_CACHE_DIR": self._cache.name}
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **cache}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=_ROOT
        )
        self.facts = self._read()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()
        self._cache.cleanup()

    def __call__(self) -> dict:
        """One repetition."""
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"bench: this ended early: {' '.join(self._process.args)}")
        return json.loads(line)


def make_peer() -> str:
    """The Python of a virtual environment with torch for CPUs and diffusers, made where it is missing."""
    if python := os.environ.get("BENCH_PEER_PYTHON"):
        return python
    folder, done = _BUILD / "peer", _BUILD / "peer" / ".installed"
    python = str(folder / "bin" / "python")
    if not done.exists():
        venv.create(folder, with_pip=True, clear=True)
        # PyPI's own torch for Linux brings CUDA; without this index pip goes on with what it has.
        wheels = ["--extra-index-url=https://download.pytorch.org/whl/cpu", "--retries=0"]
        for packages in ([*wheels, _PEER[0]], _PEER[1:]):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        done.touch()
    return python


def make_data() -> str:
    """The folder of generated records, written where they are missing."""
    folder = _BUILD / "data"
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        command = [sys.executable, _HERE / "our_worker.py", "--what=data", f"--data={partial}"]
        subprocess.run(command, check=True, cwd=_ROOT, env={**os.environ, "PYTHONPATH": str(_ROOT)}, stdout=sys.stderr)
        partial.rename(folder)
    return str(folder)


@contextlib.contextmanager
def start_workers(case: Case) -> Iterator[dict[str, Callable[[], dict]]]:
    """{mode: what takes a repetition} of a row: ours, and diffusers' where it has the network."""
    if case.what == "first_step":
        yield {"ours": functools.partial(first_step, case)}
        return
    flags = [f"--what={case.what}", f"--batch={case.batch}", f"--precision={case.precision}"]
    ours = [sys.executable, str(_HERE / "our_worker.py"), f"--preset={case.preset}", *flags]
    commands = {"ours": [*ours, *([f"--data={make_data()}"] if case.what.endswith("input") else [])]}
    if case.what == "cached_input":  # beside the same images as TFRecords
        commands["TFRecords"] = [*commands["ours"], "--what=tfrecord_input"]
    if case.what in _BARE:
        commands["bare"] = [*ours, f"--what={_BARE[case.what]}"]
    if case.preset == "cifar10" and case.what in ("convolution", "forward", "train", "sample"):
        theirs = [make_peer(), str(_HERE / "diffusers_worker.py"), *flags]
        commands |= {mode: [*theirs, *more] for mode, more in _PEER_MODES.items()}
    with contextlib.ExitStack() as stack:
        yield {mode: stack.enter_context(Worker(*command)) for mode, command in commands.items()}


def measure_case(case: Case, reps: int) -> dict:
    """A case's row."""
    with start_workers(case) as workers:
        return measure(case.name, case.what, workers, reps)


def first_step(case: Case) -> dict:
    """Seconds from the command until the first step's metrics are written."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "experiments.train", f"--workdir={folder}/run", f"--dataset={case.preset}"]
        command += ["--num_steps=1", "--steps_per_loop=1", "--sample_every=0", f"--batch_size={case.batch}"]
        command += [f"--data_dir={make_data()}"] if case.preset != "digits" else []
        busy, cpu, start = timing.busy_seconds(), _children_seconds(), time.perf_counter()
        process = subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        metrics = pathlib.Path(folder, "run", "metrics.jsonl")
        while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.05)
        seconds = time.perf_counter() - start
        if process.wait():
            raise SystemExit(f"bench: this failed: {' '.join(command)}")
        foreign = timing.busy_seconds() - busy - (_children_seconds() - cpu)
        # The command also writes its checkpoint before it ends.
        wall = time.perf_counter() - start
        return {"seconds": seconds, "foreign_cores": max(0.0, foreign) / wall, "peak_gib": None}


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure(name: str, what: str, workers: dict[str, Callable[[], dict]], reps: int) -> dict:
    """The row of what takes turns: each mode's quiet repetitions, median, spread and peak memory; overhead, ratio."""
    answers: dict[str, list[dict]] = {mode: [] for mode in workers}
    start = time.monotonic()
    for _ in range(3 * reps):
        for mode, worker in workers.items():
            answers[mode].append(worker())
        if time.monotonic() - start > _MAX_SECONDS or all(len(_quiet(a)) >= reps for a in answers.values()):
            break
    facts = {mode: getattr(worker, "facts", {}) for mode, worker in workers.items()}
    modes = {mode: {**_summary(a), "facts": facts[mode]} for mode, a in answers.items()}
    row = {"name": name, "what": what, "modes": modes}
    medians = {mode: summary["median"] for mode, summary in modes.items()}
    quiet = all(summary["quiet"] for summary in modes.values())
    if "bare" in modes:
        row["overhead"] = medians["ours"] / medians["bare"] - 1 if quiet else None
    if peers := [mode for mode in modes if mode not in ("ours", "bare")]:
        row["best_mode"] = min(peers, key=medians.get)
        row["ratio"] = medians["ours"] / medians[row["best_mode"]] if quiet else None
    return row


def _quiet(answers: list[dict]) -> list[dict]:
    return [answer for answer in answers if answer["foreign_cores"] <= _MAX_FOREIGN_CORES]


def _summary(answers: list[dict]) -> dict:
    quiet = _quiet(answers)
    seconds = [answer["seconds"] for answer in quiet or answers]
    peaks = [answer["peak_gib"] for answer in answers if answer["peak_gib"]]
    return {
        "median": statistics.median(seconds),
        "min": min(seconds),
        "max": max(seconds),
        "quiet": len(quiet),
        "peak_gib": max(peaks, default=None),
        "repetitions": answers,
    }


def table_line(row: dict) -> str:
    """A row of the table. `!` marks a measurement that was never quiet; it has no ratio."""

    def cells(summary):
        values = [summary[key] for key in ("median", "min", "max")]
        if row["what"].endswith("input"):
            median, high, low = (f"{1 / value:,.0f}" for value in values)
            median += " images/s"
        else:
            scale, unit = (1, "s") if row["what"] == "first_step" else (1000, "ms")
            median, low, high = (f"{scale * value:,.1f}" for value in values)
            median += f" {unit}"
        peak = f"{summary['peak_gib']:.1f}" if summary["peak_gib"] else ""
        return median + ("" if summary["quiet"] else " !"), f"{low}-{high}", peak

    best = row.get("best_mode")
    theirs = cells(row["modes"][best]) if best else ("", "", "")
    ratio = f"{row['ratio']:.2f}" if row.get("ratio") else ""
    overhead = f"{row['overhead']:+.1%}" if row.get("overhead") is not None else ""
    return _format((row["name"], *cells(row["modes"]["ours"]), overhead, *theirs, best or "", ratio))


def report(path: str, rows: Iterable[dict]) -> None:
    """Prints the table and writes the numbers, each row as soon as it is there."""
    headings = ("what", "ours, median", "min-max", "GiB", "over bare", "beside", "min-max", "GiB", "mode", "ratio")
    print(_format(headings), flush=True)
    done = []
    for row in rows:
        done.append(row)
        print(table_line(row), flush=True)
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        pathlib.Path(path).write_text(json.dumps({"cpus": os.cpu_count(), "rows": done}, indent=2) + "\n")


def _format(words) -> str:
    return "".join(f"{word:<{width}}" for word, width in zip(words, (38, 18, 17, 6, 10, 16, 17, 6, 15, 5), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("filters", nargs="*", help="parts of names; default: all rows")
    parser.add_argument("--quick", action="store_true", help="3 repetitions instead of 7")
    parser.add_argument("--json", default=str(_BUILD / "bench.json"), help="where the numbers go")
    args = parser.parse_args()
    cases = [case for case in _CASES if not args.filters or any(part in case.name for part in args.filters)]
    if not cases:
        raise SystemExit("bench: no such row; there are:\n" + "\n".join(case.name for case in _CASES))
    report(args.json, (measure_case(case, 3 if args.quick else 7) for case in cases))


if __name__ == "__main__":
    main()
