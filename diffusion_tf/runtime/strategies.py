"""Which tf.distribute strategy runs this: TPU, GPUs, several hosts, or one device."""

import functools
import importlib.metadata
import os

import tensorflow as tf

from diffusion_tf import tpu_attached
from diffusion_tf.errors import ConfigError
from diffusion_tf.storage.files import first_line

STRATEGIES = ("auto", "tpu", "mirrored", "multi_worker", "one_device")


def make_strategy(name: str = "auto", tpu: str | None = None) -> tf.distribute.Strategy:
    """The strategy called `name`; connects to a TPU where one is asked for.

    `auto` is a TPU when `tpu` is given or one is attached, all GPUs when there are several, else one device.
    `mirrored` takes all GPUs, or all logical CPU devices where there is no GPU; `multi_worker` reads TF_CONFIG.

    Args:
      name: one of STRATEGIES.
      tpu: `local` on a TPU VM, for the chips of this one host; or a TPU's name or grpc address. Of a slice of several
        hosts only the name takes all chips, from its first host with TPU_LOAD_LIBRARY=0.

    Raises:
      InputError: an unknown name, a machine without TPU, a TensorFlow that is not for TPUs, or a TPU or cluster that
        cannot be reached.
    """
    if name not in STRATEGIES:
        raise ConfigError("strategy", f"={name}: choose one of {', '.join(STRATEGIES)}")
    if tpu and name not in ("auto", "tpu"):
        raise ConfigError("tpu", f"={tpu} goes with `strategy=tpu` or auto, not {name}")
    # Nothing before this may touch a device: the collectives of several hosts are configured first or not at all.
    if name == "multi_worker":
        return _multi_worker_strategy()
    if name == "tpu" or (name == "auto" and (tpu or _auto_takes_tpu())):
        return _tpu_strategy(tpu or "local")
    gpus = tf.config.list_logical_devices("GPU")
    devices = [device.name for device in gpus or tf.config.list_logical_devices("CPU")]
    if name == "mirrored" or (name == "auto" and len(gpus) > 1):
        return tf.distribute.MirroredStrategy(devices)
    return tf.distribute.OneDeviceStrategy(devices[0])


def _multi_worker_strategy() -> tf.distribute.Strategy:
    if not os.environ.get("TF_CONFIG"):
        raise ConfigError("strategy", "=multi_worker needs TF_CONFIG, which names the workers and this process's place")
    try:
        return tf.distribute.MultiWorkerMirroredStrategy()
    except (ValueError, RuntimeError, tf.errors.OpError) as error:
        raise ConfigError("strategy", f"=multi_worker cannot start ({first_line(error)}): see TF_CONFIG") from error


@functools.cache
def tensorflow_packages() -> frozenset[str]:
    """The installed packages that hold `tensorflow`; several overwrite each other's files."""
    names = importlib.metadata.packages_distributions().get("tensorflow", ())
    return frozenset(name.lower().replace("_", "-") for name in names)


def _auto_takes_tpu() -> bool:
    # With a TPU hidden by a second TensorFlow, `auto` had better be told than train on the CPU.
    hidden = tpu_attached() and tensorflow_packages() > {"tensorflow-tpu"}
    return hidden or bool(tf.config.list_physical_devices("TPU"))


def _check_local_tpu() -> None:
    """Tells why TensorFlow sees no TPU on this machine, where that is known without minutes of trying."""
    if tf.config.list_physical_devices("TPU"):
        return
    if not tpu_attached():
        raise ConfigError(
            "tpu",
            "=local: this machine has no TPU (no /dev/accel0, no /dev/vfio/0):"
            " run on a TPU VM, or leave out `strategy=tpu` and `tpu`",
        )
    packages = tensorflow_packages()
    if packages - {"tensorflow-tpu"}:
        raise ConfigError(
            "tpu",
            f"=local: TensorFlow here is of {' and '.join(sorted(packages))}, and a TPU needs tensorflow-tpu"
            f" alone: pip uninstall {' '.join(sorted(packages))}, then pip install '.[tpu]'",
        )


def _tpu_strategy(tpu: str) -> tf.distribute.Strategy:
    if tpu == "local":
        _check_local_tpu()
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=tpu)
        if tpu != "local":
            tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
    except (ImportError, OSError, ValueError, RuntimeError, tf.errors.OpError) as error:
        hint = ": another process may be using it" if tpu == "local" else ""
        raise ConfigError("tpu", f"={tpu}: cannot reach the TPU ({first_line(error)}){hint}") from error
    return tf.distribute.TPUStrategy(resolver)
