"""The training loop around an exported train_loop: as `training/loop.py`, under JAX and without TensorFlow.

It takes the images in the order of `train`, writes the same lines of metrics and the same checkpoints, and either
program goes on from those of the other. It draws no samples and writes nothing for TensorBoard. Of several processes
each reads its share of every batch, and the chief alone reads and writes the run's folder.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
from absl import logging

from diffusion_tf import __version__
from diffusion_tf.data.order import order_seed
from diffusion_tf.data.training_images import TrainingImages
from diffusion_tf.data_settings import DataSettings
from diffusion_tf.errors import DivergedError, PreemptedError, StoppedError
from diffusion_tf.interop.processes import any_process, are_several, from_chief, is_chief, require_same
from diffusion_tf.interop.train_loop import TrainLoop, memory_errors
from diffusion_tf.presets import Preset
from diffusion_tf.progress_bar import progress_bar
from diffusion_tf.storage import checkpoints
from diffusion_tf.storage.workdir import Workdir
from diffusion_tf.training.checkpoint_writer import CheckpointWriter
from diffusion_tf.training.preemption import PreemptionNotice
from diffusion_tf.training.progress import Progress, restore_run


def train_in_workdir(
    loop: TrainLoop,
    images: TrainingImages,
    path: str,
    *,
    preset: Preset,
    command: str,
    data: DataSettings,
    make_notice: Callable[[], contextlib.AbstractContextManager[PreemptionNotice]] = PreemptionNotice,
) -> None:
    """Trains the run in a folder, new or of the same recipe, up to step `preset.num_steps`, and locks the folder.

    Args:
      loop: the compiled program.
      images: the training images.
      path: the run's folder.
      preset: the recipe of the program; how often the run reports and saves may differ.
      command: what the user called, for flags.txt.
      data: where the images were read, for config.json.
      make_notice: makes the preemption notice, at which the loop looks after each call.

    Raises:
      ConfigError: the folder holds another run or is in use.
      InputError: a checkpoint does not fit, a file cannot be read or written, or the processes train different runs.
      DivergedError: too many steps in a row were skipped, again after a rollback.
      PreemptedError: the machine is about to be taken away, or (StoppedError) the user stopped training; it is saved.
    """
    workdir = Workdir(path)
    require_same({"program": loop.text_sha256, "recipe": preset, "images": images.shuffle})
    with contextlib.ExitStack() as stack:
        if is_chief():
            count, classes = images.shuffle.num_examples, images.classes if preset.num_classes else ()
            workdir.refuse_other_run(preset, count, classes=classes, data=data)
            stack.enter_context(workdir.lock())
            step = max(checkpoints.all_steps(workdir.checkpoints), default=0)
            workdir.write_config(
                preset, count, command, step=step, data=data, init_from=loop.init_from, classes=classes
            )
        notice = stack.enter_context(make_notice())
        stack.enter_context(memory_errors())
        stack.enter_context(contextlib.closing(_Run(loop, preset, images, workdir))).train(notice)


class _Run:
    """A run in this process, from its newest checkpoint or the export's weights on.

    Only the chief has a `writer` and a `bar`.
    """

    def __init__(self, loop: TrainLoop, preset: Preset, images: TrainingImages, workdir: Workdir):
        self.loop, self.preset, self.images, self.workdir = loop, preset, images, workdir
        self.versions = {"diffusion_tf": __version__, "jax": version("jax"), "numpy": np.__version__}
        save = functools.partial(checkpoints.save, written_by=self.versions)
        self.writer = CheckpointWriter(workdir, preset, save) if is_chief() else None
        progress = self._restore()
        if progress is None:
            loop.start()
            if are_several():  # their exports may hold other weights
                loop.share_state(from_chief)
            if loop.init_from and self.writer:  # `train` could not go on from these weights
                save(workdir.checkpoints, 0, loop.to_arrays(), {"config_sha256": preset.recipe_sha256()})
        self.bar = None
        if self.writer:
            self.bar = progress_bar(initial=loop.step, total=preset.num_steps, unit="step", desc=preset.dataset)
        self._start(progress or Progress())

    def train(self, notice: PreemptionNotice) -> None:
        """Trains to the end; `train_in_workdir` documents the errors."""
        preset = self.preset
        examples = self._examples()
        while self.step < preset.num_steps:
            count = self._steps_of_call()
            results = self.loop.run_steps(count, examples)
            self.step += count
            examples = self._examples()  # while the device computes
            loss, grad_norm, param_norm = (np.asarray(results[name]) for name in ("loss", "grad_norm", "param_norm"))
            self.progress.add(loss[:count], grad_norm[:count], float(param_norm))
            if self.progress.has_diverged(preset.max_skipped_steps):
                self._roll_back()
                examples = self._examples()
                continue
            if self.step % preset.steps_per_loop == 0 or self.step == preset.num_steps:
                self._report()
            if any_process(notice.reason is not None) and self.step < preset.num_steps:
                self._save()
                self._wait_for_checkpoint()
                reason = notice.reason or "another process"
                error = StoppedError if reason == "SIGINT" else PreemptedError
                raise error(f"{reason}: saved step {self.step}, run it again to go on")

    def close(self) -> None:
        """Closes the progress bar, and waits for the last checkpoint.

        Raises:
          InputError: it could not be written.
        """
        if self.bar is not None:
            self.bar.close()
        if self.writer:
            self.writer.close()

    def _restore(self) -> Progress | None:
        """Restores the newest sound checkpoint of the chief, and returns its progress; None if there is none."""
        progress = restore_run(self.workdir, self.preset, self.loop.restore, self.versions) if self.writer else None
        if not are_several():
            return progress
        found = from_chief(
            {"progress": (progress or Progress()).to_array(), "restored": np.array(progress is not None)}
        )
        if not found["restored"]:
            return None
        self.loop.share_state(from_chief)
        return Progress.from_array(found["progress"])

    def _start(self, progress: Progress) -> None:
        """Starts from the state of the loop."""
        self.progress = progress
        self.step = self.saved_step = self.loop.step
        if self.bar is not None:
            self.workdir.rewind_metrics(self.step)
            self.bar.update(self.step - self.bar.n)
        self._start_clock()

    def _start_clock(self) -> None:
        self.clock_step, self.clock_start = self.step, time.monotonic()

    def _steps_of_call(self) -> int:
        """The number of steps of the next call: it ends at the next line of metrics, if not before."""
        until_report = self.preset.steps_per_loop - self.step % self.preset.steps_per_loop
        return min(self.loop.steps_per_call, until_report, self.preset.num_steps - self.step)

    def _examples(self) -> dict[str, Any]:
        """The examples of the next call, on their way to the devices; none after the last."""
        if not (count := self._steps_of_call()):
            return {}
        loop, size = self.loop, self.preset.batch_size
        here = slice(loop.shares.start * size // loop.replicas, loop.shares.stop * size // loop.replicas)
        seed = order_seed(self.preset.seed, self.progress.data_order)
        indices = np.stack([self.images.shuffle.batch(size, seed, self.step + place)[here] for place in range(count)])
        images, labels = self.images.take(indices)
        examples = {"images": images} | ({"labels": labels} if self.preset.num_classes and labels is not None else {})
        rest = loop.steps_per_call - count  # which the call does not look at
        return loop.put(**{name: _padded(array, rest) for name, array in examples.items()})

    def _report(self) -> None:
        """Writes a line of metrics, and saves when it is time."""
        preset, seconds = self.preset, time.monotonic() - self.clock_start
        means = self.progress.take_metrics()
        if self.bar is None:
            return
        metrics = {
            **means,
            "learning_rate": _learning_rate(preset, self.step - 1),
            "images_per_sec": (self.step - self.clock_step) * preset.batch_size / seconds,
        }
        self.workdir.append_metrics({"step": self.step, **metrics})
        self.bar.set_postfix_str(f"loss={metrics['loss']:.4f}, {metrics['images_per_sec']:.0f} images/s", refresh=False)
        self.bar.update(self.step - self.bar.n)
        if self.step % preset.checkpoint_every == 0 or self.step == preset.num_steps:
            self._save()
        self._start_clock()

    def _save(self) -> None:
        """Starts writing a checkpoint of this step, unless there is one."""
        if self.writer and self.step != self.saved_step:
            manifest = {"config_sha256": self.preset.recipe_sha256(), "progress": dataclasses.asdict(self.progress)}
            self.writer.write(self.step, self.loop.to_arrays(), manifest)
            self.saved_step = self.step

    def _wait_for_checkpoint(self) -> None:
        """Waits, in all processes, until the chief's last checkpoint is complete."""
        if self.writer:
            self.writer.wait()
        any_process(True)

    def _roll_back(self) -> None:
        """Restores the last checkpoint, from which the run continues with the data in another order.

        Raises:
          DivergedError: the run was rolled back before, or there is no checkpoint.
        """
        what = f"the run diverged before step {self.step}"
        self._wait_for_checkpoint()
        restored = None if self.progress.data_order else self._restore()
        if restored is None:
            raise DivergedError(
                f"{what}: start again in another `workdir` with a learning rate below {self.preset.learning_rate}"
            )
        self._start(dataclasses.replace(restored, data_order=1))
        logging.warning("%s: going back to step %d, with the data in another order", what, self.step)


def _padded(array: np.ndarray, rows: int) -> np.ndarray:
    """An array with rows of zeros after it."""
    return np.concatenate([array, np.zeros((rows, *array.shape[1:]), array.dtype)]) if rows else array


def _learning_rate(preset: Preset, step: int) -> float:
    """The learning rate after `step` steps, in float32 as `warmed_up_learning_rate` computes it."""
    warmed_up = min(np.float32(step) / np.float32(preset.warmup_steps), np.float32(1)) if preset.warmup_steps else 1
    return float(np.float32(preset.learning_rate) * warmed_up)
