"""Runs on gs://: TensorFlow's real client, against a Google Cloud Storage in a process of this machine."""

import os
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support.fake_gcs import serving

from diffusion_tf.errors import InputError
from diffusion_tf.presets import get_preset
from diffusion_tf.storage import checkpoints, gfile
from diffusion_tf.storage.files import append_line, list_folder, new_folder, read_file, remove, write_file
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
    served.take_requests()
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


@pytest.mark.parametrize("seed", range(3))
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
        with pytest.raises(InputError, match=rf"gs://{bucket}/refused/file \({line}"):
            use(f"gs://{bucket}/refused/file")


def test_writing_needs_no_permission_for_the_bucket_itself(gcs):
    gcs.fail(403, kinds="bucket")
    write_file("gs://bucket/new/folder/file", b"1")
    assert gcs.names("bucket", "new/") == ["new/folder/file"]


def test_what_killed_processes_left_is_removed_after_a_day(gcs):
    gcs.put("bucket", "left/a.npz.host-1-00000000.tmp", b"", 90_000.0)
    gcs.put("bucket", "left/b.npz.host-1-00000000.tmp", b"", 80_000.0)
    write_file("gs://bucket/left/c", b"")
    assert gcs.names("bucket", "left/") == ["left/b.npz.host-1-00000000.tmp", "left/c"]


# --- The lock ---------------------------------------------------------------------------------------------------


def lock(run):
    return ObjectLock(run, f"gs://bucket/{run}/locks", beat_seconds=0.4, silent_seconds=1.0)


def hold(gcs, run, number, name, age=0.0):
    """Another process holds the lock."""
    gcs.put("bucket", f"{run}/locks/{number:08d}/", b"", age)
    gcs.put("bucket", f"{run}/locks/{number:08d}/{name}", b"", age)


def test_a_released_lock_is_free(gcs):
    for number in (1, 2):
        with lock("free").held():
            assert [name[11:19] for name in gcs.names("bucket", "free/")] == [f"{number:08d}"]


def test_of_many_processes_one_creates_a_marker(gcs):
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(lambda _: gfile.create_marker("gs://bucket/markers/1"), range(8))) == 1


def test_a_process_of_this_machine_that_ended_loses_the_lock_at_once(gcs):
    process = subprocess.Popen(["true"])
    process.wait()
    hold(gcs, "killed", 7, f"{os.uname().nodename}-{process.pid}-00000000")
    start = time.monotonic()
    with ObjectLock("killed", "gs://bucket/killed/locks").held():
        assert time.monotonic() - start < 60  # 90 are the time to wait for others
        assert [name[13:21] for name in gcs.names("bucket", "killed/")] == ["00000008"]


def test_a_silent_process_of_another_machine_loses_the_lock(gcs, caplog):
    hold(gcs, "gone", 1, "host-1-00000000", 3600.0)
    with lock("gone").held():
        assert not caplog.text
    hold(gcs, "silent", 1, "host-1-00000000")
    with lock("silent").held():
        assert "silent is locked by process 1 of host, seen 0 seconds ago: waiting until" in caplog.text


def test_a_process_that_lives_keeps_the_lock(gcs):
    ended = threading.Event()

    def beat():
        while not ended.wait(0.3):
            gcs.put("bucket", "alive/locks/00000001/host-1-00000000", b"")

    hold(gcs, "alive", 1, "host-1-00000000")
    thread = threading.Thread(target=beat)
    thread.start()
    held = ObjectLock("alive", "gs://bucket/alive/locks", beat_seconds=0.4, silent_seconds=8.0).held()
    with pytest.raises(InputError, match="workdir=alive is in use by process 1 of host: wait for its end"), held:
        pass
    ended.set()
    thread.join()


def test_a_process_that_lost_its_lock_writes_no_more(gcs):
    workdir = Workdir("gs://bucket/lost")
    workdir._object_lock = lock("lost")
    with workdir._object_lock.held():
        workdir.append_metrics({"step": 1})
        hold(gcs, "lost", 2, "host-1-00000000")
        time.sleep(1.5)
        for use in (lambda: workdir.append_metrics({"step": 2}), workdir.sync_metrics):
            with pytest.raises(InputError, match="lost was taken over by process 1 of host while this process did not"):
                use()
    assert [line["step"] for line in workdir.read_metrics()] == [1]
