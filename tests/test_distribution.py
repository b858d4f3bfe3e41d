"""Which strategy runs this."""

import numpy as np
import pytest
import tensorflow as tf

from diffusion_tf.distribution import is_chief, make_strategy, over_replicas, per_replica_batch_size
from diffusion_tf.errors import InputError


def test_strategies():
    one, eight = make_strategy("one_device"), make_strategy("mirrored")
    assert (one.num_replicas_in_sync, eight.num_replicas_in_sync) == (1, 8)
    assert is_chief(one) and is_chief(eight)
    assert make_strategy("auto").num_replicas_in_sync == max(1, len(tf.config.list_logical_devices("GPU")))
    assert per_replica_batch_size(24, eight) == 3


@pytest.mark.skipif(bool(tf.config.list_physical_devices("TPU")), reason="a TPU is attached")
def test_an_absent_tpu_is_named():
    with pytest.raises(InputError, match="--tpu=local: cannot reach the TPU"):
        make_strategy("tpu")


def test_flags_that_do_not_go_together(monkeypatch):
    with pytest.raises(InputError, match="--tpu=local goes with --strategy=tpu or auto, not mirrored"):
        make_strategy("mirrored", "local")
    monkeypatch.delenv("TF_CONFIG", raising=False)
    with pytest.raises(InputError, match="--strategy=multi_worker needs TF_CONFIG"):
        make_strategy("multi_worker")


def test_unknown_strategy_lists_the_choices():
    with pytest.raises(InputError, match="--strategy=horovod: choose one of auto, tpu, mirrored"):
        make_strategy("horovod")


@pytest.mark.parametrize("name", ["one_device", "mirrored"])
def test_a_batch_is_shared_out_over_replicas(name):
    strategy = make_strategy(name)
    per_replica = 16 // strategy.num_replicas_in_sync

    def function(first, x):
        assert x.shape == (per_replica, 3)
        return {"index": first + tf.range(per_replica, dtype=tf.int64), "sum": tf.reduce_sum(x, axis=1)}

    call = over_replicas(function, strategy, 16)
    x = np.random.RandomState(0).standard_normal((16, 3)).astype(np.float32)
    for count in (16, 5):
        results = call(100, x[:count])
        np.testing.assert_array_equal(results["index"], 100 + np.arange(count))
        np.testing.assert_allclose(results["sum"], x[:count].sum(axis=1), rtol=1e-5)
