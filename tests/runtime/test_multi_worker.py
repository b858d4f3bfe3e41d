"""Two processes on the loopback interface train one model."""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest
from support import killed_runs

from diffusion_tf.data import open_source
from diffusion_tf.errors import PreemptedError
from diffusion_tf.presets import get_preset
from diffusion_tf.runtime.strategies import make_strategy
from diffusion_tf.storage import checkpoints
from diffusion_tf.storage.workdir import Workdir
from diffusion_tf.training.loop import train
from diffusion_tf.training.trainer import Trainer

ROOT = pathlib.Path(__file__).parent.parent.parent
RECIPE = {
    "num_steps": 4, "steps_per_loop": 2, "checkpoint_every": 2, "sample_every": 4, "batch_size": 8, "num_timesteps": 4,
    "warmup_steps": 0, "ch_mult": "1",
}  # fmt: skip


def free_ports(count):
    """Ports that were free a moment ago."""
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@contextlib.contextmanager
def two_processes(tmp_path, args):
    """Starts two workers that train; yields the processes and their log files, and kills what is left."""
    workers = [f"127.0.0.1:{port}" for port in free_ports(2)]
    logs, processes = [tmp_path / f"worker{index}.log" for index in range(2)], []
    try:
        for index, log in enumerate(logs):
            config = {"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}}
            command = [sys.executable, "-m", "experiments.train", "--strategy=multi_worker", *args]
            env = {**os.environ, "TF_CONFIG": json.dumps(config), "CUDA_VISIBLE_DEVICES": ""}
            with log.open("w") as file:
                processes.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=file))
        yield processes, logs
    finally:
        for process in processes:
            process.kill()
            process.wait()


def train_in_two_processes(tmp_path, args):
    with two_processes(tmp_path, args) as (processes, logs):
        for process, log in zip(processes, logs, strict=True):
            assert process.wait(timeout=300) == 0, log.read_text()


@pytest.mark.slow
def test_two_processes_take_the_same_steps_as_one(tmp_path):
    train_in_two_processes(tmp_path, [f"--workdir={tmp_path}/two", *(f"--{k}={v}" for k, v in RECIPE.items())])
    assert len((tmp_path / "two" / "metrics.jsonl").read_text().splitlines()) == 2

    preset, workdir = get_preset("digits", **{**RECIPE, "ch_mult": (1,)}), Workdir(tmp_path / "one")
    trainer = Trainer(preset, make_strategy("one_device"))
    train(trainer, workdir, open_source(preset))
    two = checkpoints.load(checkpoints.find(Workdir(tmp_path / "two").checkpoints)[1])
    for name, array in trainer.state.to_arrays().items():
        if name.startswith(("params/", "ema/")):
            np.testing.assert_allclose(two[name], array, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_a_run_of_two_processes_survives_the_loss_of_either(tmp_path):
    recipe = [f"--{k}={v}" for k, v in {**RECIPE, "num_steps": 400, "sample_every": 0}.items()]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    train_in_two_processes(tmp_path, [f"--workdir={straight}", *recipe])
    for victim in (0, 1):
        with two_processes(tmp_path, [f"--workdir={killed}", *recipe]) as (processes, logs):
            lines = len(killed_runs.metrics(killed))
            killed_runs.wait_for(lambda lines=lines: len(killed_runs.metrics(killed)) >= lines + 5)
            processes[victim].kill()
            assert processes[1 - victim].wait(timeout=120) != 0, "a process continues alone"
            assert "another process is gone" in logs[1 - victim].read_text().splitlines()[-1]
    assert len(killed_runs.metrics(killed)) < 200
    with two_processes(tmp_path, [f"--workdir={killed}", *recipe]) as (processes, logs):
        lines = len(killed_runs.metrics(killed))
        killed_runs.wait_for(lambda: len(killed_runs.metrics(killed)) >= lines + 5)
        processes[1].terminate()
        assert [process.wait(timeout=120) for process in processes] == [PreemptedError.exit_code] * 2
    train_in_two_processes(tmp_path, [f"--workdir={killed}", *recipe])
    killed_runs.assert_same_run(straight, killed)
