"""Batches of a measurement are computed once, and never shared with another measurement."""

import numpy as np
import pytest

from diffusion_tf.storage.files import write_file
from diffusion_tf.storage.resumable import ResumableBatches


def test_a_damaged_batch_is_computed_again_with_a_warning(tmp_path, caplog):
    calls = []

    def compute(first, count):
        calls.append(first)
        return {"x": np.arange(first, first + count), "y": np.ones(count)}

    batches = ResumableBatches(str(tmp_path), {}, num_examples=4, batch_size=2)
    list(batches.compute(compute, "test"))
    part = f"{batches.folder}/part_00000002.npz"
    with open(part, "rb") as file:
        sound = file.read()
    with np.load(part) as archive:
        arrays = dict(archive)
    for damage in (
        lambda: write_file(part, sound[:-30]),
        lambda: write_file(part, b""),
        lambda: write_file(part, sound.replace(np.arange(2, 4).tobytes(), bytes(16))),
        lambda: np.savez(part),
        lambda: np.savez(part, **{**arrays, "x": np.arange(2)}),
        lambda: np.savez(part, x=np.arange(2, 4)),
    ):
        calls.clear()
        caplog.clear()
        damage()
        found = np.concatenate([batch["x"] for batch in batches.compute(compute, "test")])
        assert calls == [2] and "part_00000002.npz is" in caplog.text and "it is computed again" in caplog.text
        np.testing.assert_array_equal(found, np.arange(4))
    assert [batch.keys() for batch in batches.compute(compute, "test")] == [{"x", "y"}] * 2


def test_an_interrupted_measurement_continues(tmp_path):
    calls = []

    def compute(first, count):
        calls.append((first, count))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return {"x": np.arange(first, first + count)}

    def collect(description):
        batches = ResumableBatches(str(tmp_path), description, num_examples=10, batch_size=4)
        return batches, list(batches.compute(compute, "test"))

    with pytest.raises(KeyboardInterrupt):
        collect({"seed": 1})
    batches, arrays = collect({"seed": 1})
    assert calls == [(0, 4), (4, 4), (8, 2), (8, 2)]
    np.testing.assert_array_equal(np.concatenate([batch["x"] for batch in arrays]), np.arange(10))
    collect({"seed": 2})
    assert calls[4:] == [(0, 4), (4, 4), (8, 2)]
    batches.remove()
    collect({"seed": 2})
    assert len(calls) == 7  # the batches of seed 2 are still there
    collect({"seed": 1})
    assert len(calls) == 10
