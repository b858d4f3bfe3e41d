"""A run's folder: its configuration, its metrics, and where everything else lies. Paths may be gs://."""

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from diffusion_tf.errors import ConfigError, DamagedFileError, InputError
from diffusion_tf.presets import Preset
from diffusion_tf.storage.files import (
    append_line,
    first_line,
    is_local,
    read_file,
    read_json,
    sync,
    to_json,
    write_file,
    write_json,
)


class Workdir:
    """The folder of one run.

    `config.json` (the resolved preset), `flags.txt` (of the last command), `checkpoints/`, `metrics.jsonl`,
    `evaluations.jsonl`, `tensorboard/`, `samples/`, `partial/` (of measurements: what an interrupted one has done).
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
        """Makes the folder and holds it against other processes that train in it; a dead process holds nothing.

        On gs:// there is no lock, and two processes in one folder undo each other's metrics.

        Raises:
          InputError: another process holds it, or the folder cannot be written.
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
        """Looks whether this folder is new, or holds a run of this recipe on as many training images.

        Raises:
          InputError: it holds another run; the differing fields are named.
        """
        if not tf.io.gfile.exists(self._config):
            return
        there, num_examples_there = self._read_config()
        differences = preset.recipe_differences(there)
        if num_examples_there not in (None, num_examples):  # None: weights from elsewhere
            differences.append(f"num_examples: {num_examples} != {num_examples_there}")
        if differences:
            raise ConfigError(
                "workdir",
                f"={self.path} holds a run of another recipe ({'; '.join(differences)}, asked != there):"
                " repeat its flags or choose another workdir",
            )

    def write_config(self, preset: Preset, num_examples: int | None, flags: str) -> None:
        """Makes the folder and records the configuration, the size of the training set (if known) and the flags.

        Raises:
          InputError: it holds another run, or cannot be written.
        """
        self.refuse_other_run(preset, num_examples)
        config = {**dataclasses.asdict(preset), "num_examples": num_examples}
        write_file(self._config, (json.dumps(config, indent=2) + "\n").encode())
        write_file(self._flags, flags.encode())

    def read_preset(self) -> Preset:
        """The configuration of the run that this folder holds.

        Raises:
          InputError: there is none, or it cannot be read.
        """
        if not tf.io.gfile.exists(self._config):
            raise ConfigError("workdir", f"={self.path} holds no run (no config.json): train one there first")
        return self._read_config()[0]

    def _read_config(self) -> tuple[Preset, int | None]:
        try:
            fields: dict[str, Any] = read_json(self._config)
            num_examples = fields.pop("num_examples")
            fields.update({name: tuple(value) for name, value in fields.items() if isinstance(value, list)})
            return Preset(**fields), num_examples
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise InputError(f"{self._config} is not a configuration of this version ({error})") from error

    def rewind_metrics(self, step: int) -> None:
        """Drops the metrics that a run wrote after the checkpoint of `step`, which it will now write again."""
        if not tf.io.gfile.exists(self._metrics):
            return
        kept = [line for line, metrics in _parse_lines(self._metrics) if metrics["step"] <= step]
        write_file(self._metrics, b"".join(kept))

    def sync_metrics(self) -> None:
        """Has the lines of metrics on the disk before a checkpoint that relies on them."""
        if tf.io.gfile.exists(self._metrics):
            sync(self._metrics)

    def write_divergence(self, step: int, evidence: dict[str, Any]) -> str:
        """Writes what was found when a run diverged before `step` to `divergence_*.json`, and returns its path."""
        path = os.path.join(self.path, f"divergence_{step:08d}.json")
        write_json(path, evidence)
        return path

    def read_metrics(self) -> list[dict[str, float]]:
        """The lines of `metrics.jsonl`."""
        return _read_lines(self._metrics)

    def read_evaluations(self) -> list[dict[str, Any]]:
        """The lines of `evaluations.jsonl`."""
        return [self.complete(line) for line in _read_lines(self._evaluations)]

    def complete(self, evaluation: dict[str, Any]) -> dict[str, Any]:
        """An evaluation as this version records it: one that names no sampler was made by ancestral sampling."""
        if "sampler" in evaluation:
            return evaluation
        return {**evaluation, "sampler": "ancestral", "sampler_steps": self.read_preset().num_timesteps}

    def append_evaluation(self, evaluation: dict[str, Any]) -> None:
        """Adds one line to `evaluations.jsonl`."""
        append_line(self._evaluations, to_json(evaluation))

    def append_metrics(self, metrics: dict[str, float]) -> None:
        """Adds one line to `metrics.jsonl`."""
        append_line(self._metrics, to_json(metrics))


def _read_lines(path: str) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON objects; none where there is no file."""
    return [value for _, value in _parse_lines(path)] if tf.io.gfile.exists(path) else []


def _parse_lines(path: str) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each line and what it says, but for a last one that a process died over.

    Raises:
      DamagedFileError: a line is no JSON object with a step.
    """
    for number, line in enumerate(read_file(path).splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            return
        try:
            value = json.loads(line)
            value["step"] + 0
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise DamagedFileError(f"{path} is damaged: line {number} is no JSON object with a step") from error
        yield line, value
