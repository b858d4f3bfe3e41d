"""Batches of a measurement are computed once, and never shared with another measurement."""

import numpy as np
import pytest

from diffusion_tf.storage.resumable import ResumableBatches


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
