"""Chooses the tf.distribute strategy: a TPU, GPUs, several hosts, or one device."""

import functools
import importlib.metadata
import signal
import threading

import tensorflow as tf

from diffusion_tf import tpu_attached
from diffusion_tf.errors import ConfigError
from diffusion_tf.runtime import STRATEGIES
from diffusion_tf.runtime.cluster import read_cluster, wait_for_all
from diffusion_tf.runtime.slices import slice_workers, wait_for_servers
from diffusion_tf.runtime.workers import lost_server
from diffusion_tf.storage.files import first_line


def make_strategy(name: str = "auto", tpu: str | None = None) -> tf.distribute.Strategy:
    """Makes the strategy called `name`, and connects to its TPU if it has one.

    `auto` uses a TPU if `tpu` is given or one is attached, else all GPUs if there are several, else one device.
    `mirrored` uses all GPUs, or all logical CPU devices if there is no GPU. `multi_worker` reads TF_CONFIG.

    Args:
      name: one of STRATEGIES.
      tpu: `local` for the chips of the TPU VM that this process runs on; `slice` for all chips of its slice, on worker
        0 and with TPU_LOAD_LIBRARY=0; `grpc://HOST:PORT,HOST:PORT,...` for those of these servers; or a TPU's name.

    Raises:
      ConfigError: the name is unknown, the machine has no TPU, TensorFlow is not built for TPUs, or the TPU or cluster
        cannot be reached.
      InputError: TF_CONFIG does not describe the cluster.
      PreemptedError: a server of the TPU's slice is gone.
    """
    if name not in STRATEGIES:
        raise ConfigError("strategy", f"={name}: choose one of {', '.join(STRATEGIES)}")
    if tpu and name not in ("auto", "tpu"):
        raise ConfigError("tpu", f"={tpu} goes with `strategy=tpu` or auto, not {name}")
    # TensorFlow configures collectives between hosts only before anything touches a device.
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
    wait_for_all(*read_cluster())
    try:
        return tf.distribute.MultiWorkerMirroredStrategy()
    except (ValueError, RuntimeError, tf.errors.OpError) as error:
        raise ConfigError("strategy", f"=multi_worker cannot start ({first_line(error)}): see TF_CONFIG") from error


@functools.cache
def tensorflow_packages() -> frozenset[str]:
    """The installed packages that provide the module `tensorflow`; if there are several, they overwrite each other."""
    names = importlib.metadata.packages_distributions().get("tensorflow", ())
    return frozenset(name.lower().replace("_", "-") for name in names)


def _auto_takes_tpu() -> bool:
    # If a second TensorFlow hides the TPU, choose the TPU, which raises an error, rather than train on the CPU.
    hidden = tpu_attached() and tensorflow_packages() > {"tensorflow-tpu"}
    return hidden or bool(tf.config.list_physical_devices("TPU"))


def _check_local_tpu() -> None:
    """Raises ConfigError if TensorFlow cannot use a TPU here; connecting to it would take minutes to fail."""
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
    workers = slice_workers(tpu)
    if workers:
        wait_for_servers(workers)
        tpu = "grpc://" + ",".join(workers)
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=tpu)
        if tpu != "local":
            tf.config.experimental_connect_to_cluster(resolver)
            _keep_signals()
        if workers and any(name.endswith("/device:CPU:1") for name in _cpus_of_servers()):
            return _rehearsal_strategy(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
    except (ImportError, OSError, ValueError, RuntimeError, tf.errors.OpError) as error:
        if isinstance(error, tf.errors.OpError) and (lost := lost_server(workers, error)):
            raise lost from error
        hint = ": another process may be using it" if tpu == "local" else ""
        raise ConfigError("tpu", f"={tpu}: cannot reach the TPU ({first_line(error)}){hint}") from error
    return tf.distribute.TPUStrategy(resolver)


def _keep_signals() -> None:
    """Sets this process's handler of SIGTERM again: TensorFlow's coordination service has set its own, a no-op."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


def _cpus_of_servers() -> list[str]:
    return [device.name for device in tf.config.list_logical_devices("CPU") if device.name.startswith("/job:worker/")]


def _rehearsal_strategy(resolver: tf.distribute.cluster_resolver.ClusterResolver) -> tf.distribute.Strategy:
    """A strategy over the virtual CPUs of servers without a TPU: on each, CPU:0 is the host, the others are replicas.

    TensorFlow refuses to make a MirroredStrategy over several hosts, but runs one. It is used as a TPUStrategy is: one
    replica for each device, and input on each host.
    """
    cpus = _cpus_of_servers()
    hosts = {name: name.removesuffix("0") for name in cpus if name.endswith(":CPU:0")}
    inputs = tuple(
        (host, tuple(name for name in cpus if name.startswith(prefix) and name != host))
        for host, prefix in hosts.items()
    )
    # AddN, the default, begins with the term whose memory is free first: its sum of three terms depends on timing.
    in_order = tf.distribute.ReductionToOneDevice(accumulation_fn=lambda terms: tf.reduce_sum(tf.stack(terms), axis=0))
    strategy = tf.distribute.MirroredStrategy(inputs[0][1], in_order)
    strategy.extended._initialize_strategy([name for _, names in inputs for name in names])
    strategy.extended._input_workers_devices = inputs
    strategy.extended._cluster_resolver = resolver  # as a TPUStrategy has it
    return strategy
