"""Notices of preemption."""

import functools
import http.server
import os
import signal
import threading
import time

import pytest
from support import killed_runs

from diffusion_tf.training.preemption import PreemptionNotice

quick_notice = functools.partial(PreemptionNotice, poll_seconds=0.02)


@pytest.fixture(autouse=True)
def no_metadata_server(monkeypatch):
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:9")  # nothing answers there


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_first_signal_is_a_notice_and_the_next_one_acts_as_before(number):
    arrived = []
    before = signal.signal(number, lambda number, _: arrived.append(number))
    try:
        with quick_notice() as notice:
            assert notice.reason is None
            os.kill(os.getpid(), number)
            killed_runs.wait_for(lambda: notice.reason == number.name)
            assert not arrived
            os.kill(os.getpid(), number)
            killed_runs.wait_for(lambda: arrived == [number])
    finally:
        signal.signal(number, before)


def test_a_signal_that_the_process_ignores_stays_ignored():
    """As SIGHUP under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with quick_notice() as notice:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
            assert notice.reason is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_metadata_server_is_polled_through_its_errors_until_it_announces_a_preemption(monkeypatch):
    answers, requests = iter([b"FALSE", None, b"", b"TRUE"]), []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append((self.path, self.headers["Metadata-Flavor"]))
            answer = next(answers)
            self.send_response(503 if answer is None else 200)
            self.end_headers()
            self.wfile.write(answer or b"")

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
        with quick_notice() as notice:
            killed_runs.wait_for(lambda: notice.reason is not None)
        assert notice.reason == "a preemption notice of Compute Engine"
        assert requests == [("/computeMetadata/v1/instance/preempted", "Google")] * 4
        server.shutdown()


def test_polling_stops_if_no_metadata_server_answers():
    before = threading.active_count()
    with quick_notice() as notice:
        killed_runs.wait_for(lambda: threading.active_count() == before)
    assert notice.reason is None
