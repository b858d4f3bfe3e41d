"""Notices that training must stop: signals, and the one that Compute Engine gives 30 s before it takes a machine."""

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType

from diffusion_tf.errors import PreemptedError
from diffusion_tf.runtime.metadata import PREEMPTED, read_metadata

# Of a manager of jobs; of Ctrl-C; of a terminal that closes, as when ssh does.
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Times `poll_seconds`: 16 s, which leaves half of Compute Engine's notice, and a minute.
_SELDOM, _SILENT = 8, 30


class PreemptionNotice:
    """Listens for a notice while it is entered: `reason` is None until one arrives, and then names it.

    The first of `signals` is a notice; the next one acts as it did before. An ignored signal stays
    ignored. Threads ask the metadata server of this machine, and those of `workers`. A server that fails is asked
    again; one that has never answered is asked less and less often, down to every 16 s. The silence of a worker that
    has answered is a notice too, after a minute. If the process still trains a minute later, it waits in vain for that
    worker, and ends at once with the exit code of PreemptedError: machines can vanish without closing connections.

    Args:
      workers: HOST:PORT of the servers that tell the notices of other machines, in the form of the metadata server.
      poll_seconds: between two requests to a server, and the timeout of each.
      signals: those that are notices.
    """

    def __init__(
        self,
        workers: Sequence[str] = (),
        *,
        poll_seconds: float = 2.0,
        signals: Sequence[signal.Signals] = _SIGNALS,
    ):
        self.reason: str | None = None
        self._workers = workers
        self._poll_seconds = poll_seconds
        self._silence = _SILENT * poll_seconds
        self._signals = signals
        self._closed = threading.Event()
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "PreemptionNotice":
        if threading.current_thread() is threading.main_thread():  # where Python allows signal handlers
            listened = [number for number in self._signals if signal.getsignal(number) != signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._on_signal) for number in listened}
        for host in (None, *self._workers):
            threading.Thread(target=self._poll, args=(host,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self.reason is None:
            self.reason = signal.Signals(number).name
        else:
            self._restore_handlers()
            os.kill(os.getpid(), number)

    def _poll(self, host: str | None) -> None:
        wait, heard = self._poll_seconds, None
        while self.reason is None and not self._closed.is_set():
            try:
                answer = read_metadata(PREEMPTED, host, self._poll_seconds)
                wait, heard = self._poll_seconds, time.monotonic()
                if answer == "TRUE" and self.reason is None:
                    self.reason = "a preemption notice of Compute Engine" + (f" for {host}" if host else "")
            except OSError:
                if heard is None:
                    wait = min(2 * wait, _SELDOM * self._poll_seconds)
                elif host and time.monotonic() - heard > self._silence:
                    self.reason = f"{host} has been silent for {self._silence:.0f} s"
                    self._end_unless_closed()
            self._closed.wait(wait)

    def _end_unless_closed(self) -> None:
        if not self._closed.wait(self._silence):
            print(f"\n{self.reason}: start all workers again, and run this again", file=sys.stderr, flush=True)
            os._exit(PreemptedError.exit_code)
