"""Checkpoints are whole or refused."""

import os

import numpy as np
import pytest

from diffusion_tf import checkpoints
from diffusion_tf.errors import InputError

ARRAYS = {"params/a": np.arange(6, dtype=np.float32).reshape(2, 3), "step": np.asarray(7, np.int64)}


def test_round_trip_is_exact(tmp_path):
    path = checkpoints.save(str(tmp_path), 7, ARRAYS)
    loaded = checkpoints.load(path)
    assert loaded.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(loaded[name], array)
        assert loaded[name].dtype == array.dtype and loaded[name].shape == array.shape
    assert os.listdir(tmp_path) == ["step_00000007.safetensors"]


def test_every_damaged_byte_is_noticed(tmp_path):
    path = checkpoints.save(str(tmp_path), 7, ARRAYS)
    with open(path, "rb") as file:
        sound = file.read()
    flipped = [sound[:i] + bytes([sound[i] ^ 1]) + sound[i + 1 :] for i in range(len(sound))]
    for damaged in (sound[:-1], sound[:20], b"", *flipped):
        with open(path, "wb") as file:
            file.write(damaged)
        with pytest.raises(InputError, match="step_00000007.safetensors .*damaged.*: remove it to go on"):
            checkpoints.load(path)


def test_missing_checkpoints_are_named(tmp_path):
    with pytest.raises(InputError, match="cannot read .*none.safetensors"):
        checkpoints.load(str(tmp_path / "none.safetensors"))
    with pytest.raises(InputError, match="holds no checkpoint; there are: none"):
        checkpoints.find(str(tmp_path))
    checkpoints.save(str(tmp_path), 7, ARRAYS)
    with pytest.raises(InputError, match="holds no checkpoint of step 8; there are: 7"):
        checkpoints.find(str(tmp_path), 8)
    assert checkpoints.find(str(tmp_path))[0] == 7


def test_kept_by_count_and_by_period(tmp_path):
    for step in range(10, 110, 10):
        checkpoints.save(str(tmp_path), step, ARRAYS)
        checkpoints.remove_old(str(tmp_path), keep=2, keep_every=40)
    assert checkpoints.all_steps(str(tmp_path)) == [40, 80, 90, 100]


def test_a_half_written_file_is_no_checkpoint(tmp_path):
    checkpoints.save(str(tmp_path), 10, ARRAYS)
    (tmp_path / "step_00000020.safetensors.tmp").write_bytes(b"half")
    assert checkpoints.all_steps(str(tmp_path)) == [10]
