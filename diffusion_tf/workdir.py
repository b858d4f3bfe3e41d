"""A run's folder: its configuration, its metrics, and where everything else lies. Paths may be gs://."""

import dataclasses
import json
import os
from typing import Any

import tensorflow as tf

from diffusion_tf.errors import InputError
from diffusion_tf.presets import Preset


def write_file(path: str, data: bytes) -> None:
    """Writes a file so that it is there with all of `data`, or not at all; makes its folder.

    Raises:
      InputError: the path cannot be written.
    """
    temporary = f"{path}.tmp"
    try:
        if os.path.dirname(path):
            tf.io.gfile.makedirs(os.path.dirname(path))
        with tf.io.gfile.GFile(temporary, "wb") as file:
            file.write(data)
        tf.io.gfile.rename(temporary, path, overwrite=True)
    except (tf.errors.OpError, OSError) as error:
        raise InputError(f"cannot write {path} ({str(error).splitlines()[0]})") from error


def read_file(path: str) -> bytes:
    """The contents of a file.

    Raises:
      InputError: it cannot be read.
    """
    try:
        with tf.io.gfile.GFile(path, "rb") as file:
            return file.read()
    except (tf.errors.OpError, OSError) as error:
        raise InputError(f"cannot read {path} ({str(error).splitlines()[0]})") from error


class Workdir:
    """The folder of one run.

    `config.json` (the resolved preset), `flags.txt` (the command), `checkpoints/`, `metrics.jsonl`, `tensorboard/`,
    `samples/`.
    """

    def __init__(self, path: str):
        self.path = os.path.expanduser(path)
        self.checkpoints = os.path.join(self.path, "checkpoints")
        self.tensorboard = os.path.join(self.path, "tensorboard")
        self.samples = os.path.join(self.path, "samples")
        self._config = os.path.join(self.path, "config.json")
        self._flags = os.path.join(self.path, "flags.txt")
        self._metrics = os.path.join(self.path, "metrics.jsonl")

    def prepare(self, preset: Preset, flags: str) -> None:
        """Makes the folder, or checks that it holds a run of the same recipe, and records configuration and flags.

        Raises:
          InputError: the folder cannot be written, or holds a run of another recipe (the fields are named).
        """
        if tf.io.gfile.exists(self._config):
            differences = preset.recipe_differences(self.read_preset())
            if differences:
                raise InputError(
                    f"--workdir={self.path} holds a run of another recipe ({'; '.join(differences)}, asked != there):"
                    " repeat its flags or choose another workdir"
                )
        write_file(self._config, (json.dumps(dataclasses.asdict(preset), indent=2) + "\n").encode())
        write_file(self._flags, flags.encode())

    def read_preset(self) -> Preset:
        """The configuration of the run that this folder holds.

        Raises:
          InputError: there is none, or it cannot be read.
        """
        if not tf.io.gfile.exists(self._config):
            raise InputError(f"--workdir={self.path} holds no run (no config.json): train one there first")
        try:
            fields: dict[str, Any] = json.loads(read_file(self._config))
            fields.update({name: tuple(value) for name, value in fields.items() if isinstance(value, list)})
            return Preset(**fields)
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{self._config} is not a configuration of this version ({error})") from error

    def rewind_metrics(self, step: int) -> None:
        """Drops the metrics that a run wrote after the checkpoint of `step`, which it will now write again."""
        if not tf.io.gfile.exists(self._metrics):
            return
        lines = read_file(self._metrics).splitlines(keepends=True)
        kept = [line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] <= step]
        write_file(self._metrics, b"".join(kept))

    def append_metrics(self, metrics: dict[str, float]) -> None:
        """Adds one line to `metrics.jsonl`."""
        with tf.io.gfile.GFile(self._metrics, "a") as file:
            file.write(json.dumps(metrics) + "\n")
