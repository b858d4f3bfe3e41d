"""Which tf.distribute strategy runs this: TPU, GPUs, several hosts, or one device."""

import contextlib
import functools
import importlib.metadata
import os
from collections.abc import Callable, Iterator

import tensorflow as tf

from diffusion_tf import tpu_attached
from diffusion_tf.errors import InputError, PreemptedError
from diffusion_tf.files import first_line
from diffusion_tf.regions import cpu_graph

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
        raise InputError(f"--strategy={name}: choose one of {', '.join(STRATEGIES)}")
    if tpu and name not in ("auto", "tpu"):
        raise InputError(f"--tpu={tpu} goes with --strategy=tpu or auto, not {name}")
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
        raise InputError("--strategy=multi_worker needs TF_CONFIG, which names the workers and this process's place")
    try:
        return tf.distribute.MultiWorkerMirroredStrategy()
    except (ValueError, RuntimeError, tf.errors.OpError) as error:
        raise InputError(f"--strategy=multi_worker cannot start ({first_line(error)}): see TF_CONFIG") from error


@functools.cache
def _tensorflow_packages() -> frozenset[str]:
    """The installed packages that hold `tensorflow`; several overwrite each other's files."""
    names = importlib.metadata.packages_distributions().get("tensorflow", ())
    return frozenset(name.lower().replace("_", "-") for name in names)


def _auto_takes_tpu() -> bool:
    # With a TPU hidden by a second TensorFlow, `auto` had better be told than train on the CPU.
    hidden = tpu_attached() and _tensorflow_packages() > {"tensorflow-tpu"}
    return hidden or bool(tf.config.list_physical_devices("TPU"))


def _check_local_tpu() -> None:
    """Tells why TensorFlow sees no TPU on this machine, where that is known without minutes of trying."""
    if tf.config.list_physical_devices("TPU"):
        return
    if not tpu_attached():
        raise InputError(
            "--tpu=local: this machine has no TPU (no /dev/accel0, no /dev/vfio/0):"
            " run on a TPU VM, or leave out --strategy=tpu and --tpu"
        )
    packages = _tensorflow_packages()
    if packages - {"tensorflow-tpu"}:
        raise InputError(
            f"--tpu=local: TensorFlow here is of {' and '.join(sorted(packages))}, and a TPU needs tensorflow-tpu"
            f" alone: pip uninstall {' '.join(sorted(packages))}, then pip install '.[tpu]'"
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
        raise InputError(f"--tpu={tpu}: cannot reach the TPU ({first_line(error)}){hint}") from error
    return tf.distribute.TPUStrategy(resolver)


def replica_function(function: Callable, strategy: tf.distribute.Strategy, in_regions: bool = False) -> Callable:
    """`function`, to be given to `strategy.run` inside a tf.function; one XLA program where that is ours to ask for.

    A TPU strategy compiles on its own, and there `jit_compile=True` would ask for the host. Off the TPU, replicas that
    meet in an all-reduce cannot be one program, nor may they meet inside a nested tf.function. On a CPU, tensorflow-tpu
    has no XLA; elsewhere there, it is a graph with compiled regions (`regions.py`) where those are asked for.
    AutoGraph, which would double the time to trace a network, stays out: loops are `tf.while_loop`.
    """
    function = tf.autograph.experimental.do_not_convert(function)
    if not isinstance(strategy, tf.distribute.OneDeviceStrategy):
        return function
    on_cpu = tf.DeviceSpec.from_string(strategy.extended.worker_devices[0]).device_type == "CPU"
    if on_cpu and "tensorflow-tpu" in _tensorflow_packages():
        return function
    if on_cpu and in_regions:
        # For the whole process. They take seconds for a network's graph, whose regions XLA simplifies anyway.
        tf.config.optimizer.set_experimental_options({"constant_folding": False, "arithmetic_optimization": False})

        @tf.autograph.experimental.do_not_convert
        def graph(*args):
            with cpu_graph():
                return function(*args)

        return graph
    return tf.function(function, jit_compile=True, autograph=False)


def over_replicas(
    function: Callable, strategy: tf.distribute.Strategy, batch_size: int, in_regions: bool = False
) -> Callable:
    """`function(first, *arrays)` of consecutive examples, as a compiled function of a batch shared out over replicas.

    Each replica calls it with the index of its first example and its share [batch_size / replicas, ...] of each array;
    the tensors that it returns, in any structure, are joined along their first axis. Arrays of fewer than `batch_size`
    examples are filled up with zeros, and the results cut to their length. `in_regions` is as in `replica_function`.

    Raises:
      InputError: the batch size is not divisible by the replicas.
    """
    per_replica = per_replica_batch_size(batch_size, strategy)

    def replica_call(first, *arrays):
        offset = tf.distribute.get_replica_context().replica_id_in_sync_group * per_replica
        shares = [tf.slice(a, [offset] + [0] * (len(a.shape) - 1), [per_replica, *a.shape[1:]]) for a in arrays]
        return function(first + tf.cast(offset, tf.int64), *shares)

    replica_call = replica_function(replica_call, strategy, in_regions)

    @tf.function(autograph=False)
    def batch_call(first, *arrays):
        results = strategy.run(replica_call, args=(first, *arrays))
        return tf.nest.map_structure(lambda r: tf.concat(strategy.experimental_local_results(r), axis=0), results)

    def call(first: int, *arrays):
        count = len(arrays[0]) if arrays else batch_size
        filled = [filled_up(a, batch_size) for a in arrays]
        return tf.nest.map_structure(lambda r: r[:count], batch_call(tf.constant(first, tf.int64), *filled))

    return call


def filled_up(examples: tf.Tensor, size: int) -> tf.Tensor:
    """The examples [N, ...], and zeros to make them [size, ...]."""
    return tf.pad(examples, [[0, size - examples.shape[0]]] + [[0, 0]] * (len(examples.shape) - 1))


def is_multi_worker(strategy: tf.distribute.Strategy) -> bool:
    """Whether other processes take part."""
    return isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Whether this process is the one that writes files."""
    if not is_multi_worker(strategy):
        return True
    resolver = strategy.cluster_resolver
    if "chief" in resolver.cluster_spec().jobs:
        return resolver.task_type == "chief"
    return resolver.task_id == 0


@contextlib.contextmanager
def several_workers(strategy: tf.distribute.Strategy) -> Iterator[None]:
    """Where processes meet: what TensorFlow raises when another one is gone becomes one line.

    Raises:
      PreemptedError: it is gone.
    """
    try:
        yield
    except (
        tf.errors.UnavailableError,
        tf.errors.AbortedError,
        tf.errors.CancelledError,
        tf.errors.InternalError,
    ) as error:
        if not is_multi_worker(strategy):
            raise
        raise PreemptedError(f"another process is gone ({first_line(error)}): start all of them again") from error


def any_worker(strategy: tf.distribute.Strategy, flag: bool) -> bool:
    """Whether `flag` is set in any process; each must call this, and none returns before all have."""
    if not is_multi_worker(strategy):
        return flag

    def count():
        return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, tf.constant(float(flag)))

    return bool(strategy.experimental_local_results(strategy.run(count))[0] > 0)


def per_replica_batch_size(batch_size: int, strategy: tf.distribute.Strategy) -> int:
    """Images of each replica.

    Raises:
      InputError: the batch size is not divisible by the number of replicas.
    """
    replicas = strategy.num_replicas_in_sync
    if batch_size <= 0 or batch_size % replicas:
        raise InputError(f"--batch_size={batch_size} must be a positive multiple of the {replicas} replicas")
    return batch_size // replicas
