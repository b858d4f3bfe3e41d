"""The folder of a run: its configuration, its metrics, and the paths of everything else. Paths may be gs://."""

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from diffusion_tf.errors import ConfigError, InputError
from diffusion_tf.presets import Preset
from diffusion_tf.storage.files import (
    append_line,
    first_line,
    is_local,
    parse_json,
    read_file,
    read_json,
    sync,
    to_json,
    write_file,
    write_json,
)
from diffusion_tf.storage.records import Config, Evaluation, Metrics


class Workdir:
    """The folder of one run.

    It holds `config.json` (the resolved preset), `flags.txt` (the flags of the last command), `checkpoints/`,
    `metrics.jsonl`, `evaluations.jsonl`, `tensorboard/`, `samples/`, and `partial/` (finished batches of interrupted
    measurements).
    """

    def __init__(self, path: str):
        self.path = os.path.expanduser(path)
        self.checkpoints = os.path.join(self.path, "checkpoints")
        self.tensorboard = os.path.join(self.path, "tensorboard")
        self.samples = os.path.join(self.path, "samples")
        self.partial = os.path.join(self.path, "partial")
        self._config = os.path.join(self.path, "config.json")
        self._flags = os.path.join(self.path, "flags.txt")
        self._evaluations = os.path.join(self.path, "evaluations.jsonl")
        self._metrics = os.path.join(self.path, "metrics.jsonl")

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Creates the folder and locks it against other training processes; the lock ends with the process.

        There is no lock on gs://, where two processes in one folder overwrite each other's metrics.

        Raises:
          InputError: another process holds the lock, or the folder cannot be written.
        """
        if not is_local(self.path):
            yield
            return
        path = os.path.join(self.path, "lock")
        try:
            os.makedirs(self.path, exist_ok=True)
            file = open(path, "a+")  # noqa: SIM115 (closed below, with the lock)
        except OSError as error:
            raise InputError(f"cannot write {path} ({first_line(error)})") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.seek(0)
                raise ConfigError(
                    "workdir",
                    f"={self.path} is in use by process {file.read(20).strip() or '?'}: wait for its end, or"
                    " choose another workdir",
                ) from error
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            yield

    def refuse_other_run(self, preset: Preset, num_examples: int | None) -> None:
        """Checks that the folder is new, or holds a run of the same recipe and number of training images.

        Raises:
          ConfigError: the folder holds another run; the message names the fields that differ.
        """
        if not tf.io.gfile.exists(self._config):
            return
        there, num_examples_there = self._read_config()
        differences = preset.recipe_differences(there)
        if num_examples_there not in (None, num_examples):  # None: imported weights
            differences.append(f"num_examples: {num_examples} != {num_examples_there}")
        if differences:
            raise ConfigError(
                "workdir",
                f"={self.path} holds a run of another recipe ({'; '.join(differences)}, asked != there):"
                " repeat its flags or choose another workdir",
            )

    def write_config(self, preset: Preset, num_examples: int | None, flags: str) -> None:
        """Creates the folder and writes the configuration, the size of the training set (if known) and the flags.

        Raises:
          InputError: the folder holds another run, or cannot be written.
        """
        self.refuse_other_run(preset, num_examples)
        config = {**dataclasses.asdict(preset), "num_examples": num_examples}
        write_file(self._config, (json.dumps(config, indent=2) + "\n").encode())
        write_file(self._flags, flags.encode())

    def read_preset(self) -> Preset:
        """Returns the configuration of the run in this folder.

        Raises:
          InputError: the folder holds no run, or its configuration cannot be read.
        """
        if not tf.io.gfile.exists(self._config):
            raise ConfigError("workdir", f"={self.path} holds no run (no config.json): train one there first")
        return self._read_config()[0]

    def _read_config(self) -> tuple[Preset, int | None]:
        """Returns the preset and the number of training images, if known."""
        try:
            fields = read_json(self._config, Config)
            num_examples = fields.pop("num_examples")
            return Preset(**fields), num_examples
        except (InputError, TypeError) as error:
            raise InputError(f"{self._config} is not a configuration of this version ({first_line(error)})") from error

    def rewind_metrics(self, step: int) -> None:
        """Removes the metrics after `step`, which a run that resumes from there writes again."""
        if not tf.io.gfile.exists(self._metrics):
            return
        kept = [line for line, metrics in _parse_lines(self._metrics, Metrics) if metrics["step"] <= step]
        write_file(self._metrics, b"".join(kept))

    def sync_metrics(self) -> None:
        """Flushes `metrics.jsonl` to the disk: a resumed run relies on the lines before its checkpoint."""
        if tf.io.gfile.exists(self._metrics):
            sync(self._metrics)

    def write_divergence(self, step: int, evidence: dict[str, Any]) -> str:
        """Writes the evidence of a divergence before `step` to `divergence_*.json`, and returns its path."""
        path = os.path.join(self.path, f"divergence_{step:08d}.json")
        write_json(path, evidence)
        return path

    def read_metrics(self) -> list[dict[str, float]]:
        """Returns the lines of `metrics.jsonl`."""
        return _read_lines(self._metrics, Metrics)

    def read_evaluations(self) -> list[dict[str, Any]]:
        """Returns the lines of `evaluations.jsonl`."""
        return self.complete(_read_lines(self._evaluations, Evaluation))

    def complete(self, evaluations: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Returns evaluations with their sampler and compute dtype, which older versions did not record.

        They used ancestral sampling at first. Their compute dtype is taken to be the run's.
        """
        if all({"compute_dtype", "sampler", "sampler_steps"} <= evaluation.keys() for evaluation in evaluations):
            return evaluations
        preset = self.read_preset()
        ancestral = {"sampler": "ancestral", "sampler_steps": preset.num_timesteps, "compute_dtype": preset.precision}
        return [{**ancestral, **evaluation} for evaluation in evaluations]

    def append_evaluation(self, evaluation: dict[str, Any]) -> None:
        """Appends one line to `evaluations.jsonl`."""
        append_line(self._evaluations, to_json(evaluation))

    def append_metrics(self, metrics: dict[str, float]) -> None:
        """Appends one line to `metrics.jsonl`."""
        append_line(self._metrics, to_json(metrics))


def _read_lines(path: str, schema: type) -> list[dict[str, Any]]:
    """Returns the objects in a file of JSON lines; none if there is no file."""
    return [value for _, value in _parse_lines(path, schema)] if tf.io.gfile.exists(path) else []


def _parse_lines(path: str, schema: type) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yields each line and its object, without an incomplete last line, which a killed process leaves.

    Raises:
      DamagedFileError: a line is not an object of the type `schema`.
    """
    for number, line in enumerate(read_file(path).splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            return
        yield line, parse_json(line, schema, f"{path}, line {number},")
