"""Checkpoints are complete and verified, or refused."""

import hashlib
import json
import os
import resource

import numpy as np
import pytest
import safetensors.numpy

from diffusion_tf.errors import DamagedFileError, DivergedError, InputError
from diffusion_tf.storage import checkpoints

ARRAYS = {"params/a": np.arange(6, dtype=np.float32).reshape(2, 3), "step": np.asarray(7, np.int64)}


def test_a_checkpoint_reads_back_exactly(tmp_path):
    path = checkpoints.save(str(tmp_path), 7, ARRAYS)
    loaded = checkpoints.load(path)
    assert loaded.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(loaded[name], array)
        assert loaded[name].dtype == array.dtype and loaded[name].shape == array.shape
    assert os.listdir(tmp_path) == ["step_00000007.safetensors"]


def test_any_flipped_byte_or_cut_is_detected(tmp_path):
    path = checkpoints.save(str(tmp_path), 7, ARRAYS)
    with open(path, "rb") as file:
        sound = file.read()
    flipped = [sound[:i] + bytes([sound[i] ^ 1]) + sound[i + 1 :] for i in range(len(sound))]
    for damaged in (sound[:-1], sound[:20], b"", *flipped):
        with open(path, "wb") as file:
            file.write(damaged)
        with pytest.raises(InputError, match="step_00000007.safetensors .*damaged.*: remove it, or name another"):
            checkpoints.load(path)


def test_errors_name_missing_checkpoints(tmp_path):
    with pytest.raises(InputError, match="cannot read .*none.safetensors"):
        checkpoints.load(str(tmp_path / "none.safetensors"))
    with pytest.raises(InputError, match="holds no checkpoint; there are: none"):
        checkpoints.find(str(tmp_path))
    checkpoints.save(str(tmp_path), 7, ARRAYS)
    with pytest.raises(InputError, match="holds no checkpoint of step 8; there are: 7"):
        checkpoints.find(str(tmp_path), 8)
    assert checkpoints.find(str(tmp_path))[0] == 7


def test_old_checkpoints_are_kept_by_count_and_by_period(tmp_path):
    for step in range(10, 110, 10):
        checkpoints.save(str(tmp_path), step, ARRAYS)
        checkpoints.remove_old(str(tmp_path), keep=2, keep_every=40)
    assert checkpoints.all_steps(str(tmp_path)) == [40, 80, 90, 100]


def test_a_half_written_file_is_ignored(tmp_path):
    checkpoints.save(str(tmp_path), 10, ARRAYS)
    (tmp_path / "step_00000020.safetensors.tmp").write_bytes(b"half")
    assert checkpoints.all_steps(str(tmp_path)) == [10]


def damage(path):
    with open(path, "r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"\xff")


def test_the_manifest_describes_the_checkpoint(tmp_path):
    path = checkpoints.save(str(tmp_path), 7, ARRAYS, {"config_sha256": "c"})
    manifest = checkpoints.load_manifest(path)
    assert manifest["format"] == 2 and manifest["step"] == 7 and manifest["num_bytes"] == 6 * 4 + 8
    assert manifest["config_sha256"] == "c" and manifest["packages"]["numpy"] == np.__version__
    with open(path, "rb") as file:
        first = file.read()
    checkpoints.save(str(tmp_path), 7, ARRAYS, {"config_sha256": "c"})
    with open(path, "rb") as file:
        assert file.read() == first
    checkpoints.save(str(tmp_path), 7, ARRAYS, {"config_sha256": "d"})
    assert checkpoints.load_digest(path) != manifest["sha256"]


def test_a_checkpoint_of_format_1_is_read(tmp_path):
    digest = hashlib.sha256()
    for name in sorted(ARRAYS):
        array = np.ascontiguousarray(ARRAYS[name])  # a scalar counts as one of shape (1,)
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode() + array.tobytes())
    path = tmp_path / "step_00000007.safetensors"
    path.write_bytes(safetensors.numpy.save(ARRAYS, {"sha256": digest.hexdigest()}))
    np.testing.assert_array_equal(checkpoints.load(str(path))["params/a"], ARRAYS["params/a"])
    assert checkpoints.load_digest(str(path)) == digest.hexdigest()
    damage(path)
    with pytest.raises(DamagedFileError, match="do not match their SHA-256"):
        checkpoints.load(str(path))


def test_the_newest_undamaged_checkpoint_is_restored(tmp_path, caplog):
    folder, restored = str(tmp_path), []
    restore = lambda path: restored.append(checkpoints.load(path)["step"])
    assert checkpoints.restore_newest(folder, restore) is None
    paths = [checkpoints.save(folder, step, {"step": np.asarray(step)}) for step in (1, 2, 3)]
    damage(paths[2])
    assert checkpoints.restore_newest(folder, restore) == paths[1] and restored == [2]
    assert (
        "going back to an older checkpoint: " in caplog.text and "step_00000003.safetensors is damaged" in caplog.text
    )
    assert checkpoints.all_steps(folder) == [1, 2, 3]
    for path in paths[:2]:
        damage(path)
    with pytest.raises(InputError, match=r"only damaged checkpoints, of steps \[1, 2, 3\]"):
        checkpoints.restore_newest(folder, restore)


def test_a_damaged_checkpoint_replaces_no_undamaged_one(tmp_path):
    folder = str(tmp_path)
    paths = {step: checkpoints.save(folder, step, ARRAYS) for step in (1, 2, 3, 4, 5)}
    damage(paths[5])
    damage(paths[3])
    checkpoints.remove_old(folder, keep=2, keep_every=0)
    assert checkpoints.all_steps(folder) == [2, 3, 4, 5]  # 4 and 2 are the two newest undamaged ones
    known: set[int] = set()
    checkpoints.save(folder, 5, ARRAYS)
    checkpoints.remove_old(folder, keep=2, keep_every=0, sound=known)
    assert checkpoints.all_steps(folder) == [4, 5] and known == {4, 5}


def test_a_damaged_copy_does_not_replace_the_best_checkpoint(tmp_path):
    best = str(tmp_path / "best")
    checkpoints.copy_into(best, checkpoints.save(str(tmp_path), 1, ARRAYS))
    damaged = checkpoints.save(str(tmp_path), 2, ARRAYS)
    damage(damaged)
    with pytest.raises(DamagedFileError):
        checkpoints.copy_into(best, damaged)
    assert 1 in checkpoints.all_steps(best)
    checkpoints.load(checkpoints.checkpoint_path(best, 1))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_arrays_that_are_not_finite_are_not_saved(tmp_path, value):
    with pytest.raises(DivergedError, match="the checkpoint of step 8 was not written: ema/w is not finite"):
        checkpoints.save(str(tmp_path), 8, {"ema/w": np.array([1.0, value], np.float32)})
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_older_checkpoints_intact(tmp_path):
    folder = str(tmp_path)
    checkpoints.save(folder, 7, ARRAYS)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))  # the kernel fails the write as on a full disk
    try:
        with pytest.raises(InputError, match="cannot write .*step_00000008.safetensors"):
            checkpoints.save(folder, 8, ARRAYS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(folder) == ["step_00000007.safetensors"]
    checkpoints.load(checkpoints.checkpoint_path(folder, 7))


def test_a_larger_checkpoint_is_refused_before_it_is_read(tmp_path):
    path = checkpoints.save(str(tmp_path), 7, ARRAYS)
    with pytest.raises(InputError, match="holds another network: its arrays take 32 bytes, not 31"):
        checkpoints.load(path, 31)


def test_checkpoints_work_in_an_object_store():
    folder = "ram://checkpoints"  # takes the same path through tf.io.gfile as gs://
    for step in (1, 2, 3):
        checkpoints.save(folder, step, ARRAYS)
        checkpoints.remove_old(folder, keep=2, keep_every=0)
    assert checkpoints.all_steps(folder) == [2, 3]
    assert checkpoints.load(checkpoints.find(folder)[1]).keys() == ARRAYS.keys()


def test_the_manifest_is_one_entry_of_the_header(tmp_path):
    """The library writes several entries in random order, and equal checkpoints must be equal files."""
    with open(checkpoints.save(str(tmp_path), 7, ARRAYS), "rb") as file:
        content = file.read()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert list(header["__metadata__"]) == ["manifest"]
