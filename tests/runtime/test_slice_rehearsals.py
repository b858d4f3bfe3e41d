"""Servers with virtual CPUs stand in for the hosts of a TPU slice: training on them through kills and notices."""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
from support import killed_runs

from diffusion_tf.errors import PreemptedError
from diffusion_tf.runtime.slices import is_up

ROOT = pathlib.Path(__file__).parent.parent.parent
KILLS = int(os.environ.get("SLICE_KILLS", "3"))
RECIPE = (
    "--steps_per_loop=5 --checkpoint_every=5 --keep_checkpoints=2 --keep_every=50 --sample_every=0 --batch_size=8"
    " --num_timesteps=4 --ch_mult=1 --dropout=0.1 --warmup_steps=5 --random_flip=True --num_steps=400"
).split()


def free_port_pairs(count):
    """Ports that were free a moment ago, each with the next one."""
    with contextlib.ExitStack() as stack:
        ports = []
        while len(ports) < count:
            first = stack.enter_context(socket.create_server(("", 0)))
            port = first.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                stack.enter_context(socket.create_server(("", port + 1)))
                ports.append(port)
        return ports


class Slice:
    """Servers of virtual CPUs, and the training processes that drive them."""

    def __init__(self, folder, servers):
        self.folder, self.ports = folder, free_port_pairs(servers)
        self.environment = {**os.environ, "GCE_METADATA_HOST": "127.0.0.1:9", "CUDA_VISIBLE_DEVICES": ""}
        self.servers = [None] * servers
        for index in range(servers):
            self.start_server(index)

    def _start(self, log, *command):
        with (self.folder / log).open("w") as file:
            return subprocess.Popen(
                [sys.executable, "-m", *command], cwd=ROOT, env=self.environment, stdout=file, stderr=file
            )

    def start_server(self, index):
        arguments = ["experiments.serve_tpu", f"--port={self.ports[index]}", "--virtual_cpus=2"]
        self.servers[index] = self._start(f"server{index}.log", *arguments)

    def address(self, index):
        return f"127.0.0.1:{self.ports[index]}"

    @contextlib.contextmanager
    def training(self, workdir):
        """A training process and the file of its output; it is killed in the end."""
        tpu = "--tpu=grpc://" + ",".join(map(self.address, range(len(self.ports))))
        process = self._start("train.log", "experiments.train", tpu, f"--workdir={workdir}", *RECIPE)
        try:
            yield process, self.folder / "train.log"
        finally:
            process.kill()
            process.wait()

    def train(self, workdir):
        with self.training(workdir) as (process, log):
            assert process.wait(timeout=1200) == 0, log.read_text()

    def close(self):
        for server in self.servers:
            server.kill()
            server.wait()


@pytest.fixture
def make_slice(tmp_path):
    with contextlib.ExitStack() as stack:

        def make(servers):
            made = Slice(tmp_path, servers)
            stack.callback(made.close)
            return made

        yield make


@pytest.mark.slow
@pytest.mark.parametrize("servers", [2, 4])
def test_a_run_on_a_slice_survives_the_loss_of_any_worker(make_slice, tmp_path, servers):
    slice_, random = make_slice(servers), np.random.RandomState(0)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    slice_.train(straight)
    for _ in range(KILLS):
        with slice_.training(killed) as (process, log):
            lines = len(killed_runs.metrics(killed)) + random.randint(1, 8)
            killed_runs.wait_for(lambda lines=lines: len(killed_runs.metrics(killed)) >= lines, 600)
            victim = random.randint(servers)
            slice_.servers[victim].kill()
            assert process.wait(timeout=120) == PreemptedError.exit_code, log.read_text()
            last = log.read_text().splitlines()[-1]
            assert f"worker {victim} ({slice_.address(victim)}) of the TPU is gone" in last
            slice_.servers[victim].wait()
            slice_.start_server(victim)
    assert len(killed_runs.metrics(killed)) < 80, "it ended before the last kill"
    slice_.train(killed)
    killed_runs.assert_same_run(straight, killed)


@pytest.mark.slow
def test_a_worker_that_is_told_to_end_has_the_run_saved_first(make_slice, tmp_path):
    slice_, workdir = make_slice(2), tmp_path / "run"
    with slice_.training(workdir) as (process, log):
        killed_runs.wait_for(lambda: killed_runs.metrics(workdir), 600)
        slice_.servers[1].send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == PreemptedError.exit_code, log.read_text()
        last = log.read_text().splitlines()[-1]
        assert f"127.0.0.1:{slice_.ports[1] + 1}: saved step " in last
        assert is_up(slice_.address(1)), "the server did not wait for the checkpoint"
    slice_.servers[0].send_signal(signal.SIGTERM)
    slice_.servers[0].send_signal(signal.SIGHUP)  # a second signal ends it at once
    assert slice_.servers[0].wait(timeout=20) == PreemptedError.exit_code


@pytest.mark.slow
def test_a_worker_that_falls_silent_ends_the_run(make_slice, tmp_path):
    """As a machine does that is gone without closing its connections."""
    slice_, workdir = make_slice(2), tmp_path / "run"
    with slice_.training(workdir) as (process, log):
        killed_runs.wait_for(lambda: killed_runs.metrics(workdir), 600)
        slice_.servers[1].send_signal(signal.SIGSTOP)
        assert process.wait(timeout=240) == PreemptedError.exit_code, log.read_text()
        assert f"127.0.0.1:{slice_.ports[1] + 1} has been silent for 60 s" in log.read_text().splitlines()[-1]
