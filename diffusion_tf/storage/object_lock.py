"""A lock on gs://: one process holds it, and a process that is dead loses it.

Of all processes that create the marker of the same folder, Google Cloud Storage lets one succeed, since TensorFlow asks it
to create an object whose generation is 0. The holders of a lock have numbers: `00000007/` is the marker of the seventh.
That process alone writes `00000007/HOST-PROCESS-*` every 20 seconds, and `00000007/released` at its end. The highest number
holds the lock until it is released, or until it is silent for 90 seconds by the store's clock. A holder of this machine
whose process has ended loses it at once.
"""

import contextlib
import os
import re
import threading
import time
from collections.abc import Iterator

from absl import logging

from diffusion_tf.errors import ConfigError, InputError
from diffusion_tf.storage import gfile
from diffusion_tf.storage.files import is_other_process, list_folder, process_name, remove, writing

_RELEASED = "released"
_NAME = re.compile(r"(.+)-(\d{1,9})-[0-9a-f]{8}")  # `process_name()`


class ObjectLock:
    """A lock on gs://.

    Args:
      workdir: what is locked, for messages.
      folder: the folder of the lock.
      beat_seconds: how often the holder shows that it is alive.
      silent_seconds: how long a holder is silent before it counts as dead.
    """

    def __init__(self, workdir: str, folder: str, *, beat_seconds: float = 20.0, silent_seconds: float = 90.0):
        self._workdir, self._folder = workdir, folder
        self._beat_seconds, self._silent_seconds = beat_seconds, silent_seconds
        self._number = 0
        self._end = threading.Event()
        self._lost_to: str | None = None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Holds the lock; waits for the end of a holder that may be dead.

        Raises:
          ConfigError: another process holds the lock.
          InputError: the folder cannot be written.
        """
        with writing(self._folder):
            self._take()
        thread = threading.Thread(target=self._beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._end.set()
            thread.join(self._beat_seconds)
            with contextlib.suppress(*gfile.file_errors()):  # the next holder waits
                _touch(self._path(self._number, _RELEASED))

    def check(self) -> None:
        """Raises InputError if another process has taken the lock, as it does when this one was silent too long."""
        if self._lost_to:
            raise InputError(
                f"{self._workdir} was taken over by {self._lost_to} while this process did not reach the store: the run"
                " goes on there"
            )

    def _take(self) -> None:
        while True:
            number = max(self._numbers(), default=0)
            if number and not self._is_free(number):
                self._wait_for_end(number)
            if gfile.create_marker(self._path(number + 1)):
                break
        self._number = number + 1
        _touch(self._path(self._number, process_name()))
        for older in self._numbers():
            if older < self._number:
                remove(self._path(older))

    def _is_free(self, number: int) -> bool:
        """Whether the holder released the lock, or is a process of this machine that has ended."""
        if _RELEASED in list_folder(self._path(number)):
            return True
        holder = self._holder(number)
        if not holder or holder[0] == process_name():
            return False
        return holder[1] == os.uname().nodename and not is_other_process(int(holder[2]))

    def _wait_for_end(self, number: int) -> None:
        """Returns when the holder has been silent for long; raises ConfigError if it is alive."""
        first = last = self._last_sign(number)
        now = self._store_time()
        if now - last < self._silent_seconds:
            logging.warning(
                "%s is locked by %s, seen %.0f seconds ago: waiting until it is seen again, or has been silent for %.0f"
                " seconds", self._workdir, self._described(number), now - last, self._silent_seconds,
            )  # fmt: skip
        while now - last < self._silent_seconds and not self._is_free(number):
            time.sleep(self._beat_seconds / 4)
            now, last = self._store_time(), self._last_sign(number)
            if last != first and not self._is_free(number):
                raise ConfigError(
                    "workdir",
                    f"={self._workdir} is in use by {self._described(number)}: wait for its end, or choose another workdir",
                )

    def _beat(self) -> None:
        """Shows that this process is alive, until it has lost the lock or ends."""
        while not self._end.wait(self._beat_seconds):
            with contextlib.suppress(InputError, *gfile.file_errors()):  # it tries again
                newest = max(self._numbers(), default=0)
                if newest > self._number:
                    self._lost_to = self._described(newest)
                    return
                _touch(self._path(self._number, process_name()))

    def _numbers(self) -> list[int]:
        return [int(name) for name in (name.rstrip("/") for name in list_folder(self._folder)) if name.isdecimal()]

    def _holder(self, number: int) -> re.Match[str] | None:
        """The name of the process with this number; None if it has not written it yet, or not any more."""
        return next(filter(None, map(_NAME.fullmatch, list_folder(self._path(number)))), None)

    def _described(self, number: int) -> str:
        holder = self._holder(number)
        return f"process {holder[2]} of {holder[1]}" if holder else "a process that is starting"

    def _last_sign(self, number: int) -> float:
        """When the holder last wrote, by the store's clock."""
        holder = self._holder(number)
        return gfile.modified(self._path(number, holder[0] if holder else ""))

    def _store_time(self) -> float:
        path = os.path.join(self._folder, f"clock-{process_name()}")
        _touch(path)
        now = gfile.modified(path)
        remove(path)
        return now

    def _path(self, number: int, *names: str) -> str:
        return os.path.join(self._folder, f"{number:08d}", *names)


def _touch(path: str) -> None:
    with gfile.open_binary(path, "xb") as file:
        file.write(b"")
