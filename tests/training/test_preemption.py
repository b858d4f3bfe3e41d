"""Notices of preemption."""

import functools
import http.server
import os
import signal
import threading

import pytest
from support import killed_runs

from diffusion_tf.training.preemption import PreemptionNotice

quick_notice = functools.partial(PreemptionNotice, poll_seconds=0.02)


@pytest.fixture(autouse=True)
def no_metadata_server(monkeypatch):
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:9")  # nothing answers there


def test_the_first_sigterm_is_a_notice_and_the_second_ends_the_process():
    before = signal.getsignal(signal.SIGTERM)
    with quick_notice() as notice:
        assert notice.reason is None
        os.kill(os.getpid(), signal.SIGTERM)
        killed_runs.wait_for(lambda: notice.reason == "SIGTERM")
        assert signal.getsignal(signal.SIGTERM) == before
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_metadata_server_is_polled_until_it_announces_a_preemption(monkeypatch):
    answers, requests = iter([b"FALSE", b"FALSE", b"TRUE"]), []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append((self.path, self.headers["Metadata-Flavor"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(next(answers))

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
        with quick_notice() as notice:
            killed_runs.wait_for(lambda: notice.reason is not None)
        assert notice.reason == "a preemption notice of Compute Engine"
        assert requests == [("/computeMetadata/v1/instance/preempted", "Google")] * 3
        server.shutdown()


def test_polling_stops_if_no_metadata_server_answers():
    before = threading.active_count()
    with quick_notice() as notice:
        killed_runs.wait_for(lambda: threading.active_count() == before)
    assert notice.reason is None
