"""The choice of a strategy, and the environment that it needs."""

import os
import pathlib
import subprocess
import sys
import urllib.error

import pytest
import tensorflow as tf
from support.machines import machine

from diffusion_tf import tpu_attached
from diffusion_tf.errors import InputError
from diffusion_tf.runtime.strategies import make_strategy, tensorflow_packages

# TensorFlow sees an attached TPU, whatever these tests pretend.
no_tpu_here = pytest.mark.skipif(bool(tf.config.list_physical_devices("TPU")), reason="a TPU is attached")


def test_strategies_use_one_device_or_all():
    assert make_strategy("one_device").num_replicas_in_sync == 1
    assert make_strategy("mirrored").num_replicas_in_sync == 8
    assert make_strategy("auto").num_replicas_in_sync == max(1, len(tf.config.list_logical_devices("GPU")))


@pytest.mark.parametrize(
    ("files", "attached"),
    [
        ("/dev/null", False),
        ("/dev/accel /dev/accel/accel0", False),  # Linux's accelerator subsystem
        ("/dev/vfio/vfio", False),  # every machine with VFIO has it
        ("/dev/accel0 /dev/accel1", True),
        ("/dev/vfio/vfio /dev/vfio/0", True),
    ],
)
def test_a_tpu_is_recognized_by_its_device_files(files, attached):
    with machine(files=files):
        assert tpu_attached() == attached


def test_programs_look_for_a_tpu_before_they_import_tensorflow(tmp_path):
    (tmp_path / "tensorflow.py").write_text("import os\nraise SystemExit(os.environ.get('TPU_LOAD_LIBRARY', 'unset'))")
    environment = {name: value for name, value in os.environ.items() if name != "TPU_LOAD_LIBRARY"}
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [sys.executable, "-m", "experiments.train", "--workdir=w"],
        cwd=pathlib.Path(__file__).parent.parent.parent,
        env={**environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stderr.strip() == ("unset" if tpu_attached() else "0")


_COUNT_PAGE_FAULTS = """
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
def test_memory_is_reused_from_step_to_step():
    result = subprocess.run(
        [sys.executable, "-c", _COUNT_PAGE_FAULTS],
        cwd=pathlib.Path(__file__).parent.parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    faults, pages_of_one_result = map(int, result.stdout.split())
    assert faults < pages_of_one_result


@no_tpu_here
def test_an_absent_tpu_is_an_error_and_auto_does_without_it():
    for packages in ("tensorflow", "tensorflow-tpu", "tensorflow tensorflow-tpu"):
        with machine(packages=packages):
            for flags in [("tpu",), ("tpu", "local"), ("auto", "local")]:
                with pytest.raises(InputError, match="tpu=local: this machine has no TPU .*: run on a TPU VM, or"):
                    make_strategy(*flags)
            assert isinstance(make_strategy("auto"), tf.distribute.OneDeviceStrategy)


@no_tpu_here
def test_a_tensorflow_that_hides_the_tpu_is_an_error():
    with machine(files="/dev/accel0", packages="tensorflow tensorflow-tpu"):
        for flags in [("tpu",), ("auto", "local"), ("auto",)]:
            message = "of tensorflow and tensorflow-tpu, .* alone: pip uninstall tensorflow tensorflow-tpu, then pip"
            with pytest.raises(InputError, match=f"tpu=local: TensorFlow here is {message}"):
                make_strategy(*flags)

    with machine(files="/dev/accel0", packages="tensorflow-cpu"):
        with pytest.raises(InputError, match="of tensorflow-cpu, .*: pip uninstall tensorflow-cpu, then pip install"):
            make_strategy("tpu")
        assert isinstance(make_strategy("auto"), tf.distribute.OneDeviceStrategy)


@no_tpu_here
def test_a_tpu_that_cannot_be_reached_is_an_error(monkeypatch):
    with machine(files="/dev/accel0", packages="tensorflow-tpu"):
        with pytest.raises(InputError, match=r"tpu=local: cannot reach the TPU \(.*\): another process may be using"):
            make_strategy("tpu")

        def resolver(tpu):
            raise urllib.error.URLError(f"who is {tpu}")

        monkeypatch.setattr(tf.distribute.cluster_resolver, "TPUClusterResolver", resolver)
        with pytest.raises(InputError, match="tpu=mine: cannot reach the TPU .*who is mine"):
            make_strategy("auto", "mine")


def test_packages_have_normalized_names():
    with machine(packages="TensorFlow_TPU a"):
        assert tensorflow_packages() == {"tensorflow-tpu", "a"}
    with machine(packages=""):
        assert tensorflow_packages() == set()


def test_settings_that_do_not_fit_are_refused(monkeypatch):
    with pytest.raises(InputError, match="tpu=local goes with `strategy=tpu` or auto, not mirrored"):
        make_strategy("mirrored", "local")
    monkeypatch.delenv("TF_CONFIG", raising=False)
    with pytest.raises(InputError, match="TF_CONFIG is not set: it must be like"):
        make_strategy("multi_worker")


def test_an_unknown_strategy_is_refused_with_the_choices():
    with pytest.raises(InputError, match="strategy=horovod: choose one of auto, tpu, mirrored"):
        make_strategy("horovod")
