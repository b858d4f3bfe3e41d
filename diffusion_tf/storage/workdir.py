"""The folder of a run: its configuration, its metrics, and the paths of everything else. Paths may be gs://."""

import contextlib
import dataclasses
import fcntl
import io
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from diffusion_tf.data_settings import PRESETS_OWN, DataSettings
from diffusion_tf.errors import ConfigError, InputError
from diffusion_tf.presets import CHANGEABLE, Preset
from diffusion_tf.storage import gfile
from diffusion_tf.storage.files import (
    UNSUPPORTED,
    append_line,
    first_line,
    is_local,
    listed,
    read_file,
    sync,
    warn_once,
    write_file,
    writing,
)
from diffusion_tf.storage.json_files import parse_json, read_json, to_json, write_json
from diffusion_tf.storage.object_lock import ObjectLock
from diffusion_tf.storage.records import Config, Evaluation, Metrics


class _Config(NamedTuple):
    """What config.json holds.

    Attributes:
      preset: the configuration.
      num_examples: the number of training images; None: unknown.
      history: each change of the recipe: the step, and the old and new values by field.
      earlier: the configurations before each of these changes, the newest first.
      data: where the training images come from.
      init_from: the weights that the run started with: `path` and `sha256`; None: random ones.
      classes: the names of their classes, if the network is conditioned on them and if they are known.
    """

    preset: Preset
    num_examples: int | None
    history: list[dict[str, Any]]
    earlier: list[Preset]
    data: DataSettings
    init_from: dict[str, str] | None
    classes: tuple[str, ...]


def _earlier_recipes(preset: Preset, history: list[dict[str, Any]]) -> list[Preset]:
    earlier = []
    for entry in reversed(history):
        preset = dataclasses.replace(preset, **{name: change["old"] for name, change in entry["changes"].items()})
        earlier.append(preset)
    return earlier


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
        self._object_lock: ObjectLock | None = None

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Creates the folder and locks it against other training processes; the lock ends with the process.

        `object_lock.ObjectLock` locks folders on gs://. Other stores have no lock.

        Raises:
          InputError: another process holds the lock, or the folder cannot be written.
        """
        self._refuse_file()
        if not is_local(self.path):
            if self.path.startswith("gs://"):
                self._object_lock = ObjectLock(self.path)
            with self._object_lock.held() if self._object_lock else contextlib.nullcontext():
                yield
            return
        path = os.path.join(self.path, "lock")
        with writing(path):
            os.makedirs(self.path, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        with open(descriptor, "rb+", buffering=0) as file:
            with writing(path):
                self._take(file)
            yield

    def _refuse_file(self) -> None:
        """Raises ConfigError if the path is that of a file."""
        if gfile.exists(self.path) and not gfile.isdir(self.path):
            raise ConfigError("workdir", f"={self.path} is not a folder")

    def _take(self, file: io.FileIO) -> None:
        """Locks the open lock file and writes the number of this process into it."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                "workdir",
                f"={self.path} is in use by process {file.read(20).decode(errors='replace').strip() or '?'}: wait for"
                " its end, or choose another workdir",
            ) from error
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            warn_once(f"{self.path} cannot be locked ({error.strerror}): train there in one process at a time")
        file.truncate(0)
        file.write(f"{os.getpid()}\n".encode())

    def refuse_other_run(
        self,
        preset: Preset,
        num_examples: int | None,
        *,
        classes: Sequence[str] = (),
        data: DataSettings = PRESETS_OWN,
        allow_recipe_change: bool = False,
    ) -> None:
        """Checks that the folder is new, or holds a run of the same recipe, number of training images and classes.

        Args:
          preset: the configuration that is asked for.
          num_examples: the number of training images; None: unknown.
          classes: the names of their classes, if the network is conditioned on them.
          data: where the training images come from; pictures must be resized as before.
          allow_recipe_change: whether the fields CHANGEABLE may differ.

        Raises:
          ConfigError: the folder holds another run; the message names the fields that differ.
        """
        if not self.holds_run():
            return
        there = self._read_config()
        others = []
        if there.num_examples not in (None, num_examples):  # None: imported weights
            others.append(f"num_examples: {num_examples} != {there.num_examples}")
        if there.num_examples is not None and there.data.resize != data.resize:
            others.append(f"resize: {data.resize} != {there.data.resize}")
        if there.classes and there.classes != tuple(classes):
            others.append(f"classes: {listed(classes)} != {listed(there.classes)}")
        unchanged = dataclasses.replace(preset, **{name: getattr(there.preset, name) for name in CHANGEABLE})
        fixed = unchanged.recipe_differences(there.preset) + others
        differences = fixed if allow_recipe_change else preset.recipe_differences(there.preset) + others
        if not differences:
            return
        if not fixed:
            advice = "repeat its flags, choose another workdir, or allow the change by `allow_recipe_change`"
        elif allow_recipe_change:
            advice = f"only {', '.join(CHANGEABLE)} may change"
        else:
            advice = "repeat its flags or choose another workdir"
        raise ConfigError(
            "workdir",
            f"={self.path} holds a run of another recipe ({'; '.join(differences)}, asked != there): {advice}",
        )

    def write_config(
        self,
        preset: Preset,
        num_examples: int | None,
        flags: str,
        *,
        step: int = 0,
        data: DataSettings = PRESETS_OWN,
        init_from: dict[str, str] | None = None,
        classes: Sequence[str] = (),
        allow_recipe_change: bool = False,
    ) -> None:
        """Creates the folder and writes the configuration, the size of the training set (if known) and the flags.

        A change of the recipe is recorded in the list `history` of the configuration.

        Args:
          preset: the configuration.
          num_examples: the number of training images; None: unknown.
          flags: what the user called.
          step: the step from which the run goes on.
          data: where the training images come from, for measurements to find them.
          init_from: `path` and `sha256` of the weights that a new run starts with; None: random ones.
          classes: the names of their classes, if the network is conditioned on them.
          allow_recipe_change: whether the fields CHANGEABLE may differ from those of the run that is there.

        Raises:
          InputError: the folder holds another run, or cannot be written.
        """
        self.refuse_other_run(preset, num_examples, classes=classes, data=data, allow_recipe_change=allow_recipe_change)
        history = []
        if self.holds_run():
            there = self._read_config()
            history, init_from = there.history, there.init_from
            pairs = {name: (getattr(there.preset, name), getattr(preset, name)) for name in CHANGEABLE}
            changes = {name: {"old": old, "new": new} for name, (old, new) in pairs.items() if old != new}
            if changes:
                history.append({"step": step, "changes": changes})
        config = {**dataclasses.asdict(preset), "num_examples": num_examples}
        optional = {"history": history, "data": data.to_json(), "init_from": init_from, "classes": list(classes)}
        write_json(self._config, {**config, **{name: value for name, value in optional.items() if value}})
        write_file(self._flags, flags.encode())

    def holds_run(self) -> bool:
        """Whether the folder holds a run."""
        return gfile.exists(self._config)

    def earlier_recipes(self) -> list[Preset]:
        """Returns the configurations of this run before each recorded change of its recipe, the newest first."""
        return self._read_config().earlier if self.holds_run() else []

    def read_preset(self) -> Preset:
        """Returns the configuration of the run in this folder.

        Raises:
          InputError: the folder holds no run, or its configuration cannot be read.
        """
        self._refuse_file()
        if not self.holds_run():
            raise ConfigError("workdir", f"={self.path} holds no run (no config.json): train one there first")
        return self._read_config().preset

    def read_data(self) -> DataSettings:
        """Returns where the training images of the run in this folder come from; its preset must be readable."""
        return self._read_config().data

    def read_init_from(self) -> dict[str, str] | None:
        """Returns `path` and `sha256` of the weights that the run in this folder started with; None: random ones."""
        return self._read_config().init_from

    def read_classes(self) -> tuple[str, ...]:
        """Returns the names of the classes of a conditional run; none if they are unknown."""
        return self._read_config().classes

    def _read_config(self) -> _Config:
        try:
            fields = read_json(self._config, Config)
            num_examples, history = fields.pop("num_examples"), fields.pop("history", [])
            data, init_from = DataSettings(**fields.pop("data", {})), fields.pop("init_from", None)
            classes = tuple(fields.pop("classes", ()))
            preset = Preset(**fields)
            earlier = _earlier_recipes(preset, history)
            return _Config(preset, num_examples, history, earlier, data, init_from, classes)
        except (InputError, TypeError) as error:
            raise InputError(f"{self._config} is not a configuration of this version ({first_line(error)})") from error

    def rewind_metrics(self, step: int) -> None:
        """Removes the metrics after `step`, which a run that resumes from there writes again."""
        if not gfile.exists(self._metrics):
            return
        kept = [line for line, metrics in _parse_lines(self._metrics, Metrics) if metrics["step"] <= step]
        write_file(self._metrics, b"".join(kept))

    def sync_metrics(self) -> None:
        """Flushes `metrics.jsonl` to the disk: a resumed run relies on the lines before its checkpoint.

        Raises:
          InputError: it cannot be written, or another process has taken over this folder.
        """
        if self._object_lock:
            self._object_lock.check()
        if gfile.exists(self._metrics):
            with writing(self._metrics):
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
        """Appends one line to `metrics.jsonl`; raises InputError if another process has taken over this folder."""
        if self._object_lock:
            self._object_lock.check()
        append_line(self._metrics, to_json(metrics))


def _read_lines(path: str, schema: type) -> list[dict[str, Any]]:
    """Returns the objects in a file of JSON lines; none if there is no file."""
    return [value for _, value in _parse_lines(path, schema)] if gfile.exists(path) else []


def _parse_lines(path: str, schema: type) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yields each line and its object, without an incomplete last line, which a killed process leaves.

    Raises:
      DamagedFileError: a line is not an object of the type `schema`.
    """
    for number, line in enumerate(read_file(path).splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            return
        yield line, parse_json(line, schema, f"{path}, line {number},")
