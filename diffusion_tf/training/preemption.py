"""Notices that this machine is about to be taken away: SIGTERM, or the one that Compute Engine gives 30 s before."""

import os
import signal
import threading
import urllib.request


class PreemptionNotice:
    """Listens for a notice while it is entered: `reason` is None until one arrives, and then names it.

    A second SIGTERM ends the process at once. A thread asks Compute Engine's metadata server (or the one that the
    environment variable GCE_METADATA_HOST names), and stops if nothing answers.

    Args:
      poll_seconds: between two requests to the metadata server, and the timeout of each.
    """

    def __init__(self, poll_seconds: float = 2.0):
        self.reason: str | None = None
        self._poll_seconds = poll_seconds
        self._closed = threading.Event()
        # Python allows signal handlers in the main thread only.
        self._handles_signal = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "PreemptionNotice":
        if self._handles_signal:
            self._previous = signal.signal(signal.SIGTERM, self._on_signal)
        threading.Thread(target=self._poll_metadata, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        if self._handles_signal:
            signal.signal(signal.SIGTERM, self._previous)

    def _on_signal(self, *_: object) -> None:
        self.reason = "SIGTERM"
        signal.signal(signal.SIGTERM, self._previous)

    def _poll_metadata(self) -> None:
        host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
        request = urllib.request.Request(
            f"http://{host}/computeMetadata/v1/instance/preempted", headers={"Metadata-Flavor": "Google"}
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the server is local: bypass any proxy
        try:
            while self.reason is None and not self._closed.is_set():
                with opener.open(request, timeout=self._poll_seconds) as response:
                    if response.read(5) == b"TRUE":
                        self.reason = "a preemption notice of Compute Engine"
                self._closed.wait(self._poll_seconds)
        except OSError:
            return  # this machine is not on Compute Engine
