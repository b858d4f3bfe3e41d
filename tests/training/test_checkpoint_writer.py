"""Checkpoints written in the background."""

import threading

import numpy as np
import pytest
from support.tiny_runs import TINY

from diffusion_tf.errors import InputError
from diffusion_tf.storage import checkpoints
from diffusion_tf.storage.workdir import Workdir
from diffusion_tf.training.checkpoint_writer import CheckpointWriter

ARRAYS = {"step": np.array(0)}


def test_write_returns_before_the_checkpoint_is_complete(tmp_path):
    go_on = threading.Event()

    def slow_save(*args):
        assert go_on.wait(300)
        return checkpoints.save(*args)

    workdir = Workdir(str(tmp_path))
    writer = CheckpointWriter(workdir, TINY, slow_save)
    writer.write(2, ARRAYS, {})
    assert checkpoints.all_steps(workdir.checkpoints) == []
    go_on.set()
    writer.close()
    assert checkpoints.all_steps(workdir.checkpoints) == [2]


def test_a_checkpoint_that_cannot_be_written_is_an_error_at_the_next_one(tmp_path):
    def failing_save(*_):
        raise InputError("cannot write it: the disk is full")

    writer = CheckpointWriter(Workdir(str(tmp_path)), TINY, failing_save)
    writer.write(2, ARRAYS, {})
    with pytest.raises(InputError, match="the disk is full"):
        writer.write(4, ARRAYS, {})
    writer.close()  # the error is raised once


def test_unfinished_files_of_an_earlier_process_are_removed(tmp_path):
    workdir = Workdir(str(tmp_path))
    unfinished = tmp_path / "checkpoints" / "step_00000002.safetensors.tmp"
    unfinished.parent.mkdir()
    unfinished.write_bytes(b"half of one")
    CheckpointWriter(workdir, TINY).close()
    assert not unfinished.exists()
