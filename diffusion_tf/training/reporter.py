"""Reports of a run: progress bar, metrics.jsonl, TensorBoard and grids of samples."""

import os
import time
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf
from absl import logging

from diffusion_tf import figures
from diffusion_tf.conditioning import UNGUIDED
from diffusion_tf.errors import NotFiniteError
from diffusion_tf.presets import Preset
from diffusion_tf.progress_bar import progress_bar
from diffusion_tf.storage import event_files
from diffusion_tf.storage.event_files import EventFile
from diffusion_tf.storage.files import write_file
from diffusion_tf.storage.workdir import Workdir

# Called as callback(step, metrics) after each line of metrics.jsonl, with the values of that line by name.
MetricsCallback = Callable[[int, dict[str, float]], None]


class Reporter:
    """Reports a run while it trains.

    Args:
      workdir: the run's folder.
      preset: says when to save and to sample.
      step: training steps taken so far; metrics of later steps are dropped.
      learning_rate: returns the learning rate of the training step with the given number of steps before it.
      draw: draws samples with the current EMA weights, uint8 [N, H, W, C], of every class in turn.
      save: saves a checkpoint of the current step.
      callbacks: called after each line of metrics, before the step is saved.
    """

    def __init__(
        self,
        workdir: Workdir,
        preset: Preset,
        step: int,
        *,
        learning_rate: Callable[[int], float],
        draw: Callable[[], np.ndarray],
        save: Callable[[], None],
        callbacks: Sequence[MetricsCallback] = (),
    ):
        self._workdir, self._preset = workdir, preset
        self._learning_rate, self._draw, self._save, self._callbacks = learning_rate, draw, save, callbacks
        self._bar = progress_bar(initial=step, total=preset.num_steps, unit="step", desc=preset.dataset)
        self._start(step)

    def start(self, step: int) -> None:
        """Starts again, from the checkpoint of `step`."""
        self._events.close()
        self._start(step)

    def _start(self, step: int) -> None:
        self._workdir.rewind_metrics(step)
        self._events = event_files.resume(self._workdir.tensorboard, step)
        self._bar.update(step - self._bar.n)
        # An earlier process may have stopped between the checkpoint and its samples.
        if step and self._is_time_to_sample(step) and not tf.io.gfile.exists(samples_path(self._workdir, step)):
            self._report_samples(step)
        self._start_clock(step)

    def report(self, step: int, metrics: dict[str, float]) -> None:
        """Reports the metrics of the steps up to `step`, and saves and samples when it is time."""
        seconds = time.monotonic() - self._clock_start
        metrics = {
            **metrics,
            "learning_rate": self._learning_rate(step - 1),
            "images_per_sec": (step - self._clock_step) * self._preset.batch_size / seconds,
        }
        self._workdir.append_metrics({"step": step, **metrics})
        self._events.scalars(step, metrics)
        self._bar.set_postfix_str(
            f"loss={metrics['loss']:.4f}, {metrics['images_per_sec']:.0f} images/s", refresh=False
        )
        self._bar.update(step - self._bar.n)
        for callback in self._callbacks:
            callback(step, metrics)
        if step % self._preset.checkpoint_every == 0 or step == self._preset.num_steps:
            self._save()
        if self._is_time_to_sample(step):
            self._report_samples(step)
        self._start_clock(step)

    def close(self) -> None:
        """Closes the progress bar and the event file."""
        self._bar.close()
        self._events.close()

    def _start_clock(self, step: int) -> None:
        """Restarts the measurement of images per second, which excludes saving and sampling."""
        self._clock_step, self._clock_start = step, time.monotonic()

    def _is_time_to_sample(self, step: int) -> bool:
        return self._preset.sample_every > 0 and step % self._preset.sample_every == 0

    def _report_samples(self, step: int) -> None:
        try:
            samples = self._draw()
        except NotFiniteError as error:
            logging.warning("no grid of samples at step %d: %s", step, error)
            return
        report_samples(self._workdir, self._events, step, samples, self._preset)


def samples_path(workdir: Workdir, step: int) -> str:
    """The path of the grid of EMA samples at `step`."""
    return os.path.join(workdir.samples, f"step_{step:08d}.png")


def report_samples(workdir: Workdir, events: EventFile, step: int, samples: np.ndarray, preset: Preset) -> None:
    """Writes a grid of EMA samples to `samples/step_*.png` and to TensorBoard; with classes, a row for each.

    Args:
      workdir: the run's folder.
      events: TensorBoard's event file.
      step: the training step of the EMA weights.
      samples: uint8 [N, H, W, C], of every class in turn.
      preset: the run's configuration.
    """
    caption, grid = f"EMA samples at step {step}", figures.square_grid(samples)
    if preset.num_classes:
        labels = UNGUIDED.resolve(preset).of_images(0, len(samples))
        grid, legend = figures.class_grid(samples, labels, workdir.read_classes())
        caption += f"\n{legend}"
    write_file(samples_path(workdir, step), figures.captioned_grids({caption: grid}))
    events.image(step, "ema_samples", grid)
