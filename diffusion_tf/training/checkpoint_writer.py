"""Writes a run's checkpoints in a thread of its own."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from diffusion_tf.presets import Preset
from diffusion_tf.storage import checkpoints
from diffusion_tf.storage.workdir import Workdir


class CheckpointWriter:
    """Writes checkpoints while the device trains on: hashing and writing one takes seconds.

    Args:
      workdir: the run's folder.
      preset: says which checkpoints to keep.
      save: writes one checkpoint, with the signature of `checkpoints.save`.
    """

    def __init__(self, workdir: Workdir, preset: Preset, save: Callable[..., Any] = checkpoints.save):
        self._workdir, self._preset, self._save = workdir, preset, save
        self._executor = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None
        self._sound: set[int] = set()  # steps of the checkpoints that this process has verified
        checkpoints.remove_unfinished(workdir.checkpoints)

    def write(self, step: int, arrays: dict[str, np.ndarray], manifest: dict[str, Any]) -> None:
        """Starts writing the checkpoint of `step`, after the one before is complete.

        Raises:
          InputError: the one before could not be written.
        """
        self.wait()
        self._pending = self._executor.submit(self._write, step, arrays, manifest)

    def wait(self) -> None:
        """Waits until the last checkpoint is complete.

        Raises:
          InputError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def close(self) -> None:
        """Waits as `wait` does, and ends the thread."""
        with self._executor:
            self.wait()

    def _write(self, step: int, arrays: dict[str, np.ndarray], manifest: dict[str, Any]) -> None:
        self._workdir.sync_metrics()
        self._save(self._workdir.checkpoints, step, arrays, manifest)
        self._sound.discard(step)  # verify the new file before an old one is removed
        checkpoints.remove_old(
            self._workdir.checkpoints,
            keep=self._preset.keep_checkpoints,
            keep_every=self._preset.keep_every,
            sound=self._sound,
        )
