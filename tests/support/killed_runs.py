"""Training processes that are killed, and runs that are compared byte for byte."""

import json
import pathlib
import time

# Steps of milliseconds, saved again and again, so that a kill often meets a checkpoint half written. Mirrored replicas,
# even one, are not compiled by XLA, which would be most of such a short process.
TINY = (
    "--strategy=mirrored --steps_per_loop=5 --checkpoint_every=5 --keep_checkpoints=2 --keep_every=50 --sample_every=50"
    " --batch_size=8 --num_timesteps=4 --ch_mult=1 --dropout=0.1 --warmup_steps=5 --random_flip=True"
).split()


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
