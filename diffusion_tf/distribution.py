"""Which tf.distribute strategy runs this: TPU, GPUs, several hosts, or one device."""

from collections.abc import Callable

import tensorflow as tf

from diffusion_tf.errors import InputError

STRATEGIES = ("auto", "tpu", "mirrored", "multi_worker", "one_device")


def make_strategy(name: str = "auto", tpu: str | None = None) -> tf.distribute.Strategy:
    """The strategy called `name`; connects to a TPU where one is asked for.

    `auto` is a TPU when `tpu` is given or one is attached, all GPUs when there are several, else one device.
    `mirrored` takes all GPUs, or all logical CPU devices where there is no GPU; `multi_worker` reads TF_CONFIG.

    Args:
      name: one of STRATEGIES.
      tpu: `local` on a TPU VM, or a TPU's name or grpc address.

    Raises:
      InputError: an unknown name, or a TPU that cannot be reached.
    """
    if name not in STRATEGIES:
        raise InputError(f"--strategy={name}: choose one of {', '.join(STRATEGIES)}")
    gpus = tf.config.list_logical_devices("GPU")
    if name == "auto":
        on_tpu = tpu or tf.config.list_physical_devices("TPU")
        name = "tpu" if on_tpu else "mirrored" if len(gpus) > 1 else "one_device"
    if name == "tpu":
        return _tpu_strategy(tpu or "local")
    if name == "multi_worker":
        return tf.distribute.MultiWorkerMirroredStrategy()
    devices = [device.name for device in gpus or tf.config.list_logical_devices("CPU")]
    if name == "mirrored":
        return tf.distribute.MirroredStrategy(devices)
    return tf.distribute.OneDeviceStrategy(devices[0])


def _tpu_strategy(tpu: str) -> tf.distribute.Strategy:
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=tpu)
        if tpu != "local":
            tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
    except (ValueError, RuntimeError, tf.errors.OpError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"--tpu={tpu}: cannot reach the TPU ({reason}); on a machine without one use --strategy=auto"
        ) from error
    return tf.distribute.TPUStrategy(resolver)


def replica_function(function: Callable, strategy: tf.distribute.Strategy) -> Callable:
    """`function`, to be given to `strategy.run` inside a tf.function; one XLA program where that is ours to ask for.

    A TPU strategy compiles on its own, and there `jit_compile=True` would ask for the host. Off the TPU, replicas that
    meet in an all-reduce cannot be one program, nor may they meet inside a nested tf.function.
    """
    if strategy.num_replicas_in_sync > 1 or isinstance(strategy, tf.distribute.TPUStrategy):
        return function
    return tf.function(function, jit_compile=True)


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Whether this process is the one that writes files."""
    resolver = strategy.cluster_resolver
    if resolver is None or not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return True
    return resolver.task_type == "chief" or (resolver.task_type == "worker" and resolver.task_id == 0)


def per_replica_batch_size(batch_size: int, strategy: tf.distribute.Strategy) -> int:
    """Images of each replica.

    Raises:
      InputError: the batch size is not divisible by the number of replicas.
    """
    replicas = strategy.num_replicas_in_sync
    if batch_size <= 0 or batch_size % replicas:
        raise InputError(f"--batch_size={batch_size} must be a positive multiple of the {replicas} replicas")
    return batch_size // replicas
