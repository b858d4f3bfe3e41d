"""Training processes that are killed, and runs that are compared byte for byte."""

import json
import os
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parent.parent
# Steps of milliseconds, saved again and again, so that a kill often meets a checkpoint half written. Mirrored replicas,
# even one, are not compiled by XLA, which would be most of such a short process.
TINY = (
    "--strategy=mirrored --steps_per_loop=5 --checkpoint_every=5 --keep_checkpoints=2 --keep_every=50 --sample_every=50"
    " --batch_size=8 --num_timesteps=4 --ch_mult=1 --dropout=0.1 --warmup_steps=5 --random_flip=True"
).split()
# Importing TensorFlow takes most of a short program's time: one process does it, and forks one for each line of input.
# It answers with the child's process number, and at its end with how that ended.
_FORKING = """
import importlib, json, os, resource, sys
import sklearn.datasets
from diffusion_tf import training
from experiments import common
exec(sys.argv[1])
for line in sys.stdin:
    child = os.fork()
    if not child:
        log, folder, most_bytes, *sys.argv = json.loads(line)
        os.chdir(folder)
        output = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if most_bytes:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
        common.run(importlib.import_module(f"experiments.{sys.argv[0]}").main)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Programs:
    """Starts programs in processes of their own, one after the other, with TensorFlow imported once.

    Args:
      folder: where to write what they print.
      imports: more to import once.
    """

    def __init__(self, folder: pathlib.Path, imports: str = ""):
        self.log = folder / "log"
        self.process = subprocess.Popen(
            [sys.executable, "-c", _FORKING, imports],
            cwd=ROOT,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, program: str, *args: str, folder: pathlib.Path = ROOT, most_bytes: int = 0) -> int:
        """The number of a process that runs `program` in a folder; a file may have `most_bytes`, if that is not 0."""
        self.process.stdin.write(json.dumps([str(self.log), str(folder), most_bytes, program, *args]) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self) -> tuple[int, str]:
        """The exit code, or minus the signal, of the process that was started last, and what it printed."""
        return int(self.process.stdout.readline()), self.log.read_text()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def wait_for(condition, seconds=300.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)


def is_saving(workdir: pathlib.Path) -> bool:
    return any((workdir / "checkpoints").glob("*.tmp"))


def metrics(workdir: pathlib.Path) -> list[dict]:
    """The lines of metrics without the one value that is of the clock."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [{k: v for k, v in json.loads(line).items() if k != "images_per_sec"} for line in lines]


def assert_same_run(straight: pathlib.Path, killed: pathlib.Path) -> int:
    """Compares all checkpoints, samples and metrics, and returns how many bytes of files were equal."""
    steps = [line["step"] for line in metrics(killed)]
    assert steps == sorted(set(steps))
    assert metrics(killed) == metrics(straight)
    compared = 0
    for folder in ("checkpoints", "samples"):
        files = sorted(path.name for path in (straight / folder).glob("*"))
        assert sorted(path.name for path in (killed / folder).glob("*")) == files
        for name in files:
            data = (straight / folder / name).read_bytes()
            assert (killed / folder / name).read_bytes() == data, f"{folder}/{name} differs"
            compared += len(data)
    assert compared
    return compared + (straight / "metrics.jsonl").stat().st_size
