"""Parts of a measurement are computed once, and kept apart from those of any other."""

import numpy as np
import pytest

from diffusion_tf.storage.resumable import Parts


def test_parts_are_computed_once(tmp_path):
    calls = []

    def compute(first, count):
        calls.append((first, count))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return {"x": np.arange(first, first + count)}

    def collect(description):
        parts = Parts(str(tmp_path), description, num_examples=10, batch_size=4)
        return parts, list(parts.compute(compute, "test"))

    with pytest.raises(KeyboardInterrupt):
        collect({"seed": 1})
    parts, arrays = collect({"seed": 1})
    assert calls == [(0, 4), (4, 4), (8, 2), (8, 2)]
    np.testing.assert_array_equal(np.concatenate([part["x"] for part in arrays]), np.arange(10))
    collect({"seed": 2})
    assert calls[4:] == [(0, 4), (4, 4), (8, 2)]
    parts.remove()
    collect({"seed": 2})
    assert len(calls) == 7  # the other measurement's parts are still there
    collect({"seed": 1})
    assert len(calls) == 10
