"""How good the samples of a run are, by sampler, setting and number of steps.

  python tests/benchmarks/samplers.py --workdir=runs/digits --out=digits.jsonl --num_samples=1000 --batch_size=250
  python tests/benchmarks/samplers.py --workdir=runs/cifar10 --npz=test.npz --out=cifar10.jsonl --num_samples=512

Each pair of a setting and a number of steps adds a line to --out. The same command continues after an interruption:
it keeps finished lines, and finished batches in --out.parts. Samples of the same --seed start from the same noise in
every line, so differences of two lines are more certain than their errors say.

A line holds, with standard errors by the jackknife over pictures:
  hf: RMS difference of vertical neighbours, in [0, 255]; noise that is left raises it, blur lowers it.
  std: standard deviation over all pixels of all pictures, in [0, 255].
  saturated: share of values at 0 or 255.
  spectrum_db: RMS difference of the radial power spectra of samples and pictures, in decibels.
  frechet_8x8: Frechet distance of the pictures averaged to 8x8. Compare equal --num_samples only.
  precision, recall: in pixels (k = 3), from 100 samples on.
The first line is that of the pictures themselves. They are those of --npz, else the run's training images.
"""

import argparse
import functools
import json
import pathlib
import re
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from diffusion_tf.calibration import calibrated, measure_calibration
from diffusion_tf.data import open_source
from diffusion_tf.data.source import ImageReader
from diffusion_tf.evaluation.metrics import frechet_distance, precision_recall
from diffusion_tf.runtime.strategies import make_strategy
from diffusion_tf.samplers import Sampler
from diffusion_tf.solvers import SamplerSettings
from diffusion_tf.storage import checkpoints
from diffusion_tf.storage.resumable import ResumableBatches
from diffusion_tf.storage.workdir import Workdir
from diffusion_tf.trained_model import TrainedModel

_LEAST_FOR_PRECISION = 100
_CALIBRATION_VALUES = 2**16  # pixels times channels, over all pictures
_MAX_REAL = 5000
# Settings by what a line calls them; "calibrated" scales eps by its measured calibration.
CANDIDATES: dict[str, dict[str, Any]] = {
    "ancestral": {"name": "ancestral"},
    "ddim": {"name": "ddim"},
    "ddim, clipped eps": {"name": "ddim", "use_clipped_model_output": True},
    "ddim, eta 1": {"name": "ddim", "eta": 1.0, "use_clipped_model_output": True},
    "ddim, dynamic": {"name": "ddim", "clip_sample": "dynamic"},
    "ddim, not clipped": {"name": "ddim", "clip_sample": "none"},
    "dpm_solver++": {"name": "dpm_solver++"},
    "dpm_solver++, predicted eps": {"name": "dpm_solver++", "use_clipped_model_output": False},
    "dpm_solver++, dynamic": {"name": "dpm_solver++", "clip_sample": "dynamic"},
    "sde_dpm_solver++": {"name": "sde_dpm_solver++"},
    "sde_dpm_solver++, predicted eps": {"name": "sde_dpm_solver++", "use_clipped_model_output": False},
    "sde_dpm_solver++, logsnr": {"name": "sde_dpm_solver++", "spacing": "logsnr"},
    "heun": {"name": "heun"},
    "ddim, calibrated": {"name": "ddim"},
    "dpm_solver++, calibrated": {"name": "dpm_solver++"},
    "sde_dpm_solver++, calibrated": {"name": "sde_dpm_solver++"},
    "heun, calibrated": {"name": "heun"},
}


def jackknife(moments: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float]:
    """A statistic of the mean of moments [N, K] over pictures, and its standard error."""
    count, total = len(moments), moments.sum(axis=0)
    without = np.array([statistic((total - row) / (count - 1)) for row in moments])
    return float(statistic(total / count)), float(
        np.sqrt((count - 1) / count * np.square(without - without.mean()).sum())
    )


def power_spectrum(images: np.ndarray) -> np.ndarray:
    """Mean power of pictures [N, H, W, C] by distance from frequency 0, without 0 itself, [K]."""
    power = np.square(np.abs(np.fft.fft2(images, axes=(1, 2)))).mean(axis=(0, 3))
    frequencies = [np.fft.fftfreq(size) * size for size in power.shape]
    radius = np.round(np.hypot(*np.meshgrid(*frequencies, indexing="ij"))).astype(int)
    sums = np.bincount(radius.ravel(), power.ravel()) / np.bincount(radius.ravel())
    return sums[1 : min(power.shape) // 2 + 1]


def averaged(images: np.ndarray) -> np.ndarray:
    """Pictures [N, H, W, C], averaged to 8x8 where their sides are multiples of 8, as [N, 64 C]."""
    count, height, width, channels = images.shape
    blocks = images.reshape(count, 8, height // 8, 8, width // 8, channels)
    return blocks.mean(axis=(2, 4)).reshape(count, -1)


def scores(images: np.ndarray, real: np.ndarray) -> dict[str, float | list[float]]:
    """What a line says of images uint8 [N, H, W, C] beside `real`."""
    x = images.astype(np.float64)
    moments = np.stack(
        [np.square(np.diff(x, axis=1)).mean(axis=(1, 2, 3)), x.mean(axis=(1, 2, 3)), np.square(x).mean(axis=(1, 2, 3))],
        axis=1,
    )
    result: dict[str, float | list[float]] = {
        "hf": list(jackknife(moments, lambda m: np.sqrt(m[0]))),
        "std": list(jackknife(moments, lambda m: np.sqrt(m[2] - m[1] ** 2))),
        "saturated": float(np.isin(images, (0, 255)).mean()),
        "spectrum_db": float(
            np.sqrt(np.square(10.0 * np.log10(power_spectrum(x) / power_spectrum(real.astype(np.float64)))).mean())
        ),
        "frechet_8x8": frechet_distance(averaged(real.astype(np.float64)), averaged(x)),
    }
    if len(images) >= _LEAST_FOR_PRECISION:
        flat = (array.reshape(len(array), -1).astype(np.float64) for array in (real, images))
        result |= dict(zip(("precision", "recall"), precision_recall(*flat, k=3), strict=True))
    return result


def read_pictures(args: argparse.Namespace, workdir: Workdir) -> np.ndarray:
    """The pictures to compare with, uint8 [N, H, W, C], in random order, as a file may be sorted by class."""
    if args.npz:
        with np.load(args.npz) as arrays:
            pictures = arrays["images"]
    else:
        source = open_source(workdir.read_preset(), "train", workdir.read_data())
        pictures = np.asarray(ImageReader(source)(0, source.num_examples))
    return np.random.RandomState(0).permutation(pictures)


def calibrated_on(trained: TrainedModel, pictures: np.ndarray, args: argparse.Namespace) -> TrainedModel:
    """The model, calibrated on the first pictures."""
    last = trained.diffusion.num_timesteps - 1
    calibration = measure_calibration(
        trained,
        pictures[: max(16, _CALIBRATION_VALUES // pictures[0].size)],
        timesteps=np.unique(np.round(last * np.linspace(0.0, 1.0, 12) ** 2).astype(int)).tolist(),
        seed=args.seed,
        batch_size=args.batch_size,
    )
    return calibrated(trained, calibration)


def add_line(path: pathlib.Path, line: dict[str, Any]) -> None:
    """Adds a line to a file, and prints it."""
    text = json.dumps(line)
    with path.open("a") as file:
        file.write(text + "\n")
    print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="the run's folder")
    parser.add_argument("--out", required=True, type=pathlib.Path, help="the file of lines, which may be there")
    parser.add_argument("--npz", help="a file of `images`, uint8 [N, H, W, C]; default: the run's training images")
    parser.add_argument("--num_samples", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", default="10,20,50,100", help="numbers of steps, separated by commas")
    parser.add_argument("--only", default=".", help="regex of the candidates, such as '^sde|heun'; default: all")
    args = parser.parse_args()

    workdir = Workdir(args.workdir)
    pictures = read_pictures(args, workdir)
    _, path = checkpoints.find(workdir.checkpoints, None)
    trained = TrainedModel.from_checkpoint(workdir.read_preset(), make_strategy("auto"), path)
    scaled = functools.cache(lambda: calibrated_on(trained, pictures, args))  # measured if a candidate needs it
    subject = {"checkpoint": checkpoints.load_digest(path), "num_samples": args.num_samples, "seed": args.seed}
    lines = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    done = {(line["candidate"], line["steps"]) for line in lines if line.items() >= subject.items()}
    if ("pictures", 0) not in done:
        chosen = pictures[-args.num_samples :]
        add_line(args.out, {"candidate": "pictures", "steps": 0, **subject, **scores(chosen, pictures[:_MAX_REAL])})
    for steps in map(int, args.steps.split(",")):
        for name, fields in CANDIDATES.items():
            if (name, steps) in done or not re.search(args.only, name):
                continue
            settings = SamplerSettings(**fields, steps=steps)
            model = scaled() if "calibrated" in name else trained
            sampler = Sampler(model, batch_size=args.batch_size, seed=args.seed, settings=settings)
            batches = ResumableBatches(
                f"{args.out}.parts", {"candidate": name, "steps": steps, **subject},
                num_examples=args.num_samples, batch_size=args.batch_size,
            )  # fmt: skip
            start = time.perf_counter()
            drawn = list(batches.compute(lambda i, n, s=sampler: {"samples": s.images(i, n)}, f"{name}, {steps} steps"))
            seconds = round(time.perf_counter() - start, 1)
            images = np.concatenate([batch["samples"] for batch in drawn])
            line = {"candidate": name, "steps": steps, **subject, **scores(images, pictures[:_MAX_REAL])}
            add_line(args.out, {**line, "seconds": seconds})
            batches.remove()


if __name__ == "__main__":
    main()
