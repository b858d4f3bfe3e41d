"""Training: the step of Algorithm 1 (its optimiser is in train_state.py), and the loop around it."""

import dataclasses
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import tensorflow as tf
import tqdm

from diffusion_tf import figures
from diffusion_tf.diffusion_utils import x_to_images
from diffusion_tf.runtime.workers import is_multi_worker
from diffusion_tf.samplers import Sampler
from diffusion_tf.storage import checkpoints
from diffusion_tf.storage.files import write_file
from diffusion_tf.storage.workdir import Workdir
from diffusion_tf.trained_model import TrainedModel
from diffusion_tf.training.optimizer import warmed_up_learning_rate
from diffusion_tf.training.progress import Progress
from diffusion_tf.training.trainer import Trainer

_NUM_GRID_SAMPLES = 64


def samples_path(workdir: Workdir, step: int) -> str:
    """Where the grid of EMA samples of `step` lies."""
    return os.path.join(workdir.samples, f"step_{step:08d}.png")


def report_samples(workdir: Workdir, writer: tf.summary.SummaryWriter, step: int, samples: np.ndarray) -> None:
    """Shows EMA samples uint8 [N, H, W, C] of `step` in TensorBoard and as `samples/step_*.png`."""
    grid = figures.square_grid(samples)
    picture = figures.captioned_grids({f"EMA samples at step {step}": grid})
    write_file(samples_path(workdir, step), picture)
    with writer.as_default(step=step):
        tf.summary.image("ema_samples", grid[np.newaxis])
    writer.flush()


class Reporter:
    """What a run tells while it goes: progress bar, metrics.jsonl, TensorBoard, sample grids, checkpoints."""

    def __init__(self, trainer: Trainer, workdir: Workdir, step: int):
        self.trainer, self.workdir, self.preset = trainer, workdir, trainer.preset
        workdir.rewind_metrics(step)
        checkpoints.remove_unfinished(workdir.checkpoints)
        self.bar = tqdm.tqdm(initial=step, total=self.preset.num_steps, unit="step", desc=self.preset.dataset)
        self.writer = tf.summary.create_file_writer(workdir.tensorboard)
        self.sampler: Sampler | None = None
        # Digesting and writing a checkpoint takes seconds, in which the device can train on.
        self.executor = ThreadPoolExecutor(1)
        self.saving: Future[None] | None = None
        self.sound: set[int] = set()  # steps of checkpoints that this process has verified
        self.start(step)

    def start(self, step: int) -> None:
        """Begins, or begins again, with the checkpoint of `step`."""
        self.saved_step = step
        self.bar.update(step - self.bar.n)
        # A process may have died between the checkpoint and its samples.
        if step and self._is_time_to_sample(step) and not tf.io.gfile.exists(samples_path(self.workdir, step)):
            self._write_samples(step)
        self.last_report = step, time.monotonic()

    def report(self, step: int, metrics: dict[str, float], progress: Progress) -> None:
        """Reports the loop that ended at `step`, and saves and samples where it is time."""
        last_step, last_time = self.last_report
        metrics = {
            "step": step,
            **metrics,
            # The rate of the loop's last step, which had step - 1 steps before it.
            "learning_rate": float(
                warmed_up_learning_rate(self.preset.learning_rate, self.preset.warmup_steps, tf.constant(step - 1))
            ),
            "images_per_sec": (step - last_step) * self.preset.batch_size / (time.monotonic() - last_time),
        }
        self.workdir.append_metrics(metrics)
        with self.writer.as_default(step=step):
            for name, value in metrics.items():
                if name != "step":
                    tf.summary.scalar(name, value)
        self.bar.set_postfix_str(f"loss={metrics['loss']:.4f}, {metrics['images_per_sec']:.0f} images/s", refresh=False)
        self.bar.update(step - self.bar.n)
        if step % self.preset.checkpoint_every == 0 or step == self.preset.num_steps:
            self.save(step, progress)
        if self._is_time_to_sample(step):
            self._write_samples(step)
        self.last_report = step, time.monotonic()

    def close(self) -> None:
        """Ends the bar and the event file, and waits for the last checkpoint.

        Raises:
          InputError: it could not be written.
        """
        self.bar.close()
        self.writer.close()
        with self.executor:
            self.finish_saving()

    def save(self, step: int, progress: Progress) -> None:
        """Has a checkpoint written while training goes on, unless there is one of this step."""
        if step == self.saved_step:
            return
        self.finish_saving()
        manifest = {"config_sha256": self.preset.recipe_sha256(), "progress": dataclasses.asdict(progress)}
        self.saving = self.executor.submit(self._write_checkpoint, step, self.trainer.state.to_arrays(), manifest)
        self.saved_step = step
        self.writer.flush()

    def finish_saving(self) -> None:
        """Waits for the last checkpoint.

        Raises:
          InputError: it could not be written.
        """
        saving, self.saving = self.saving, None
        if saving:
            saving.result()

    def _write_checkpoint(self, step: int, arrays: dict[str, np.ndarray], manifest: dict[str, Any]) -> None:
        self.workdir.sync_metrics()
        checkpoints.save(self.workdir.checkpoints, step, arrays, manifest)
        self.sound.discard(step)  # a new file is verified before an old one goes
        checkpoints.remove_old(
            self.workdir.checkpoints,
            keep=self.preset.keep_checkpoints,
            keep_every=self.preset.keep_every,
            sound=self.sound,
        )

    def _is_time_to_sample(self, step: int) -> bool:
        return self.preset.sample_every > 0 and step % self.preset.sample_every == 0

    def _write_samples(self, step: int) -> None:
        trainer = self.trainer
        if self.sampler is None:
            # Of several processes only this one is here, so that it samples on its own.
            strategy = tf.distribute.get_strategy() if is_multi_worker(trainer.strategy) else trainer.strategy
            replicas = strategy.num_replicas_in_sync
            self.sampler = Sampler(
                TrainedModel(self.preset, strategy, trainer.state.model, trainer.state.ema),
                batch_size=-(-_NUM_GRID_SAMPLES // replicas) * replicas,
                seed=self.preset.seed,
            )
        report_samples(self.workdir, self.writer, step, x_to_images(self.sampler(0)[:_NUM_GRID_SAMPLES]).numpy())
