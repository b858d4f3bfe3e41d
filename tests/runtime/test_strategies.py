"""Which strategy runs this."""

import fnmatch
import glob
import importlib.metadata
import os
import pathlib
import subprocess
import sys
import urllib.error

import numpy as np
import pytest
import tensorflow as tf
from support import golden

from diffusion_tf import tpu_attached
from diffusion_tf.errors import InputError
from diffusion_tf.ops.cpu.regions import in_cpu_graph
from diffusion_tf.presets import get_preset
from diffusion_tf.runtime import strategies
from diffusion_tf.runtime.replicas import over_replicas, per_replica_batch_size, replica_function
from diffusion_tf.runtime.strategies import make_strategy
from diffusion_tf.runtime.workers import is_chief

# TensorFlow sees it, so that nothing here can hide it.
no_tpu_here = pytest.mark.skipif(bool(tf.config.list_physical_devices("TPU")), reason="a TPU is attached")


def pretend(monkeypatch, *, attached, packages):
    """A machine with or without a TPU's files, and with these packages of TensorFlow."""
    monkeypatch.setattr(strategies, "tpu_attached", lambda: attached)
    monkeypatch.setattr(strategies, "tensorflow_packages", lambda: frozenset(packages.split()))


def test_strategies():
    one, eight = make_strategy("one_device"), make_strategy("mirrored")
    assert (one.num_replicas_in_sync, eight.num_replicas_in_sync) == (1, 8)
    assert is_chief(one) and is_chief(eight)
    assert make_strategy("auto").num_replicas_in_sync == max(1, len(tf.config.list_logical_devices("GPU")))
    assert per_replica_batch_size(24, eight) == 3


@pytest.mark.parametrize(
    ("files", "attached"),
    [
        ("/dev/null", False),
        ("/dev/accel /dev/accel/accel0", False),  # Linux's own accelerators
        ("/dev/vfio/vfio", False),  # of every machine with VFIO
        ("/dev/accel0 /dev/accel1", True),
        ("/dev/vfio/vfio /dev/vfio/0", True),
    ],
)
def test_a_tpu_is_known_by_its_files(files, attached, monkeypatch):
    monkeypatch.setattr(glob, "glob", lambda pattern: fnmatch.filter(files.split(), pattern))
    assert tpu_attached() == attached


def test_programs_look_for_a_tpu_before_tensorflow_does(tmp_path):
    (tmp_path / "tensorflow.py").write_text("import os\nraise SystemExit(os.environ.get('TPU_LOAD_LIBRARY', 'unset'))")
    environment = {name: value for name, value in os.environ.items() if name != "TPU_LOAD_LIBRARY"}
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [sys.executable, "-m", "experiments.train"],
        cwd=pathlib.Path(__file__).parent.parent.parent,
        env={**environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stderr.strip() == ("unset" if tpu_attached() else "0")


_FAULTS_OF_KEPT_MEMORY = """
import resource
import diffusion_tf
import tensorflow as tf

def faults(calls):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        x + 1.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

x = tf.zeros([2**26 // 4])
faults(3)
print(faults(4), x.shape.num_elements() * 4 // resource.getpagesize())
"""


@no_tpu_here
def test_memory_is_kept_from_step_to_step():
    result = subprocess.run(
        [sys.executable, "-c", _FAULTS_OF_KEPT_MEMORY],
        cwd=pathlib.Path(__file__).parent.parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    faults, pages_of_one_result = map(int, result.stdout.split())
    assert faults < pages_of_one_result


@no_tpu_here
def test_an_absent_tpu_is_named_and_auto_does_without(monkeypatch):
    for packages in ("tensorflow", "tensorflow-tpu", "tensorflow tensorflow-tpu"):
        pretend(monkeypatch, attached=False, packages=packages)
        for flags in [("tpu",), ("tpu", "local"), ("auto", "local")]:
            with pytest.raises(InputError, match="tpu=local: this machine has no TPU .*: run on a TPU VM, or leave"):
                make_strategy(*flags)
        assert isinstance(make_strategy("auto"), tf.distribute.OneDeviceStrategy)


@no_tpu_here
def test_tensorflow_that_hides_the_tpu_is_named(monkeypatch):
    pretend(monkeypatch, attached=True, packages="tensorflow tensorflow-tpu")
    hidden = "tensorflow and tensorflow-tpu, .* tensorflow-tpu alone: pip uninstall tensorflow tensorflow-tpu, then pip"
    for flags in [("tpu",), ("auto", "local"), ("auto",)]:
        with pytest.raises(InputError, match=f"tpu=local: TensorFlow here is of {hidden}"):
            make_strategy(*flags)

    pretend(monkeypatch, attached=True, packages="tensorflow-cpu")
    with pytest.raises(InputError, match="is of tensorflow-cpu, .*: pip uninstall tensorflow-cpu, then pip install"):
        make_strategy("tpu")
    assert isinstance(make_strategy("auto"), tf.distribute.OneDeviceStrategy)


@no_tpu_here
def test_a_tpu_out_of_reach_is_named(monkeypatch):
    pretend(monkeypatch, attached=True, packages="tensorflow-tpu")
    with pytest.raises(InputError, match=r"tpu=local: cannot reach the TPU \(.*\): another process may be using it"):
        make_strategy("tpu")

    def resolver(tpu):
        raise urllib.error.URLError(f"who is {tpu}")

    monkeypatch.setattr(tf.distribute.cluster_resolver, "TPUClusterResolver", resolver)
    with pytest.raises(InputError, match="tpu=mine: cannot reach the TPU .*who is mine"):
        make_strategy("auto", "mine")


def test_packages_of_tensorflow(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: {"tensorflow": ["TensorFlow_TPU", "a"]})
    assert strategies.tensorflow_packages.__wrapped__() == {"tensorflow-tpu", "a"}
    monkeypatch.setattr(importlib.metadata, "packages_distributions", dict)
    assert strategies.tensorflow_packages.__wrapped__() == set()


def test_xla_where_there_is_one(monkeypatch):
    cpu, gpu = tf.distribute.OneDeviceStrategy("CPU:1"), tf.distribute.OneDeviceStrategy("GPU:0")
    for packages, strategy, compiled in [
        ("tensorflow", cpu, True),
        ("tensorflow-tpu", cpu, False),
        ("tensorflow tensorflow-tpu", cpu, False),
        ("tensorflow tensorflow-tpu", gpu, True),
        ("tensorflow", make_strategy("mirrored"), False),
    ]:
        pretend(monkeypatch, attached=False, packages=packages)
        function = replica_function(tf.identity, strategy)
        assert getattr(function, "_jit_compile", False) == compiled

    pretend(monkeypatch, attached=False, packages="tensorflow")
    for image_size, in_regions in [(32, True), (16, True), (8, False)]:
        trained = golden.KnownModel(get_preset("digits", image_size=image_size), cpu, None, None)
        call = trained.over_replicas(lambda _: tf.fill([2], in_cpu_graph()), 2)
        assert bool(call(0).numpy().all()) == in_regions
    assert replica_function(tf.identity, gpu, in_regions=True)._jit_compile

    pretend(monkeypatch, attached=False, packages="tensorflow-tpu")
    call = over_replicas(lambda first, x: x + 1, cpu, 2)
    np.testing.assert_array_equal(call(0, tf.constant([1, 2])), [2, 3])


def test_flags_that_do_not_go_together(monkeypatch):
    with pytest.raises(InputError, match="tpu=local goes with `strategy=tpu` or auto, not mirrored"):
        make_strategy("mirrored", "local")
    monkeypatch.delenv("TF_CONFIG", raising=False)
    with pytest.raises(InputError, match="strategy=multi_worker needs TF_CONFIG"):
        make_strategy("multi_worker")


def test_unknown_strategy_lists_the_choices():
    with pytest.raises(InputError, match="strategy=horovod: choose one of auto, tpu, mirrored"):
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
