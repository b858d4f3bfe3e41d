"""Runs on gs://: TensorFlow's real client, against a Google Cloud Storage in a process of this machine."""

import os
import subprocess
import threading
import time

import numpy as np
import pytest
from support.fake_gcs import serving

from diffusion_tf.errors import InputError
from diffusion_tf.presets import get_preset
from diffusion_tf.storage import checkpoints, gfile
from diffusion_tf.storage.files import append_line, new_folder, read_file, remove, write_file
from diffusion_tf.storage.object_lock import ObjectLock
from diffusion_tf.storage.resumable import ResumableBatches
from diffusion_tf.storage.workdir import Workdir

ARRAYS = {"kernel": np.arange(1000, dtype=np.float32), "step": np.array(7)}
VERSIONS = {"diffusion_tf": "1"}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("gcs"), "bucket") as (gcs, env), pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        yield gcs


@pytest.fixture
def gcs(served):
    served.fail()
    yield served
    served.fail()


def save(folder, step):
    return checkpoints.save(folder, step, ARRAYS, written_by=VERSIONS)


def test_a_run_is_kept_on_gs(gcs):
    workdir = Workdir("gs://bucket/kept")
    with workdir.lock():
        workdir.write_config(get_preset("digits"), 100, "--flag")
        for step in (1, 2, 3):
            workdir.append_metrics({"step": step})
            path = save(workdir.checkpoints, step)
    assert Workdir("gs://bucket/kept").read_preset() == get_preset("digits")
    workdir.rewind_metrics(2)
    assert [line["step"] for line in workdir.read_metrics()] == [1, 2]
    np.testing.assert_array_equal(checkpoints.load(path)["kernel"], ARRAYS["kernel"])
    checkpoints.remove_old(workdir.checkpoints, keep=1, keep_every=2)
    assert checkpoints.all_steps(workdir.checkpoints) == [2, 3]
    assert not [name for name in gcs.names("bucket", "kept") if name.endswith(".tmp")]


def test_batches_of_a_measurement_on_gs_are_computed_once(gcs):
    computed = []

    def compute(first, count):
        computed.append(first)
        return {"x": np.arange(first, first + count)}

    for _ in range(2):
        batches = ResumableBatches("gs://bucket/partial", {}, num_examples=5, batch_size=2)
        assert [len(arrays["x"]) for arrays in batches.compute(compute, "")] == [2, 2, 1]
    assert computed == [0, 2, 4]
    batches.remove()
    assert not gcs.names("bucket", "partial")


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
def test_requests_that_fail_now_and_then_damage_and_lose_nothing(gcs, seed):
    run = f"gs://bucket/faults{seed}"
    gcs.fail(503, 429, 0, rate=0.3, seed=seed)
    for number in range(3):
        append_line(f"{run}/lines", f"line {number}")
        save(f"{run}/checkpoints", number)
    with new_folder(f"{run}/folder") as temporary:
        for name in "ab":
            write_file(f"{temporary}/{name}", name.encode())
    assert checkpoints.all_steps(f"{run}/checkpoints") == [0, 1, 2]
    np.testing.assert_array_equal(checkpoints.load(f"{run}/checkpoints/step_00000002.safetensors")["step"], 7)
    remove(f"{run}/checkpoints")
    assert read_file(f"{run}/lines") == b"line 0\nline 1\nline 2\n"
    assert gcs.names("bucket", run.removeprefix("gs://bucket/")) == [
        f"faults{seed}/folder/a", f"faults{seed}/folder/b", f"faults{seed}/lines",
    ]  # fmt: skip


def test_a_folder_that_cannot_be_listed_is_not_taken_for_empty(gcs):
    save("gs://bucket/denied", 1)
    gcs.fail(403, kinds="list")
    with pytest.raises(gfile.file_errors()):
        checkpoints.all_steps("gs://bucket/denied")
    gcs.fail(503, kinds="list")
    with pytest.raises(gfile.file_errors()):
        checkpoints.all_steps("gs://bucket/denied")


@pytest.mark.parametrize(
    ("status", "bucket", "line"),
    [
        (403, "bucket", "no permission: grant this account the role roles/storage.objectUser on gs://bucket"),
        (401, "bucket", "no credentials for Google Cloud Storage: run `gcloud auth application-default login`"),
        (None, "absent", "there is no bucket gs://absent: create it, or correct its name"),
        (503, "bucket", "Google Cloud Storage does not answer: try again later"),
    ],
)
def test_a_refusal_of_the_store_says_what_to_do(gcs, status, bucket, line):
    gcs.fail(*[status] * (status is not None))
    for use in (lambda path: write_file(path, b""), read_file, lambda path: append_line(path, "x")):
        with pytest.raises(InputError, match=rf"gs://{bucket}/refused.* \({line}"):
            use(f"gs://{bucket}/refused/file")


def test_a_long_wait_for_the_store_is_told(caplog):
    with gfile.patience("/local", 0.0), gfile.patience("gs://bucket/x", 0.0):
        time.sleep(0.1)
    assert [r.getMessage() for r in caplog.records] == [
        "gs://bucket/x: no answer for 0 seconds, asking again for some minutes"
    ]


def test_writing_needs_no_permission_for_the_bucket_itself(gcs):
    gcs.fail(403, kinds="bucket")
    write_file("gs://bucket/new/folder/file", b"1")
    assert gcs.names("bucket", "new/") == ["new/folder/file"]
    with Workdir("gs://bucket").lock():
        assert gcs.names("bucket", "locks/")


def test_what_killed_processes_left_is_removed_after_a_day(gcs):
    gcs.put("bucket", "left/a.npz.host-1-00000000.tmp", b"", 90_000.0)
    gcs.put("bucket", "left/b.npz.host-1-00000000.tmp", b"", 80_000.0)
    write_file("gs://bucket/left/c", b"")
    assert gcs.names("bucket", "left/") == ["left/b.npz.host-1-00000000.tmp", "left/c"]


# --- The lock ---------------------------------------------------------------------------------------------------


def lock(run):
    return ObjectLock(f"gs://bucket/{run}", beat_seconds=0.2, silent_seconds=1.0)


def claim(gcs, run, name, age=0.0):
    """Another process claims the lock of a run."""
    gcs.put("bucket", f"{run}/locks/{name}-00000000", b"", age)


def terms(gcs, run):
    return [name.split("/")[-1][:8] for name in gcs.names("bucket", f"{run}/locks/")]


def test_a_released_lock_leaves_nothing(gcs):
    for _ in range(2):
        with lock("free").held():
            assert terms(gcs, "free") == ["00000001"]
    assert not terms(gcs, "free")


def test_a_process_of_this_machine_that_ended_loses_the_lock_at_once(gcs):
    process = subprocess.Popen(["true"])
    process.wait()
    claim(gcs, "killed", f"00000007-{os.uname().nodename}-{process.pid}")
    with ObjectLock("gs://bucket/killed", silent_seconds=1e9).held():
        assert terms(gcs, "killed") == ["00000008"]


def test_a_silent_process_of_another_machine_loses_the_lock(gcs, caplog):
    claim(gcs, "gone", "00000001-host-1", 3600.0)
    with lock("gone").held():
        assert not caplog.text
    claim(gcs, "silent", "00000001-host-1")
    with lock("silent").held():
        assert "silent is locked by process 1 of host, which may be dead: waiting for a sign of it, 1 s" in caplog.text


@pytest.mark.slow  # the client remembers for five seconds when an object was written
def test_a_process_that_lives_keeps_the_lock(gcs):
    ended = threading.Event()

    def beat():
        while not ended.wait(0.2):
            claim(gcs, "alive", "00000001-host-1")

    claim(gcs, "alive", "00000001-host-1")
    thread = threading.Thread(target=beat)
    thread.start()
    held = ObjectLock("gs://bucket/alive", beat_seconds=0.4, silent_seconds=60.0).held()
    with (
        pytest.raises(InputError, match="workdir=gs://bucket/alive is in use by process 1 of host: wait for its"),
        held,
    ):
        pass
    ended.set()
    thread.join()
    assert terms(gcs, "alive") == ["00000001"]


def test_of_two_processes_that_start_at_once_neither_overlooks_the_other(gcs):
    """The other claims the lock after this one has seen that it is free, and before it has written its own claim."""
    waiting = lock("both")
    free = waiting._wait_until_free

    def free_and_claimed():
        term = free()
        if "both" not in seen:
            seen.append("both")
            claim(gcs, "both", "00000001-host-1")
        return term

    seen = []
    waiting._wait_until_free = free_and_claimed
    with waiting.held():
        assert terms(gcs, "both") == ["00000002"]  # only after the other one was silent


def test_a_process_that_lost_its_lock_writes_no_more(gcs):
    workdir = Workdir("gs://bucket/lost")
    workdir._object_lock = lock("lost")
    with workdir._object_lock.held():
        workdir.append_metrics({"step": 1})
        claim(gcs, "lost", "00000002-host-1")
        time.sleep(1.0)
        for use in (lambda: workdir.append_metrics({"step": 2}), workdir.sync_metrics):
            with pytest.raises(InputError, match="lost was taken over by process 1 of host while this process did not"):
                use()
    assert [line["step"] for line in workdir.read_metrics()] == [1]
