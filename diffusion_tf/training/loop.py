"""Training: the step of Algorithm 1 (its optimiser is in train_state.py), and the loop around it."""

import contextlib
import dataclasses
import time

import numpy as np
import tensorflow as tf
from absl import logging

from diffusion_tf.data.source import READ_ERRORS, ImageSource
from diffusion_tf.errors import DivergedError, InputError, PreemptedError
from diffusion_tf.runtime.workers import any_worker, is_chief, is_multi_worker, several_workers
from diffusion_tf.storage import checkpoints
from diffusion_tf.storage.workdir import Workdir
from diffusion_tf.training.preemption import PreemptionNotice
from diffusion_tf.training.progress import Progress
from diffusion_tf.training.reporter import Reporter
from diffusion_tf.training.trainer import Trainer

_SECONDS_UNSEEN = 4.0  # on the device, at most: Compute Engine takes a machine 30 seconds after its notice


def train(trainer: Trainer, workdir: Workdir, source: ImageSource) -> None:
    """Trains up to `num_steps`, from the newest sound checkpoint of `workdir` where there is one.

    Raises:
      InputError: the checkpoint does not fit, the data cannot be read, or a file cannot be written.
      DivergedError: too many steps in a row were skipped, also after going back once.
      PreemptedError: the machine is wanted back; the run is saved.
    """
    preset, strategy = trainer.preset, trainer.strategy
    progress = _restore(trainer, workdir) or Progress()
    step = int(trainer.state.step.numpy())
    batches = trainer.batches(source, progress.data_order)
    reporter = Reporter(trainer, workdir, step) if is_chief(strategy) else None
    # Several processes must take the same steps between their meetings, however long those last.
    pace = preset.steps_per_loop if is_multi_worker(strategy) else 1
    closing = contextlib.closing(reporter) if reporter else contextlib.nullcontext()
    with PreemptionNotice() as notice, several_workers(strategy), closing:
        while step < preset.num_steps:
            start = time.monotonic()
            num_steps = min(pace, preset.steps_per_loop - step % preset.steps_per_loop, preset.num_steps - step)
            progress.sums = _run_steps(trainer, batches, num_steps, progress.sums, source)
            step += num_steps
            if progress.has_diverged(preset.max_skipped_steps):
                progress = _go_back(trainer, workdir, reporter, progress)
                step = int(trainer.state.step.numpy())
                batches = trainer.batches(source, progress.data_order)
                continue
            if not is_multi_worker(strategy):
                pace = _next_pace(pace, time.monotonic() - start)
            if step % preset.steps_per_loop == 0 or step == preset.num_steps:
                metrics = progress.take_metrics()
                if source.bad_records:
                    metrics["bad_records"] = source.bad_records
                if reporter:
                    reporter.report(step, metrics, progress)
            if any_worker(strategy, notice.reason is not None) and step < preset.num_steps:
                if reporter:
                    reporter.save(step, progress)
                    reporter.finish_saving()
                any_worker(strategy, True)  # none leaves before the file is whole
                raise PreemptedError(f"{notice.reason or 'another process'}: saved step {step}, run it again to go on")


def _next_pace(pace: int, seconds: float) -> int:
    """How many steps to take unseen, after `pace` took so long. It changes when one looks, and no value."""
    if seconds > _SECONDS_UNSEEN:
        return max(1, pace // 2)
    return 2 * pace if seconds < _SECONDS_UNSEEN / 2 else pace


def _restore(trainer: Trainer, workdir: Workdir) -> Progress | None:
    """Takes over the newest sound checkpoint; None where there is none."""
    path = checkpoints.restore_newest(workdir.checkpoints, trainer.state.restore)
    if path is None:
        return None
    manifest, ours = checkpoints.load_manifest(path), trainer.preset.recipe_sha256()
    if manifest.get("packages", checkpoints.PACKAGES) != checkpoints.PACKAGES:
        logging.warning("%s was written by %s: the run goes on, not bit for bit", path, manifest["packages"])
    if manifest.get("config_sha256", ours) != ours:
        logging.warning("%s is of another recipe than config.json, or of another version", path)
    return Progress.of_checkpoint(path)


def _go_back(trainer: Trainer, workdir: Workdir, reporter: "Reporter | None", progress: Progress) -> Progress:
    """Takes the run back to its last checkpoint, from where it goes on with the data in another order.

    Raises:
      DivergedError: it has gone back before, or there is no checkpoint.
    """
    preset, step = trainer.preset, int(trainer.state.step.numpy())
    first = (step - 1) // preset.steps_per_loop * preset.steps_per_loop
    what = f"the run diverged between steps {first} and {step}"
    if reporter:
        reporter.finish_saving()
        norms = {
            name: float(np.linalg.norm(array.astype(np.float64))) for name, array in trainer.state.to_arrays().items()
        }
        evidence = {
            "step": step,
            **dataclasses.asdict(progress),
            "norms": norms,
            "metrics": workdir.read_metrics()[-10:],
        }
        what += f" (see {workdir.write_divergence(step, evidence)})"
    any_worker(trainer.strategy, True)  # the last checkpoint is whole
    restored = None if progress.data_order else _restore(trainer, workdir)
    if restored is None:
        raise DivergedError(
            f"{what}: start again in another `workdir` with a learning rate below {preset.learning_rate}"
        )
    step = int(trainer.state.step.numpy())
    logging.warning("%s: going back to step %d, with the data in another order", what, step)
    if reporter:
        workdir.rewind_metrics(step)
        reporter.start(step)
    return dataclasses.replace(restored, data_order=1)


def _run_steps(
    trainer: Trainer, batches, num_steps: int, sums: dict[str, float], source: ImageSource
) -> dict[str, float]:
    before = {name: tf.constant(value) for name, value in sums.items()}
    try:
        after = trainer.run_steps(batches, tf.constant(num_steps), before)
        return {name: float(value) for name, value in after.items()}
    except READ_ERRORS as error:
        raise source.read_error(error) from error
    except tf.errors.ResourceExhaustedError as error:
        raise InputError("out of memory: a smaller `batch_size`, or more replicas, may fit") from error
