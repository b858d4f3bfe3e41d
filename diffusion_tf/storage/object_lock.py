"""A lock on gs://: one process holds it, and a process that is dead loses it.

TensorFlow's client cannot make a request depend on an object's generation. The lock needs only what Google Cloud
Storage promises of every request: a list holds whatever was written before it. A process writes its claim,
`locks/TERM-HOST-PROCESS-*`, then lists the claims, and holds the lock if no other process that lives has one; of two
processes, the one that lists last sees the other. The holder writes its claim again every 20 seconds, and removes it at
its end. A process that is silent for 90 seconds by the store's clock is dead; one of this machine is dead when it has
ended. Whoever follows a dead process removes its claim and has a higher term, which ends the run of a process that was
only silent.
"""

import contextlib
import os
import random
import re
import threading
import time
from collections.abc import Iterator

from absl import logging

from diffusion_tf.errors import ConfigError, InputError
from diffusion_tf.storage import gfile
from diffusion_tf.storage.files import is_other_process, list_folder, process_name, remove, writing

_CLAIM = re.compile(r"(\d{8,})-(.+)-(\d{1,9})-[0-9a-f]{8}")  # the term and `process_name()`


class ObjectLock:
    """A lock on gs://.

    Args:
      workdir: the folder to lock.
      beat_seconds: how often the holder writes its claim.
      silent_seconds: how old the claim of a dead process is.
    """

    def __init__(self, workdir: str, *, beat_seconds: float = 20.0, silent_seconds: float = 90.0):
        self._workdir, self._folder = workdir, os.path.join(workdir, "locks")
        self._beat_seconds, self._silent_seconds = beat_seconds, silent_seconds
        self._claim = ""
        self._end = threading.Event()
        self._lost_to: str | None = None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Holds the lock; first waits for the end of a holder that may be dead.

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
            with contextlib.suppress(*gfile.file_errors()):  # then the next holder waits
                remove(self._path(self._claim))

    def check(self) -> None:
        """Raises InputError if another process has taken the lock, as it does when this one was silent too long."""
        if self._lost_to:
            raise InputError(
                f"{self._workdir} was taken over by {self._lost_to} while this process did not reach it: the run goes"
                " on there"
            )

    def _take(self) -> None:
        while True:
            term = self._wait_until_free() + 1
            self._claim = f"{term:08d}-{process_name()}"
            self._write(self._claim)
            if not self._living(self._claims()):
                return
            remove(self._path(self._claim))  # another process starts, and may have seen this claim
            time.sleep(random.uniform(0, self._beat_seconds / 4))

    def _wait_until_free(self) -> int:
        """Waits until no process with a claim lives, removes the claims, and returns their highest term.

        Raises:
          ConfigError: one lives.
        """
        first: dict[str, float] = {}
        while living := self._living(claims := self._claims()):
            for claim, written in living.items():
                if written > first.setdefault(claim, written):
                    raise ConfigError(
                        "workdir",
                        f"={self._workdir} is in use by {_owner(claim)}: wait for its end, or choose another workdir",
                    )
            message = "%s is locked by %s, which may be dead: waiting for a sign of it, %.0f seconds at most"
            owner = _owner(next(iter(living)))
            logging.log_first_n(logging.WARNING, message, 1, self._workdir, owner, self._silent_seconds)
            time.sleep(self._beat_seconds / 4)
        for claim in claims:
            remove(self._path(claim))
        return max(map(_term, claims), default=0)

    def _living(self, claims: list[str]) -> dict[str, float]:
        """Returns those claims of other processes that are not known to be dead, and when they were written."""
        others = [claim for claim in claims if claim != self._claim and not _has_ended(claim)]
        if not others:
            return {}
        clock = f"clock-{process_name()}"
        self._write(clock)
        now = gfile.modified(self._path(clock))
        remove(self._path(clock))
        written = {claim: gfile.modified(self._path(claim)) for claim in others}
        return {claim: time for claim, time in written.items() if now - time < self._silent_seconds}

    def _beat(self) -> None:
        """Shows that this process lives, until it ends or has lost the lock."""
        while not self._end.wait(self._beat_seconds):
            with contextlib.suppress(InputError, *gfile.file_errors()):  # it tries again
                claims = self._claims()
                newest = max(claims, key=_term, default="")
                if self._claim not in claims or _term(newest) > _term(self._claim):
                    self._lost_to = _owner(newest)
                    return
                self._write(self._claim)

    def _claims(self) -> list[str]:
        return [name for name in list_folder(self._folder) if _CLAIM.fullmatch(name)]

    def _write(self, name: str) -> None:
        with gfile.open_binary(self._path(name), "xb") as file:
            file.write(b"")

    def _path(self, name: str) -> str:
        return os.path.join(self._folder, name)


def _term(claim: str) -> int:
    return int(claim.partition("-")[0])


def _has_ended(claim: str) -> bool:
    """Whether the claim is of a process of this machine that no longer runs."""
    match = _CLAIM.fullmatch(claim)
    if not match or claim.endswith(process_name()):
        return False
    return match[2] == os.uname().nodename and not is_other_process(int(match[3]))


def _owner(claim: str) -> str:
    match = _CLAIM.fullmatch(claim)
    return f"process {match[3]} of {match[2]}" if match else "another process"
