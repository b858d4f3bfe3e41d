"""`make soak`: kills a training process thirty times at random moments; the run must equal an uninterrupted one."""

import os
import random
import signal
import time

import pytest
from support import killed_runs
from support.forked_programs import start_fork

KILLS, SAVING_KILLS = 30, 8
NUM_STEPS = 500
MAX_KILLING_SECONDS = 15 * 60  # of twenty minutes; the rest is for finishing both runs


@pytest.mark.slow
def test_a_run_killed_thirty_times_equals_an_uninterrupted_one(tmp_path):
    begin, rng = time.monotonic(), random.Random(0)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    start = lambda workdir: start_fork("train", f"--workdir={workdir}", f"--num_steps={NUM_STEPS}", *killed_runs.TINY)
    kills = saving_kills = 0
    seconds_to_start = 0.0
    while (kills < KILLS or saving_kills < SAVING_KILLS) and time.monotonic() - begin < MAX_KILLING_SECONDS:
        lines, started = len(killed_runs.metrics(killed)), time.monotonic()
        running = start(killed)
        if kills % 2:
            time.sleep(rng.uniform(0.0, 1.2 * seconds_to_start))
        else:
            killed_runs.wait_for(lambda lines=lines: len(killed_runs.metrics(killed)) > lines)
            seconds_to_start = time.monotonic() - started
            if rng.random() < 0.8:
                killed_runs.wait_for(lambda: killed_runs.is_saving(killed))
            time.sleep(rng.uniform(0.0, 0.003))
        os.kill(running.process.pid, signal.SIGKILL)
        ended = running.wait()
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        kills += 1
        saving_kills += killed_runs.is_saving(killed)
        print(f"killed at step {(killed_runs.metrics(killed) or [{'step': 0}])[-1]['step']}", flush=True)
    for workdir in (killed, straight):
        finished = start(workdir).wait()
        assert finished.returncode == 0, finished.stderr
    compared = killed_runs.assert_same_run(straight, killed)
    print(
        f"\nkills survived: {kills}, {saving_kills} of them with a half-written checkpoint"
        f"\nbytes compared and equal: {compared:,}; {time.monotonic() - begin:.0f} s"
    )
    assert kills >= KILLS, f"this machine is too slow or too busy for {KILLS} kills in {MAX_KILLING_SECONDS} seconds"
