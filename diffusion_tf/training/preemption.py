"""Whether this machine is wanted back: SIGTERM, or the notice that Google Compute Engine gives 30 seconds before."""

import os
import signal
import threading
import urllib.request

_POLL_SECONDS = 2.0


class PreemptionNotice:
    """While entered, waits for a notice: `reason` says which one came, and is None until then.

    A second SIGTERM ends the process at once. The metadata server is asked from a thread of its own, which ends where
    none answers; GCE_METADATA_HOST names another one.
    """

    def __init__(self):
        self.reason: str | None = None
        self._closed = threading.Event()
        self._handled = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "PreemptionNotice":
        if self._handled:  # Python allows handlers in the main thread alone
            self._previous = signal.signal(signal.SIGTERM, self._on_signal)
        threading.Thread(target=self._poll_metadata, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._closed.set()
        if self._handled:
            signal.signal(signal.SIGTERM, self._previous)

    def _on_signal(self, *_) -> None:
        self.reason = "SIGTERM"
        signal.signal(signal.SIGTERM, self._previous)

    def _poll_metadata(self) -> None:
        host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
        request = urllib.request.Request(
            f"http://{host}/computeMetadata/v1/instance/preempted", headers={"Metadata-Flavor": "Google"}
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy knows this machine's server
        try:
            while self.reason is None and not self._closed.is_set():
                with opener.open(request, timeout=_POLL_SECONDS) as response:
                    if response.read(5) == b"TRUE":
                        self.reason = "a preemption notice of Compute Engine"
                self._closed.wait(_POLL_SECONDS)
        except OSError:
            return  # not on Compute Engine
