"""Functions that replicas run: compilation, backends, and batches shared between replicas."""

import numpy as np
import pytest
import tensorflow as tf
from support.machines import machine

from diffusion_tf.errors import ConfigError
from diffusion_tf.ops import backend
from diffusion_tf.runtime.replicas import cpu_backend, over_replicas, per_replica_batch_size, replica_function
from diffusion_tf.runtime.strategies import make_strategy

CPU, GPU = tf.distribute.OneDeviceStrategy("CPU:1"), tf.distribute.OneDeviceStrategy("GPU:0")


@pytest.mark.parametrize(
    ("packages", "strategy", "on_cpu", "compiled"),
    [
        ("tensorflow", CPU, backend.XLA, True),
        ("tensorflow", CPU, cpu_backend(32**2), False),
        ("tensorflow-tpu", CPU, backend.XLA, False),
        ("tensorflow tensorflow-tpu", CPU, backend.XLA, False),
        ("tensorflow tensorflow-tpu", GPU, backend.XLA, True),
        ("tensorflow", GPU, cpu_backend(32**2), True),
        ("tensorflow", make_strategy("mirrored"), backend.XLA, False),
    ],
)
def test_one_device_with_xla_compiles_the_whole_program(packages, strategy, on_cpu, compiled):
    with machine(packages=packages):
        function = replica_function(tf.identity, strategy, on_cpu)
    assert getattr(function, "_jit_compile", False) == compiled


def test_replicas_on_a_tpu_compute_the_operations_for_it():
    strategy = object.__new__(tf.distribute.TPUStrategy)  # without looking for the TPU
    function = replica_function(lambda: backend.current(), strategy, cpu_backend(32**2))
    assert function() == backend.TPU
    assert backend.current() == backend.XLA


@pytest.mark.parametrize(
    ("packages", "image_size", "training", "cpu_graph"),
    [
        ("tensorflow", 32, False, True),
        ("tensorflow", 16, False, True),
        ("tensorflow", 8, False, False),
        ("tensorflow", 8, True, True),
        ("tensorflow-tpu", 32, False, False),
    ],
)
def test_a_cpu_runs_large_images_and_training_steps_as_a_graph(packages, image_size, training, cpu_graph):
    on_cpu = cpu_backend(image_size**2, training=training)
    with machine(packages=packages):
        call = over_replicas(lambda _: tf.fill([2], backend.current().cpu_graph), CPU, 2, on_cpu)
    assert call(0).numpy().tolist() == 2 * [cpu_graph]
    assert backend.current() == backend.XLA  # outside of the program


@pytest.mark.parametrize(
    ("name", "packages"), [("one_device", "tensorflow"), ("one_device", "tensorflow-tpu"), ("mirrored", "tensorflow")]
)
def test_replicas_share_a_batch(name, packages):
    strategy = make_strategy(name)
    per_replica = 16 // strategy.num_replicas_in_sync

    def function(first, x):
        assert x.shape == (per_replica, 3)
        return {"index": first + tf.range(per_replica, dtype=tf.int64), "sum": tf.reduce_sum(x, axis=1)}

    with machine(packages=packages):
        call = over_replicas(function, strategy, 16)
    x = np.random.RandomState(0).standard_normal((16, 3)).astype(np.float32)
    for count in (16, 5):
        results = call(100, x[:count])
        np.testing.assert_array_equal(results["index"], 100 + np.arange(count))
        np.testing.assert_allclose(results["sum"], x[:count].sum(axis=1), rtol=1e-5)


def test_a_batch_is_divided_by_the_replicas():
    eight = make_strategy("mirrored")
    assert per_replica_batch_size(24, eight) == 3
    for batch_size in (12, 0):
        with pytest.raises(ConfigError, match=f"batch_size={batch_size} must be a positive multiple of the 8 replicas"):
            per_replica_batch_size(batch_size, eight)
