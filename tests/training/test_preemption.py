"""Notices of preemption."""

import http.server
import os
import signal
import threading

import pytest
from support import killed_runs

from diffusion_tf.training import preemption
from diffusion_tf.training.preemption import PreemptionNotice


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(preemption, "_POLL_SECONDS", 0.02)
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:9")  # where nothing answers


def test_sigterm_is_noticed_once_and_then_ends_the_process():
    before = signal.getsignal(signal.SIGTERM)
    with PreemptionNotice() as notice:
        assert notice.reason is None
        os.kill(os.getpid(), signal.SIGTERM)
        killed_runs.wait_for(lambda: notice.reason == "SIGTERM")
        assert signal.getsignal(signal.SIGTERM) == before
    assert signal.getsignal(signal.SIGTERM) == before


def test_compute_engines_notice_is_asked_for(monkeypatch):
    answers, asked = iter([b"FALSE", b"FALSE", b"TRUE"]), []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers["Metadata-Flavor"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(next(answers))

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
        with PreemptionNotice() as notice:
            killed_runs.wait_for(lambda: notice.reason is not None)
        assert notice.reason == "a preemption notice of Compute Engine"
        assert asked == [("/computeMetadata/v1/instance/preempted", "Google")] * 3
        server.shutdown()


def test_nothing_is_asked_for_long_where_nothing_answers():
    before = threading.active_count()
    with PreemptionNotice() as notice:
        killed_runs.wait_for(lambda: threading.active_count() == before)
    assert notice.reason is None
