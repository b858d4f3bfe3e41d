"""How time grows with what is asked for, on this device: `make scaling` draws it and writes JSON beside it.

The network is the digits preset's, at other sizes where the curve says so. Each point is the least of three timings,
and each curve is fitted by fixed + x slope, relative errors weighing the same everywhere. A larger image has more
levels, and each costs the fixed time; 8x8 is drawn and not fitted, as there the whole network is one program.
"""

import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import our_worker

from diffusion_tf.evaluation.metrics import frechet_distance
from diffusion_tf.likelihood import BoundEvaluator
from diffusion_tf.presets import get_preset
from diffusion_tf.runtime.replicas import cpu_backend
from diffusion_tf.runtime.strategies import make_strategy
from diffusion_tf.samplers import Sampler
from diffusion_tf.trained_model import TrainedModel

_FOLDER = pathlib.Path(__file__).parent.parent.parent / "build" / "bench"
_FEATURES = 2048  # Inception's


def seconds(call: Callable[[], object]) -> float:
    """Of a call that has been compiled; the least of three timings, each of at least a fifth of a second."""
    call()
    times = []
    for _ in range(3):
        start, count = time.perf_counter(), 0
        while not count or time.perf_counter() - start < 0.2:
            call()
            count += 1
        times.append((time.perf_counter() - start) / count)
    return min(times)


def training(**fields) -> float:
    """Seconds of a training step."""
    call, steps = our_worker.train(get_preset("digits", **fields), steps=4)
    return seconds(call) / steps


def training_at(image_size: int) -> float:
    """Seconds of a training step of one image, halved to 4x4: attention at the lowest level grows by pixels squared."""
    return training(image_size=image_size, batch_size=1, ch_mult=(1, *[2] * (levels_at(image_size) - 1)))


def levels_at(image_size: int) -> int:
    """Levels of the network that ends at 4x4."""
    return int(np.log2(image_size // 4)) + 1


def sampling(sampler: Sampler, images: int) -> float:
    """Seconds to sample `images` images, 64 at a time."""
    return seconds(lambda: [sampler(first).numpy() for first in range(0, images, 64)])


def likelihood(num_timesteps: int) -> float:
    """Seconds to measure the bound of 64 images."""
    trained = TrainedModel(get_preset("digits", num_timesteps=num_timesteps), make_strategy())
    evaluator = BoundEvaluator(trained, batch_size=64, seed=0)
    return seconds(lambda: evaluator(0, np.zeros((64, 8, 8, 1), np.uint8)))


def evaluation(num_samples: int) -> float:
    """Seconds to compute the Frechet distance between two sets of `num_samples` features."""
    random = np.random.RandomState(0)
    real, generated = (random.standard_normal((num_samples, _FEATURES)).astype(np.float32) for _ in range(2))
    return seconds(lambda: frechet_distance(real, generated))


class Curve(NamedTuple):
    """Title, what x is, the places, the measurement, and how many levels pay the fixed cost; 0: not on the line."""

    title: str
    what: str
    places: list[int]
    measure: Callable[[int], float]
    levels: list[int] | None = None


def curves() -> Iterable[Curve]:
    """What to measure."""
    sampler = Sampler(TrainedModel(get_preset("digits", num_timesteps=100), make_strategy()), batch_size=64, seed=0)
    batches, sizes = [1, 2, 4, 8, 16, 32, 64], [8, 16, 32, 64, 128, 256]
    yield Curve("training step, 32x32", "batch", batches, lambda batch: training(image_size=32, batch_size=batch))
    yield Curve(
        "training step, batch 1, levels down to 4x4",
        "pixels",
        [size**2 for size in sizes],
        lambda pixels: training_at(round(pixels**0.5)),
        [levels_at(size) if cpu_backend(size**2).cpu_graph else 0 for size in sizes],
    )
    yield Curve("sampling, T = 100", "images", [64, 128, 256, 512], lambda images: sampling(sampler, images))
    yield Curve("likelihood of 64 images", "T", [50, 100, 200, 400, 800], likelihood)
    yield Curve("Frechet distance, 2048 features", "samples", [2500, 5000, 10000, 20000], evaluation)


def fit(costs: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """(fixed, slope) of what is nearest to y, in relative terms, among costs fixed + x slope."""
    columns = np.stack([costs, x], axis=1) / y[:, None]
    fixed, slope = np.linalg.lstsq(columns, np.ones_like(x), rcond=None)[0]
    return float(fixed), float(slope)


def main() -> None:
    _FOLDER.mkdir(parents=True, exist_ok=True)
    records = []
    for title, what, places, measure, levels in curves():
        y = [measure(place) for place in places]
        costs, x = np.array(levels or [1] * len(places)), np.array(places, float)
        on = costs > 0
        fixed, slope = fit(costs[on], x[on], np.array(y)[on])
        line = np.where(on, costs * fixed + slope * x, np.nan)
        record = {"curve": title, "x": what, "places": places, "seconds": y, "fixed": fixed, "slope": slope}
        records.append({**record, "line": [None if np.isnan(value) else value for value in line]})
        each = " a level" if levels else ""
        off = np.nanmax(np.abs(line / y - 1))
        print(
            f"{title}: {1e3 * fixed:.2f} ms{each} + {1e3 * slope:.4g} ms a unit of {what}, off by {off:.0%} at most",
            flush=True,
        )
    (_FOLDER / "scaling.json").write_text(json.dumps(records, indent=2) + "\n")
    figure, axes = plt.subplots(1, len(records), figsize=(4 * len(records), 3.5), layout="constrained")
    for axis, record in zip(axes, records, strict=True):
        x, line = record["places"], np.array(record["line"], float)
        axis.loglog(x, record["seconds"], "o", x, line, "-")
        axis.set(title=record["curve"], xlabel=record["x"], ylabel="seconds")
    figure.savefig(_FOLDER / "scaling.png", dpi=120)
    print(_FOLDER / "scaling.png", file=sys.stderr)


if __name__ == "__main__":
    main()
