"""Training processes to kill, and the comparison of runs byte for byte."""

import json
import pathlib
import time
from collections.abc import Callable

# Steps take milliseconds and checkpoints are frequent, so a kill often leaves a half-written checkpoint. The mirrored
# strategy is not compiled by XLA, which would take most of the time of so short a process.
TINY = (
    "--strategy=mirrored --steps_per_loop=5 --checkpoint_every=5 --keep_checkpoints=2 --keep_every=50 --sample_every=50"
    " --batch_size=8 --num_timesteps=4 --ch_mult=1 --dropout=0.1 --warmup_steps=5 --random_flip=True"
).split()


def wait_for(condition: Callable[[], bool], seconds: float = 300.0) -> None:
    """Waits until `condition()` is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"the condition is still false after {seconds:.0f} s"
        time.sleep(0.001)


def is_saving(workdir: pathlib.Path) -> bool:
    """Whether a checkpoint is half written."""
    return any((workdir / "checkpoints").glob("*.tmp"))


def metrics(workdir: pathlib.Path) -> list[dict]:
    """The lines of metrics without the one value that depends on the clock."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [{k: v for k, v in json.loads(line).items() if k != "images_per_sec"} for line in lines]


def assert_same_run(straight: pathlib.Path, killed: pathlib.Path) -> int:
    """Asserts that checkpoints, samples and metrics are equal, and returns their number of bytes."""
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
