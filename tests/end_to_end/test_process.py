"""The process that a program runs in: where it prints, its encoding, and the signals that end it."""

import os
import pathlib
import shlex
import signal
import subprocess
import sys

import numpy as np
import pytest
from support import killed_runs
from support.forked_programs import ROOT, run_fork

# Prints through the project's own process, without TensorFlow.
_PRINTS = """
import sys
sys.argv[0] = "-m"
import experiments
for i in range(20_000):
    print("line", i)
print("to stderr", file=sys.stderr)
open(sys.argv[1], "w").write("done")
"""


def run_shell(tmp_path, command):
    """Runs a bash command in which $PRINT prints much and then writes the file `done`."""
    prints = shlex.join([sys.executable, "-c", _PRINTS, str(tmp_path / "done")])
    script = f"set -o pipefail; {command.replace('$PRINT', prints)}"
    return subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "command",
    [
        "$PRINT | true",
        "$PRINT 2>&-",
        "$PRINT >&-",
        "$PRINT <&- >&- 2>&-",
        "$PRINT >/dev/full",
        "$PRINT 2>/dev/full >&2",
    ],
)
def test_output_that_nobody_reads_does_not_end_a_program(tmp_path, command):
    result = run_shell(tmp_path, command)
    assert result.returncode == 0 and "Error" not in result.stderr, result.stderr
    assert (tmp_path / "done").read_text() == "done"


def test_a_program_has_utf8_whatever_the_locale(tmp_path):
    workdir = tmp_path / "caf\u00e9"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "experiments", "sample", f"--workdir={workdir}", "--out=x.npz"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)
    assert (
        result.stderr.decode() == f"sample: --workdir={workdir} holds no run (no config.json): train one there first\n"
    )


def start(tmp_path, *args):
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "experiments", *args], cwd=ROOT, stdout=file, stderr=file, text=True
        )
    return process, log


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.4, 0.8, 1.5, 2.5, 4.0, 6.0, 9.0, 12.0, 15.0])
def test_ctrl_c_at_any_time_of_training_is_one_line(tmp_path, seconds):
    process, log = start(tmp_path, "train", f"--workdir={tmp_path}/run", *killed_runs.TINY)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=seconds)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert "Traceback" not in log.read_text()
    last = log.read_text().splitlines()[-1]
    assert last == "train: interrupted" or last.startswith("train: SIGINT: saved step ")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGHUP, 75)])
def test_a_signal_saves_and_the_same_command_goes_on(tmp_path, number, exit_code):
    flags = [f"--workdir={tmp_path}/run", *killed_runs.TINY, "--num_steps=400"]
    process, log = start(tmp_path, "train", *flags)
    killed_runs.wait_for(lambda: killed_runs.metrics(tmp_path / "run"))
    process.send_signal(number)
    assert process.wait(timeout=60) == exit_code
    assert f"train: {number.name}: saved step " in log.read_text()
    process, log = start(tmp_path, "train", *flags)
    assert process.wait(timeout=120) == 0, log.read_text()
    straight, _ = start(tmp_path, "train", f"--workdir={tmp_path}/straight", *flags[1:])
    assert straight.wait(timeout=120) == 0
    killed_runs.assert_same_run(pathlib.Path(tmp_path / "straight"), pathlib.Path(tmp_path / "run"))


@pytest.mark.slow
def test_ctrl_c_keeps_the_finished_batches_of_samples(tmp_path):
    run = tmp_path / "run"
    trained = run_fork("train", f"--workdir={run}", *killed_runs.TINY, "--num_steps=5")
    assert trained.returncode == 0, trained.stderr
    flags = [f"--workdir={run}", "--num_samples=2000", "--batch_size=10"]
    process, log = start(tmp_path, "sample", *flags, f"--out={tmp_path}/interrupted.npz")
    killed_runs.wait_for(lambda: len(list(run.glob("partial/*/*.npz"))) > 20)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130 and log.read_text().endswith("sample: interrupted\n")
    kept = {path: path.stat().st_mtime_ns for path in run.glob("partial/*/*.npz")}
    assert len(kept) >= 20 and not (tmp_path / "interrupted.npz").exists()
    process, log = start(tmp_path, "sample", *flags, f"--out={tmp_path}/interrupted.npz")
    killed_runs.wait_for(lambda: len(list(run.glob("partial/*/*.npz"))) > len(kept))
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert process.wait(timeout=300) == 0, log.read_text()
    straight = run_fork("sample", *flags, f"--out={tmp_path}/straight.npz")
    assert straight.returncode == 0, straight.stderr
    with np.load(tmp_path / "interrupted.npz") as ours, np.load(tmp_path / "straight.npz") as theirs:
        np.testing.assert_array_equal(ours["samples"], theirs["samples"])
    assert not list(run.glob("partial/*"))
