"""A killed and resumed run has the weights, EMA, moments, metrics and samples of an uninterrupted one, bit for bit."""

import os
import signal
import time

from support import killed_runs
from support.forked_programs import run_fork, start_fork

from diffusion_tf.errors import PreemptedError


def test_a_killed_run_equals_an_uninterrupted_one(tmp_path):
    args = ["--num_steps=60", *killed_runs.TINY]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    moments = [
        (signal.SIGKILL, lambda: killed_runs.is_saving(killed)),
        (signal.SIGTERM, lambda: any(line["step"] == 30 for line in killed_runs.metrics(killed))),
        (signal.SIGKILL, lambda: (killed / "samples/step_00000050.png").exists()),
    ]
    finished = run_fork("train", f"--workdir={straight}", *args)
    assert finished.returncode == 0, finished.stderr
    for number, moment in moments:
        running = start_fork("train", f"--workdir={killed}", *args)
        killed_runs.wait_for(moment)
        time.sleep(0.005)
        os.kill(running.process.pid, number)
        ended = running.wait()
        if number == signal.SIGTERM:
            assert ended.returncode == PreemptedError.exit_code and "train: SIGTERM: saved step " in ended.stderr
        else:
            assert ended.returncode == -signal.SIGKILL, ended.stderr
    finished = run_fork("train", f"--workdir={killed}", *args)
    assert finished.returncode == 0, finished.stderr
    assert killed_runs.assert_same_run(straight, killed) > 1e6
