"""The training loop: steps, metrics, checkpoints, rollback after divergence, and preemption."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

from diffusion_tf.data import data_paths
from diffusion_tf.data.source import READ_ERRORS, ImageSource
from diffusion_tf.data_settings import PRESETS_OWN, DataSettings
from diffusion_tf.diffusion_utils import x_to_images
from diffusion_tf.errors import DivergedError, InputError, PreemptedError, StoppedError
from diffusion_tf.presets import Preset
from diffusion_tf.runtime.replicas import shared_batch_size
from diffusion_tf.runtime.slices import check_shared_paths, notice_servers
from diffusion_tf.runtime.workers import (
    any_worker,
    is_chief,
    is_multi_worker,
    lost_server,
    lost_worker_errors,
    slice_servers,
)
from diffusion_tf.samplers import Sampler
from diffusion_tf.storage import checkpoints
from diffusion_tf.storage.workdir import Workdir
from diffusion_tf.trained_model import TrainedModel
from diffusion_tf.training.checkpoint_writer import CheckpointWriter
from diffusion_tf.training.optimizer import warmed_up_learning_rate
from diffusion_tf.training.preemption import PreemptionNotice
from diffusion_tf.training.progress import Progress, restore_run
from diffusion_tf.training.reporter import MetricsCallback, Reporter
from diffusion_tf.training.state import InitialWeights
from diffusion_tf.training.trainer import Trainer

_NUM_GRID_SAMPLES = 64


def train(
    trainer: Trainer,
    workdir: Workdir,
    source: ImageSource,
    *,
    callbacks: Sequence[MetricsCallback] = (),
    max_call_seconds: float = 4.0,
    make_notice: Callable[[], contextlib.AbstractContextManager[PreemptionNotice]] | None = None,
    save_checkpoint: Callable[..., Any] = checkpoints.save,
) -> None:
    """Trains up to step `preset.num_steps`, from the newest sound checkpoint in `workdir` if there is one.

    Args:
      trainer: the compiled training step and its state.
      workdir: the run's folder.
      source: the training images.
      callbacks: each is called as `callback(step, metrics)` after each line of metrics.jsonl, in the chief only.
      max_call_seconds: how long the device may train between two looks at the preemption notice; one process adapts
        the number of steps per call to it. Compute Engine stops a machine 30 seconds after its notice.
      make_notice: makes the preemption notice to look at. Default: one for the machines that train.
      save_checkpoint: writes one checkpoint, with the signature of `checkpoints.save`.

    Raises:
      InputError: the checkpoint does not fit, the data cannot be read, or a file cannot be written.
      DivergedError: too many steps in a row were skipped, again after a rollback.
      PreemptedError: the machine is about to be taken away, or (StoppedError) the user stopped training; it is saved.
    """
    if make_notice is None:
        make_notice = functools.partial(PreemptionNotice, notice_servers(slice_servers(trainer.strategy)))
    with (
        make_notice() as notice,
        lost_worker_errors(trainer.strategy),
        contextlib.closing(_Loop(trainer, workdir, source, callbacks, save_checkpoint)) as loop,
    ):
        loop.run(notice, max_call_seconds)


def train_in_workdir(
    preset: Preset,
    strategy: tf.distribute.Strategy,
    source: ImageSource,
    path: str,
    *,
    command: str,
    data: DataSettings = PRESETS_OWN,
    initial: InitialWeights | None = None,
    callbacks: Sequence[MetricsCallback] = (),
    allow_recipe_change: bool = False,
) -> None:
    """Trains the run in a folder, new or of the same recipe, and locks the folder meanwhile.

    Args:
      preset: the configuration.
      strategy: where to train.
      source: the training images.
      path: the run's folder.
      command: what the user called, for flags.txt.
      data: where `source` was opened, for config.json.
      initial: the weights that a run without checkpoints starts with; default: random ones.
      callbacks: as for `train`.
      allow_recipe_change: whether the fields CHANGEABLE may differ from those of the run; config.json records it.

    Raises:
      ConfigError: the folder holds another run or is in use, or the preset cannot be trained on these images.
      InputError, DivergedError, PreemptedError: as `train`.
    """
    check_shared_paths(slice_servers(strategy), {"workdir": path, **data_paths(preset, data)})
    workdir = Workdir(path)
    classes = source.classes if preset.num_classes else ()
    if preset.num_classes:
        source.require_classes(preset.num_classes)
    workdir.refuse_other_run(
        preset, source.num_examples, classes=classes, data=data, allow_recipe_change=allow_recipe_change
    )
    trainer = Trainer(preset, strategy)
    with workdir.lock() if is_chief(strategy) else contextlib.nullcontext():
        if is_chief(strategy):
            step = max(checkpoints.all_steps(workdir.checkpoints), default=0)
            workdir.write_config(
                preset,
                source.num_examples,
                command,
                step=step,
                data=data,
                init_from={"path": initial.path, "sha256": initial.sha256} if initial else None,
                classes=classes,
                allow_recipe_change=allow_recipe_change,
            )
        if initial and not checkpoints.all_steps(workdir.checkpoints):
            trainer.state.start_from(initial)
            if is_chief(strategy):  # from now on the run does not need the source
                manifest = {"config_sha256": preset.recipe_sha256()}
                checkpoints.save(workdir.checkpoints, 0, trainer.state.to_arrays(), manifest)
        train(trainer, workdir, source, callbacks=callbacks)


class _Loop:
    """A run in this process. Only the chief has a `reporter` and a `writer`."""

    def __init__(
        self,
        trainer: Trainer,
        workdir: Workdir,
        source: ImageSource,
        callbacks: Sequence[MetricsCallback],
        save_checkpoint: Callable[..., Any],
    ):
        self.trainer, self.workdir, self.source = trainer, workdir, source
        self.preset, self.strategy = trainer.preset, trainer.strategy
        self.writer: CheckpointWriter | None = None
        self.reporter: Reporter | None = None
        self._start(_restore(trainer, workdir) or Progress())
        if is_chief(self.strategy):
            self.writer = CheckpointWriter(workdir, self.preset, save_checkpoint)
            self.reporter = Reporter(
                workdir,
                self.preset,
                self.step,
                learning_rate=self._learning_rate,
                draw=_grid_drawer(trainer),
                save=self._save,
                callbacks=callbacks,
            )

    def run(self, notice: PreemptionNotice, max_call_seconds: float) -> None:
        """Trains to the end; `train` documents the arguments and the errors."""
        preset, adaptive = self.preset, not is_multi_worker(self.strategy)
        # Several processes synchronize after each call, so they must all take the same number of steps in it.
        call_steps = 1 if adaptive else preset.steps_per_loop
        while self.step < preset.num_steps:
            start = time.monotonic()
            until_report = preset.steps_per_loop - self.step % preset.steps_per_loop
            self._run_steps(min(call_steps, until_report, preset.num_steps - self.step))
            if self.progress.has_diverged(preset.max_skipped_steps):
                self._roll_back()
                continue
            if adaptive:
                call_steps = _next_call_steps(call_steps, time.monotonic() - start, max_call_seconds)
            if self.step % preset.steps_per_loop == 0 or self.step == preset.num_steps:
                self._report()
            if any_worker(self.strategy, notice.reason is not None) and self.step < preset.num_steps:
                self._save_and_stop(notice.reason or "another process")

    def close(self) -> None:
        """Closes the reports, and waits for the last checkpoint.

        Raises:
          InputError: it could not be written.
        """
        if self.reporter:
            self.reporter.close()
        if self.writer:
            self.writer.close()

    def _start(self, progress: Progress) -> None:
        """Starts from the trainer's state, which a checkpoint holds unless its step is 0."""
        self.progress = progress
        self.step = self.saved_step = int(self.trainer.state.step.numpy())
        self.batches: Iterator[Any] = self.trainer.batches(self.source, progress.data_order)

    def _run_steps(self, num_steps: int) -> None:
        sums = {name: tf.constant(value) for name, value in self.progress.sums.items()}
        try:
            sums = self.trainer.run_steps(self.batches, tf.constant(num_steps), sums)
            self.progress.sums = {name: float(value) for name, value in sums.items()}
        except READ_ERRORS as error:
            if isinstance(error, tf.errors.OpError) and (lost := lost_server(slice_servers(self.strategy), error)):
                raise lost from error
            raise self.source.read_error(error) from error
        except tf.errors.ResourceExhaustedError as error:
            raise InputError("out of memory: a smaller `batch_size`, or more replicas, may fit") from error
        self.step += num_steps

    def _report(self) -> None:
        metrics = self.progress.take_metrics()
        if self.source.bad_records:
            metrics["bad_records"] = self.source.bad_records
        if self.reporter:
            self.reporter.report(self.step, metrics)

    def _save(self) -> None:
        """Starts writing a checkpoint of this step, unless there is one."""
        if self.writer and self.step != self.saved_step:
            manifest = {"config_sha256": self.preset.recipe_sha256(), "progress": dataclasses.asdict(self.progress)}
            self.writer.write(self.step, self.trainer.state.to_arrays(), manifest)
            self.saved_step = self.step

    def _wait_for_checkpoint(self) -> None:
        """Waits, in all processes, until the chief's last checkpoint is complete."""
        if self.writer:
            self.writer.wait()
        any_worker(self.strategy, True)

    def _save_and_stop(self, reason: str) -> None:
        self._save()
        self._wait_for_checkpoint()
        error = StoppedError if reason == "SIGINT" else PreemptedError
        raise error(f"{reason}: saved step {self.step}, run it again to go on")

    def _roll_back(self) -> None:
        """Restores the last checkpoint, from which the run continues with the data in another order.

        Raises:
          DivergedError: the run was rolled back before, or there is no checkpoint.
        """
        first = (self.step - 1) // self.preset.steps_per_loop * self.preset.steps_per_loop
        what = f"the run diverged between steps {first} and {self.step}"
        self._wait_for_checkpoint()
        if self.reporter:
            what += f" (see {self._write_evidence()})"
        restored = None if self.progress.data_order else _restore(self.trainer, self.workdir)
        if restored is None:
            raise DivergedError(
                f"{what}: start again in another `workdir` with a learning rate below {self.preset.learning_rate}"
            )
        self._start(dataclasses.replace(restored, data_order=1))
        logging.warning("%s: going back to step %d, with the data in another order", what, self.step)
        if self.reporter:
            self.reporter.start(self.step)

    def _write_evidence(self) -> str:
        """Writes what may explain the divergence to a JSON file, and returns its path."""
        arrays = self.trainer.state.to_arrays()
        evidence = {
            "step": self.step,
            **dataclasses.asdict(self.progress),
            "norms": {name: float(np.linalg.norm(array.astype(np.float64))) for name, array in arrays.items()},
            "metrics": self.workdir.read_metrics()[-10:],
        }
        return self.workdir.write_divergence(self.step, evidence)

    def _learning_rate(self, step: int) -> float:
        return float(warmed_up_learning_rate(self.preset.learning_rate, self.preset.warmup_steps, tf.constant(step)))


def _next_call_steps(call_steps: int, seconds: float, max_seconds: float) -> int:
    """The number of steps of the next call to the device, after `call_steps` took `seconds`.

    It decides when the loop looks at the notice, and never a value of the run.
    """
    if seconds > max_seconds:
        return max(1, call_steps // 2)
    return 2 * call_steps if seconds < max_seconds / 2 else call_steps


def _restore(trainer: Trainer, workdir: Workdir) -> Progress | None:
    """Restores the newest sound checkpoint, and returns its progress; None if there is no checkpoint."""
    return restore_run(workdir, trainer.preset, trainer.state.restore, checkpoints.packages())


def _grid_drawer(trainer: Trainer) -> Callable[[], np.ndarray]:
    """A function that draws the samples of a grid with the current EMA weights, uint8 [64, H, W, C]."""

    @functools.cache  # compile once, and only if the run samples at all
    def sampler() -> Sampler:
        # Only the chief draws, so several processes cannot share the work.
        strategy = tf.distribute.get_strategy() if is_multi_worker(trainer.strategy) else trainer.strategy
        return Sampler(
            TrainedModel(trainer.preset, strategy, trainer.state.model, trainer.state.ema),
            batch_size=shared_batch_size(_NUM_GRID_SAMPLES, strategy),
            seed=trainer.preset.seed,
        )

    return lambda: x_to_images(sampler()(0)[:_NUM_GRID_SAMPLES]).numpy()
