"""A run that is killed is the run: weights, EMA, moments, metrics and samples, bit for bit."""

import os
import signal
import time

import killed_runs

from diffusion_tf.errors import PreemptedError


def test_a_killed_run_is_the_run(tmp_path):
    programs = killed_runs.Programs(tmp_path)
    args = ["--num_steps=60", *killed_runs.TINY]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    moments = [
        (signal.SIGKILL, lambda: killed_runs.is_saving(killed)),
        (signal.SIGKILL, lambda: any(line["step"] == 20 for line in killed_runs.metrics(killed))),
        (signal.SIGTERM, lambda: any(line["step"] == 30 for line in killed_runs.metrics(killed))),
        (signal.SIGKILL, lambda: (killed / "samples/step_00000050.png").exists()),
    ]
    try:
        programs.start("train", f"--workdir={straight}", *args)
        assert programs.wait()[0] == 0, programs.log.read_text()
        for number, moment in moments:
            process = programs.start("train", f"--workdir={killed}", *args)
            killed_runs.wait_for(moment)
            time.sleep(0.005)
            os.kill(process, number)
            code, printed = programs.wait()
            if number == signal.SIGTERM:
                assert code == PreemptedError.exit_code and "train: SIGTERM: saved step " in printed
            else:
                assert code == -signal.SIGKILL, printed
        programs.start("train", f"--workdir={killed}", *args)
        assert programs.wait()[0] == 0, programs.log.read_text()
    finally:
        programs.close()
    assert killed_runs.assert_same_run(straight, killed) > 1e6
