"""Notices that training must stop: signals, and the one that Compute Engine gives 30 s before it takes a machine."""

import http.client
import os
import signal
import threading
import urllib.error
import urllib.request
from types import FrameType

# Of a manager of jobs; of Ctrl-C; of a terminal that closes, as when ssh does.
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class PreemptionNotice:
    """Listens for a notice while it is entered: `reason` is None until one arrives, and then names it.

    The first SIGTERM, SIGINT or SIGHUP is a notice; the next one acts as it did before. An ignored signal stays
    ignored. A thread asks Compute Engine's metadata server (or the one that the environment variable GCE_METADATA_HOST
    names), and stops if there is none.

    Args:
      poll_seconds: between two requests to the metadata server, and the timeout of each.
    """

    def __init__(self, poll_seconds: float = 2.0):
        self.reason: str | None = None
        self._poll_seconds = poll_seconds
        self._closed = threading.Event()
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "PreemptionNotice":
        if threading.current_thread() is threading.main_thread():  # where Python allows signal handlers
            listened = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._on_signal) for number in listened}
        threading.Thread(target=self._poll_metadata, daemon=True).start()
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

    def _poll_metadata(self) -> None:
        host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
        request = urllib.request.Request(
            f"http://{host}/computeMetadata/v1/instance/preempted", headers={"Metadata-Flavor": "Google"}
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the server is local: bypass any proxy
        on_compute_engine = False
        while self.reason is None and not self._closed.is_set():
            try:
                with opener.open(request, timeout=self._poll_seconds) as response:
                    on_compute_engine = True
                    if response.read(5) == b"TRUE" and self.reason is None:
                        self.reason = "a preemption notice of Compute Engine"
            except (urllib.error.HTTPError, http.client.HTTPException):
                on_compute_engine = True  # the server fails at times, and answers the next request
            except OSError:
                if not on_compute_engine:
                    return
            self._closed.wait(self._poll_seconds)
