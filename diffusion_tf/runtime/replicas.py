"""Which tf.distribute strategy runs this: TPU, GPUs, several hosts, or one device."""

from collections.abc import Callable

import tensorflow as tf

from diffusion_tf.errors import ConfigError
from diffusion_tf.ops.cpu.regions import cpu_graph
from diffusion_tf.runtime.strategies import tensorflow_packages


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
    if on_cpu and "tensorflow-tpu" in tensorflow_packages():
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


def per_replica_batch_size(batch_size: int, strategy: tf.distribute.Strategy) -> int:
    """Images of each replica.

    Raises:
      InputError: the batch size is not divisible by the number of replicas.
    """
    replicas = strategy.num_replicas_in_sync
    if batch_size <= 0 or batch_size % replicas:
        raise ConfigError("batch_size", f"={batch_size} must be a positive multiple of the {replicas} replicas")
    return batch_size // replicas
