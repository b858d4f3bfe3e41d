"""The programs as a user runs them: exit codes, one clear line, and what they leave behind."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from diffusion_tf.presets import Preset
from diffusion_tf.workdir import Workdir

TFRECORD = "tests/fixtures/stylegan2_4x4.tfrecords"
ROOT = pathlib.Path(__file__).parent.parent
TINY = "--num_steps=4 --steps_per_loop=2 --checkpoint_every=2 --sample_every=0 --batch_size=8 --num_timesteps=4".split()


def run(program, *args):
    return subprocess.run(
        [sys.executable, "-m", f"experiments.{program}", *map(str, args)],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("program", "args", "message"),
    [
        ("train", ["--workdir=w", "--dataset=mnist"], "--dataset=mnist: choose one of digits, cifar10"),
        ("train", ["--workdir=w", "--learning_rate=-1"], "--learning_rate=-1.0: must be greater than 0"),
        ("train", ["--workdir=w", "--learning_rate=0"], "--learning_rate=0.0: must be greater than 0"),
        ("train", ["--workdir=w", "--dataset=cifar10", "--data_dir=/nowhere"], "--data_dir=/nowhere holds no prepared"),
        ("train", ["--workdir=w", "--dataset=lsun_cat", "--tfrecord=tests/fixtures"], "tests/fixtures is a folder"),
        ("train", ["--workdir=w", "--dataset=lsun_cat", f"--tfrecord={TFRECORD}"], "images are (4, 4, 3)"),
        ("train", ["--workdir=w", "--beta_schedule=cosine"], "linear"),
        ("train", ["--workdir=w", "--atn_resolutions=4"], "atn_resolutions"),
        ("train", ["--workdir=w", "--attn_resolutions=5"], "--attn_resolutions=5 never occurs"),
        ("train", [], "--workdir is required"),
        ("train", ["--workdir=/proc/nothing/here"], "cannot write /proc/nothing/here/config.json"),
        ("sample", ["--workdir=w", "--out=samples.npz"], "--workdir=w holds no run"),
        ("sample", ["--workdir=w"], "--out is required"),
    ],
)
def test_bad_input_gets_one_line(program, args, message):
    result = run(program, *args)
    lines = result.stderr.strip().splitlines()
    assert result.returncode != 0 and len(lines) == 1, result.stderr
    assert lines[0].startswith(f"{program}: ") and message in lines[0]
    assert not (ROOT / "w").exists()


@pytest.mark.parametrize("program", ["train", "sample", "demo"])
def test_help_is_complete_and_no_error(program):
    result = run(program, "--help")
    assert result.returncode == 0
    assert f"python -m experiments.{program}" in result.stdout and "--workdir" in result.stdout
    if program == "train":
        for field in dataclasses.fields(Preset):
            assert f"{field.name}:" in result.stdout, field.name


def test_every_flag_reaches_the_configuration():
    changed = {
        "image_size": 16, "channels": 3, "random_flip": True, "ch": 64, "ch_mult": [1, 2, 2], "num_res_blocks": 2,
        "attn_resolutions": [4, 8], "dropout": 0.25, "num_timesteps": 50, "beta_schedule": "quad", "beta_start": 0.001,
        "beta_end": 0.3, "model_mean_type": "xstart", "model_var_type": "learned", "loss_type": "kl",
        "learning_rate": 0.5, "batch_size": 3, "num_steps": 7, "warmup_steps": 9, "grad_clip": 2.5, "ema_decay": 0.5,
        "seed": 11, "steps_per_loop": 10, "checkpoint_every": 20, "keep_checkpoints": 5, "keep_every": 40,
        "sample_every": 30,
    }  # fmt: skip
    assert set(changed) == {field.name for field in dataclasses.fields(Preset)} - {"dataset"}
    as_flag = lambda v: ",".join(map(str, v)) if isinstance(v, list) else v
    result = run("train", "--dry_run", *(f"--{name}={as_flag(value)}" for name, value in changed.items()))
    assert result.returncode == 0, result.stderr
    config, _, parameters = result.stdout.partition("parameters: ")
    assert json.loads(config) == {"dataset": "digits", **changed}
    assert int(parameters.replace(",", "")) > 1e6


def test_train_resume_and_sample(tmp_path):
    workdir = tmp_path / "run"
    trained = run("train", f"--workdir={workdir}", *TINY)
    assert trained.returncode == 0, trained.stderr
    assert "4/4" in trained.stderr and "images/s" in trained.stderr
    again = run("train", f"--workdir={workdir}", *TINY)
    assert again.returncode == 0, again.stderr
    assert len((workdir / "metrics.jsonl").read_text().splitlines()) == 2
    refused = run("train", f"--workdir={workdir}", *TINY, "--dropout=0.5")
    assert refused.returncode == 1 and "dropout: 0.5 != 0.0" in refused.stderr
    assert Workdir(workdir).read_preset().dropout == 0.0

    outputs = []
    for name, args in (("a", ["--batch_size=3"]), ("b", ["--checkpoint=4"]), ("c", ["--checkpoint=2", "--seed=1"])):
        out, png = tmp_path / f"{name}.npz", tmp_path / f"{name}.png"
        result = run("sample", f"--workdir={workdir}", "--num_samples=7", f"--out={out}", f"--png={png}", *args)
        assert result.returncode == 0, result.stderr
        assert png.read_bytes().startswith(b"\x89PNG")
        with np.load(out, allow_pickle=False) as archive:
            outputs.append(archive["samples"])
    assert outputs[0].shape == (7, 8, 8, 1) and outputs[0].dtype == np.uint8
    assert np.abs(outputs[0].astype(int) - outputs[1]).max() <= 1
    assert not np.array_equal(outputs[1], outputs[2])
    missing = run("sample", f"--workdir={workdir}", "--checkpoint=3", f"--out={tmp_path}/d.npz")
    assert missing.returncode == 1 and "no checkpoint of step 3; there are: 2, 4" in missing.stderr
