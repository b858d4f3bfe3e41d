"""Two real processes on loopback train one model."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np

from diffusion_tf import checkpoints
from diffusion_tf.datasets import open_source
from diffusion_tf.distribution import make_strategy
from diffusion_tf.presets import get_preset
from diffusion_tf.training import Trainer, train
from diffusion_tf.workdir import Workdir

ROOT = pathlib.Path(__file__).parent.parent
RECIPE = {
    "num_steps": 4, "steps_per_loop": 2, "checkpoint_every": 2, "sample_every": 4, "batch_size": 8, "num_timesteps": 4,
    "warmup_steps": 0, "ch_mult": "1",
}  # fmt: skip


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def train_in_two_processes(tmp_path, args):
    workers = [f"127.0.0.1:{port}" for port in free_ports(2)]
    logs, processes = [tmp_path / f"worker{index}.log" for index in range(2)], []
    try:
        for index, log in enumerate(logs):
            config = {"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}}
            command = [sys.executable, "-m", "experiments.train", "--strategy=multi_worker", *args]
            env = {**os.environ, "TF_CONFIG": json.dumps(config), "CUDA_VISIBLE_DEVICES": ""}
            with log.open("w") as file:
                processes.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=file))
        for process, log in zip(processes, logs, strict=True):
            assert process.wait(timeout=300) == 0, log.read_text()
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_two_processes_take_the_steps_of_one(tmp_path):
    train_in_two_processes(tmp_path, [f"--workdir={tmp_path}/two", *(f"--{k}={v}" for k, v in RECIPE.items())])
    assert len((tmp_path / "two" / "metrics.jsonl").read_text().splitlines()) == 2

    preset, workdir = get_preset("digits", **{**RECIPE, "ch_mult": (1,)}), Workdir(tmp_path / "one")
    trainer = Trainer(preset, make_strategy("one_device"))
    train(trainer, workdir, open_source(preset))
    two = checkpoints.load(checkpoints.find(Workdir(tmp_path / "two").checkpoints)[1])
    for name, array in trainer.state.to_arrays().items():
        if name.startswith(("params/", "ema/")):
            np.testing.assert_allclose(two[name], array, atol=1e-5, err_msg=name)
