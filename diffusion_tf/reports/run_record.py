"""The results in a run's folder, as training and the measurements left them."""

import dataclasses
import fnmatch
import math
import os
from typing import Any

import tensorflow as tf

from diffusion_tf.data.pictures import decode_picture
from diffusion_tf.errors import DamagedFileError, InputError
from diffusion_tf.storage.files import list_folder, read_file
from diffusion_tf.storage.json_files import read_json
from diffusion_tf.storage.records import Compression, Likelihood, Neighbors, RateDistortion
from diffusion_tf.storage.workdir import Workdir

_SPLITS = ("train", "test")
_SETTINGS = ("ddim_eta", "guidance")  # numbers in an evaluation that are no scores


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """The results of a run; empty or None where nothing was measured.

    Attributes:
      config: the preset's fields.
      metrics: the lines of metrics.jsonl, oldest first.
      likelihood: what `experiments.likelihood` wrote for each split.
      rate_distortion: what `experiments.rate_distortion` wrote for each split.
      compression: what `experiments.compress` wrote for each split.
      evaluations: the lines of evaluations.jsonl, oldest first.
      neighbors: what `experiments.neighbors` wrote; empty if it did not run.
      samples: path of the newest grid of samples.
      reconstructions: path of a picture of what prefixes of compressed files show.
    """

    config: dict[str, Any]
    metrics: list[dict[str, float]]
    likelihood: dict[str, dict[str, Any]]
    rate_distortion: dict[str, dict[str, Any]]
    compression: dict[str, dict[str, Any]]
    evaluations: list[dict[str, Any]]
    neighbors: dict[str, Any]
    samples: str | None
    reconstructions: str | None

    def is_algorithm_2(self, evaluation: dict[str, Any]) -> bool:
        """Whether the samples of an evaluation are as the paper's: all T ancestral steps, clipped, unguided."""
        steps = evaluation["sampler"], evaluation["sampler_steps"]
        changed = evaluation.get("guidance") or "clip_sample" in evaluation
        return steps == ("ancestral", self.config["num_timesteps"]) and not changed

    def best_fid(self) -> dict[str, Any]:
        """The evaluation that stands beside the paper's FID; empty if there is none.

        Among the evaluations of Algorithm 2 against training images it takes those with the most samples, and of these
        the one with the lowest FID.
        """
        candidates = [
            line
            for line in self.evaluations
            if scores(line).get("fid") and line["reference"].get("split") == "train" and self.is_algorithm_2(line)
        ]
        return min(candidates, key=lambda line: (-line["num_samples"], line["fid"]), default={})


def scores(evaluation: dict[str, Any]) -> dict[str, float]:
    """The entries of an evaluation that are scores."""
    return {name: v for name, v in evaluation.items() if isinstance(v, float) and name not in _SETTINGS}


def reference_name(evaluation: dict[str, Any]) -> str:
    """The real images of an evaluation, such as "50,000 of cifar10, train", or the file of their statistics."""
    reference = evaluation["reference"]
    images = reference.get("images") or reference.get("file", "?")
    return f"{reference['num_images']:,} of {images}" if "num_images" in reference else f"statistics of {images}"


def read_run(workdir: Workdir) -> RunRecord:
    """Collects the results in `workdir`.

    Raises:
      InputError: the folder holds no run, or a file in it is damaged.
    """
    config = dataclasses.asdict(workdir.read_preset())

    def by_split(name: str, schema: type) -> dict[str, dict[str, Any]]:
        paths = {split: os.path.join(workdir.path, f"{name}_{split}.json") for split in _SPLITS}
        return {split: read_json(path, schema) for split, path in paths.items() if tf.io.gfile.exists(path)}

    neighbors = os.path.join(workdir.path, "neighbors.json")

    def last(folder: str, pattern: str) -> str | None:
        names = fnmatch.filter(list_folder(folder), pattern)
        if not names:
            return None
        path = os.path.join(folder, max(names))
        _check_picture(path)
        return path

    return RunRecord(
        config=config,
        metrics=[_numbers(line) for line in workdir.read_metrics()],
        likelihood=by_split("likelihood", Likelihood),
        rate_distortion=by_split("rate_distortion", RateDistortion),
        compression=by_split("compression", Compression),
        evaluations=workdir.read_evaluations(),
        neighbors=read_json(neighbors, Neighbors) if tf.io.gfile.exists(neighbors) else {},
        samples=last(workdir.samples, "step_*.png"),
        reconstructions=last(workdir.path, "compression_*.png"),
    )


def _numbers(line: dict[str, Any]) -> dict[str, float]:
    """The numbers in a line of metrics; null, which stands for what is not finite, and a missing loss become NaN."""
    numbers = {name: math.nan if v is None else v for name, v in line.items() if isinstance(v, int | float | None)}
    return {"loss": math.nan, "grad_norm": math.nan, **numbers}


def _check_picture(path: str) -> None:
    """Raises DamagedFileError unless the file at `path` is a picture."""
    try:
        decode_picture(read_file(path), channels=3)
    except InputError as error:
        raise DamagedFileError(f"{path} is not a picture, or is damaged ({error}): remove it") from error
