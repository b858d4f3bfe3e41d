"""Programs whose runs and data are on gs://: TensorFlow's real client, against a server of this machine that fails."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest
from support import killed_runs
from support.fake_gcs import serving
from support.forked_programs import ROOT

from diffusion_tf.storage import checkpoints

pytestmark = pytest.mark.slow  # starts programs

RECORDS = (ROOT / "tests/fixtures/stylegan2_4x4.tfrecords").read_bytes()
CATS = (
    "--dataset=lsun_cat --image_size=4 --ch=32 --ch_mult=1 --attn_resolutions= --tfrecord=gs://bucket/data/x.tfrecords"
    " --num_timesteps=4 --batch_size=8 --steps_per_loop=2 --checkpoint_every=2 --sample_every=4"
).split()


@pytest.fixture
def served(tmp_path):
    with serving(tmp_path, "bucket") as (gcs, env):
        yield gcs, env


def start(env, *args):
    """Starts `python -m experiments ARGS`, whose standard error goes into a file beside the certificate."""
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "", **env}
    log = pathlib.Path(env["CURL_CA_BUNDLE"]).parent / f"{args[0]}-{time.monotonic_ns()}.log"
    with log.open("w") as file:
        command = [sys.executable, "-m", "experiments", *args]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=file)
    return process, log


def run(env, *args, returncode=0):
    """Runs a program, and returns what it printed to standard error."""
    process, log = start(env, *args)
    assert process.wait(timeout=600) == returncode, log.read_text()
    return log.read_text()


def test_programs_work_on_gs_while_requests_fail(served, tmp_path):
    gcs, env = served
    gcs.put("bucket", "data/x.tfrecords", RECORDS)
    gcs.fail(503, 429, 0, rate=0.05)
    workdir, out = "--workdir=gs://bucket/run", "gs://bucket/out"
    run(env, "train", workdir, "--num_steps=4", *CATS)
    run(env, "train", workdir, "--num_steps=8", *CATS)
    run(env, "sample", workdir, "--num_samples=9", f"--out={out}/samples.npz", f"--png={out}/samples.png")
    run(env, "evaluate", workdir, "--features=pixels", "--metrics=fid", "--num_samples=9", "--num_reference=9")
    run(env, "likelihood", workdir, "--num_images=8")
    run(env, "rate_distortion", workdir, "--num_images=8")
    run(env, "doctor", workdir, f"--out={out}/doctor.json", returncode=1)  # it finds a network that has not learned
    run(env, "import_checkpoint", workdir, f"--export_diffusers={out}/diffusers")
    run(env, "figures", workdir, "--figure=samples", "--num_samples=16", f"--out={out}/figure.png")
    run(env, "report", workdir, f"--out={out}/report.md")
    gcs.fail()
    straight = f"--workdir={tmp_path}/straight"
    run(env, "train", straight, "--num_steps=8", *CATS)
    for name in ("step_00000006.safetensors", "step_00000008.safetensors"):
        there = (tmp_path / "straight/checkpoints" / name).read_bytes()
        assert gcs.data("bucket", f"run/checkpoints/{name}") == there
    lines = gcs.data("bucket", "run/metrics.jsonl").splitlines()
    assert len(lines) == len((tmp_path / "straight/metrics.jsonl").read_text().splitlines())
    assert not [name for name in gcs.names("bucket") if "/locks/" in name or name.endswith(".tmp")]
    found = {name.removeprefix("out/").partition("/")[0] for name in gcs.names("bucket", "out/")}
    files = (
        "samples.npz samples.png doctor.json doctor.md doctor.png diffusers figure.png figure.json report.md report.png"
    )
    assert found == set(files.split())


def test_kills_leave_sound_checkpoints_and_the_run_goes_on_at_once(served, tmp_path):
    gcs, env = served
    flags = ["--num_steps=200", *killed_runs.TINY]
    generator = random.Random(0)
    gcs.fail(503, 429, 0, rate=0.05)
    for _ in range(6):
        before = gcs.names("bucket", "run/checkpoints")
        process, _ = start(env, "train", "--workdir=gs://bucket/run", *flags)
        while gcs.names("bucket", "run/checkpoints") == before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(generator.uniform(0.0, 1.0))
        process.send_signal(signal.SIGKILL)
        assert process.wait() in (0, -signal.SIGKILL)
        for name in gcs.names("bucket", "run/checkpoints/"):
            if name.endswith(".safetensors"):
                (tmp_path / "checkpoint").write_bytes(gcs.data("bucket", name))
                checkpoints.load(str(tmp_path / "checkpoint"))
    run(env, "train", "--workdir=gs://bucket/run", *flags)
    run(env, "train", f"--workdir={tmp_path}/straight", *flags)
    copy(gcs, "run", tmp_path / "killed")
    killed_runs.assert_same_run(tmp_path / "straight", tmp_path / "killed")


def copy(gcs, prefix: str, folder: pathlib.Path) -> None:
    """Copies the objects below `prefix` into a new folder, but not what a killed process left beside its place."""
    for name in gcs.names("bucket", f"{prefix}/"):
        if name.endswith(".tmp"):
            continue
        path = folder / name.removeprefix(f"{prefix}/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gcs.data("bucket", name))


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["train", "--workdir=gs://bucket/new"], 403, "no permission: grant this account the role roles/storage.o"),
        (["sample", "--workdir=gs://bucket/run", "--png=x.png"], 403, "no permission: grant this account the role"),
        (["train", "--workdir=gs://absent/new"], None, "there is no bucket gs://absent: create it, or"),
        (["sample", "--workdir=gs://absent/run", "--png=x.png"], None, "there is no bucket gs://absent: create it"),
        (["train", "--workdir=gs://bucket/new"], 401, "no credentials for Google Cloud Storage: run `gcloud auth"),
        (["train", "--workdir=w", *CATS], 403, "no permission: grant this account the role"),
    ],
)  # fmt: skip
def test_a_refusal_of_the_store_is_one_line(served, tmp_path, args, status, message):
    gcs, env = served
    if status == 401:
        gcs.fail()
        env = {**env, "NO_GCE_CHECK": "true", "HOME": str(tmp_path)}
        del env["GOOGLE_AUTH_TOKEN_FOR_TESTING"]
    elif status:
        gcs.fail(status)
    stderr = run(env, *args, returncode=1)
    assert len(stderr.splitlines()) == 1 and message in stderr, stderr
    assert not (ROOT / "w").exists()


def test_a_second_process_is_refused(served):
    gcs, env = served
    flags = ["--workdir=gs://bucket/run", "--num_steps=100000", *killed_runs.TINY]
    process, _ = start(env, "train", *flags)
    killed_runs.wait_for(lambda: gcs.names("bucket", "run/metrics"))
    stderr = run(env, "train", *flags, returncode=1)
    assert f"--workdir=gs://bucket/run is in use by process {process.pid} of " in stderr.splitlines()[-1]
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 75
    assert not gcs.names("bucket", "run/locks/")
