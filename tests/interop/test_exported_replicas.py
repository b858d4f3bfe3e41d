"""An exported loop on eight devices, of one process or of two: as `train` trains, whatever process ends when."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.numpy
import tensorflow as tf
from support.forked_programs import ROOT, run_fork

from diffusion_tf.data.arrays import array_source
from diffusion_tf.errors import ConfigError, PreemptedError
from diffusion_tf.interop import export
from diffusion_tf.interop.processes import joined
from diffusion_tf.presets import get_preset
from diffusion_tf.runtime.strategies import make_strategy
from diffusion_tf.training.trainer import Trainer

PRESET = get_preset(
    "digits", image_size=4, batch_size=16, num_timesteps=6, dropout=0.1, random_flip=True, ch_mult=(1,),
    mid_attention=False, warmup_steps=4, num_steps=12, steps_per_loop=1, checkpoint_every=1, sample_every=0,
)  # fmt: skip
IMAGES = np.random.RandomState(0).randint(0, 256, (37, 4, 4, 1)).astype(np.uint8)
REPLICAS = 8


@pytest.fixture(scope="module")
def trainer():
    return Trainer(PRESET, make_strategy("one_device"))


@pytest.fixture(scope="module")
def folder(trainer, tmp_path_factory):
    """A folder with an export for eight devices and the images."""
    folder = tmp_path_factory.mktemp("export")
    export.write(str(folder), "train_loop", PRESET, trainer.state.model, steps_per_call=3, replicas=REPLICAS)
    np.savez(folder / "images.npz", images=IMAGES)
    return folder


def start(folder, workdir, *flags, devices=REPLICAS, num_steps=PRESET.num_steps):
    """Starts `train_exported`, which cannot import TensorFlow and prints into WORKDIR.log."""
    for name in ("tensorflow", "keras"):
        (folder / f"{name}.py").write_text("raise AssertionError('imported')")
    run = [folder, f"--workdir={workdir}", f"--npz={folder}/images.npz", "--held_out=0", f"--num_steps={num_steps}"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, "-m", "experiments", "train_exported", *run, *flags]
    with log(workdir).open("w") as file:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)


def log(workdir):
    return pathlib.Path(f"{workdir}.log")


@contextlib.contextmanager
def two_processes(folder, workdir, num_steps=PRESET.num_steps):
    """Starts two processes of four devices each; only the first has the run's folder. Kills what is left."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cluster = ["--distributed", f"--coordinator=127.0.0.1:{port}", "--num_processes=2"]
    processes = [
        start(folder, path, *cluster, f"--process_id={index}", devices=REPLICAS // 2, num_steps=num_steps)
        for index, path in enumerate(two_folders(workdir))
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def two_folders(workdir):
    return workdir, f"{workdir}_of_the_other"


def metrics(workdir):
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def checkpoint(workdir, step):
    return safetensors.numpy.load_file(workdir / f"checkpoints/step_{step:08d}.safetensors")


@pytest.mark.slow
def test_eight_devices_train_as_one_under_tensorflow(folder, trainer, tmp_path):
    """Each step, in one process and in two, from the same weights on the same images with the same noise."""
    assert start(folder, tmp_path / "one").wait() == 0, log(tmp_path / "one").read_text()
    with two_processes(folder, tmp_path / "two") as processes:
        assert [process.wait() for process in processes] == [0, 0], log(tmp_path / "two").read_text()
    batches = trainer.batches(array_source(IMAGES))
    lines = [metrics(tmp_path / run) for run in ("one", "two")]
    for step in range(PRESET.num_steps):
        expected = trainer.run_steps(batches, tf.constant(1))
        for line in (of_run[step] for of_run in lines):
            for name in ("loss", "grad_norm", "param_norm"):
                np.testing.assert_allclose(line[name], expected[name], rtol=1e-5, err_msg=f"{name} of step {step}")
    state = trainer.state.to_arrays()
    for run in ("one", "two"):
        ours = checkpoint(tmp_path / run, PRESET.num_steps)
        off = np.concatenate([np.abs(ours[name] - array).ravel() for name, array in state.items()])
        # Where the gradient is zero, as for biases before normalisation, Adam turns rounding errors into full steps.
        assert np.mean(off < 1e-5) > 0.99
    assert not (tmp_path / "two_of_the_other").exists()


@pytest.mark.slow
def test_a_process_that_ends_ends_both_and_the_run_resumes_bit_for_bit(folder, tmp_path):
    """Killed, of which JAX tells by SIGABRT or by an error, or with a notice, after which both stop at one step."""
    num_steps = 60
    with two_processes(folder, tmp_path / "whole", num_steps) as processes:
        assert [process.wait() for process in processes] == [0, 0]
    parts = tmp_path / "parts"
    for which, number in ((0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGTERM)):
        before = len(metrics(parts))
        with two_processes(folder, parts, num_steps) as processes:
            while len(metrics(parts)) < before + 3:
                assert [process.poll() for process in processes] == [None, None]
                time.sleep(0.05)
            processes[which].send_signal(number)
            other = processes[1 - which]
            assert other.wait(timeout=90) == PreemptedError.exit_code
            last = log(two_folders(parts)[1 - which]).read_text().strip().splitlines()[-1]
            if number == signal.SIGKILL:
                assert "another process is gone, or did not start: start all of them again" in last
            else:
                assert processes[which].wait() == PreemptedError.exit_code
                step = len(metrics(parts))
                assert f"another process: saved step {step}, run it again to go on" in last
    with two_processes(folder, parts, num_steps) as processes:
        assert [process.wait() for process in processes] == [0, 0]
    paths = [tmp_path / run / f"checkpoints/step_{num_steps:08d}.safetensors" for run in ("whole", "parts")]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert [line["step"] for line in metrics(parts)] == list(range(1, num_steps + 1))


@pytest.mark.slow
def test_processes_of_different_runs_refuse_to_train(folder, tmp_path):
    workdir = tmp_path / "run"
    with two_processes(folder, workdir) as processes:
        processes[1].kill()
        flags = [flag for flag in processes[0].args if str(flag).startswith(("--distributed", "--coord", "--num_proc"))]
        other = start(folder, tmp_path / "x", *flags, "--process_id=1", devices=REPLICAS // 2, num_steps=3)
        for process in (processes[0], other):  # the one that leaves first may end the other
            assert process.wait(timeout=90) in (1, PreemptedError.exit_code)
    lines = log(workdir).read_text() + log(tmp_path / "x").read_text()
    assert "the processes do not have the same recipe: give all of them the same export" in lines


def test_an_abort_of_jax_ends_the_process_with_one_line():
    code = "import os, diffusion_tf.interop.processes as p; p._end_at_abort(); os.abort()"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == PreemptedError.exit_code
    assert process.stderr == "another process is gone, or did not start: start all of them again\n"


def test_a_port_that_is_taken_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"coordinator={address}: its port is not free"), joined(address, 2, 0):
            pass


def test_replicas_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(ConfigError, match="replicas=3 do not divide the batch of 16 images"):
        export.build("train_loop", PRESET, replicas=3)


@pytest.mark.parametrize(
    ("program", "args", "message"),
    [
        ("export", ["--what=sampler", "--out=x", "--replicas=2"], "--replicas goes with --what=train_loop"),
        ("train_exported", ["x", "--workdir=w", "--process_id=1"], "--process_id goes with --distributed"),
        ("train_exported", ["x", "--workdir=w", "--distributed", "--process_id=1"], "--coordinator is required"),
        (
            "train_exported",
            ["x", "--workdir=w", "--distributed", "--coordinator=h:1", "--num_processes=2", "--process_id=2"],
            "--process_id=2 must be below --num_processes=2",
        ),
        (
            "train_exported",
            ["x", "--workdir=w", "--distributed", "--coordinator=h", "--num_processes=2", "--process_id=1"],
            "--coordinator=h must be HOST:PORT",
        ),
    ],
)
def test_bad_flags_give_one_line(program, args, message):
    result = run_fork(program, *args)
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 1 and len(lines) == 1, result.stderr
    assert lines[0].startswith(f"{program}: ") and message in lines[0]
