"""Notices of preemption."""

import functools
import os
import signal
import socket
import time

import pytest
from support import killed_runs, metadata_server

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


@pytest.mark.parametrize("of_a_worker", [False, True])
def test_a_metadata_server_is_polled_through_its_errors_until_it_announces_a_preemption(monkeypatch, of_a_worker):
    failures = [503, metadata_server.SLOW, metadata_server.MALFORMED, metadata_server.NONSENSE, 404]
    answers, paths = iter([*failures, "FALSE", *failures, "", "TRUE"]), []

    def answer(path):
        paths.append(path)
        return next(answers)

    with metadata_server.serving(answer) as host:
        if not of_a_worker:
            monkeypatch.setenv("GCE_METADATA_HOST", host)
        with quick_notice([host] if of_a_worker else []) as notice:
            killed_runs.wait_for(lambda: notice.reason is not None)
    assert notice.reason == "a preemption notice of Compute Engine" + (f" for {host}" if of_a_worker else "")
    assert paths == [metadata_server.PREEMPTED] * 13


def test_a_server_that_answers_late_is_still_heard(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{port}")
    with quick_notice() as notice:
        time.sleep(0.1)
        with metadata_server.serving(lambda _: "TRUE", port=port):
            killed_runs.wait_for(lambda: notice.reason is not None)


def test_signals_can_be_left_alone():
    before = signal.getsignal(signal.SIGTERM)
    with quick_notice(signals=()):
        assert signal.getsignal(signal.SIGTERM) == before
