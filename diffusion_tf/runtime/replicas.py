"""Functions of one replica, compiled for the devices of a strategy."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from diffusion_tf.errors import ConfigError
from diffusion_tf.ops import backend
from diffusion_tf.ops.backend import Backend
from diffusion_tf.runtime.strategies import tensorflow_packages

_MIN_REGION_PIXELS = 16 * 16  # regions slow down the network for smaller images


def cpu_backend(image_pixels: int, *, training: bool = False, frozen_weights: bool = False) -> Backend:
    """The backend for the network of images of `image_pixels` = H * W, on one CPU.

    Small images are sampled by one XLA program. Training them still updates the weights in place, in a graph.
    """
    small = image_pixels < _MIN_REGION_PIXELS
    if small and not training:
        return backend.XLA
    return Backend(cpu_graph=True, compiles_network=small, frozen_weights=frozen_weights)


def replica_function(function: Callable, strategy: tf.distribute.Strategy, on_cpu: Backend = backend.XLA) -> Callable:
    """Prepares `function` for `strategy.run` inside a tf.function: with its backend, and compiled where possible.

    A TPU strategy compiles on its own, and `jit_compile=True` would ask for the host there. Off the TPU, replicas that
    meet in an all-reduce cannot be one program, nor can they meet inside a nested tf.function. tensorflow-tpu has no
    XLA for CPUs. AutoGraph would double the time to trace a network, so loops are `tf.while_loop`.

    Args:
      function: of tensors, in replica context.
      strategy: where it runs.
      on_cpu: the backend if that is one CPU; see `cpu_backend`.
    """
    function = tf.autograph.experimental.do_not_convert(function)
    if isinstance(strategy, tf.distribute.TPUStrategy):
        return computed_for_tpu(function)
    if not isinstance(strategy, tf.distribute.OneDeviceStrategy):
        return function
    is_cpu = tf.DeviceSpec.from_string(strategy.extended.worker_devices[0]).device_type == "CPU"
    if is_cpu and "tensorflow-tpu" in tensorflow_packages():
        return function
    if not (is_cpu and on_cpu.cpu_graph):
        return tf.function(function, jit_compile=True, autograph=False)
    # For the whole process. These passes take seconds for a network's graph, and XLA simplifies the regions anyway.
    tf.config.optimizer.set_experimental_options({"constant_folding": False, "arithmetic_optimization": False})
    return _with_backend(function, on_cpu)


def computed_for_tpu(function: Callable) -> Callable:
    """`function` with the operations of the network as a TPU computes them."""
    return _with_backend(function, backend.TPU)


def _with_backend(function: Callable, its_backend: Backend) -> Callable:
    @tf.autograph.experimental.do_not_convert
    def entered(*args: Any) -> Any:
        with backend.entered(its_backend):
            return function(*args)

    return entered


def over_replicas(
    function: Callable, strategy: tf.distribute.Strategy, batch_size: int, on_cpu: Backend = backend.XLA
) -> Callable:
    """Compiles `function(first, *arrays)` of consecutive examples for a batch that the replicas share.

    Each replica calls it with the index of its first example and its shard [batch_size / replicas, ...] of each array;
    the tensors that it returns, in any structure, are concatenated along their first axis. Arrays of fewer than
    `batch_size` examples are padded with zeros, and the results cut to their length.

    Args:
      function: of a replica; it maps examples to results one by one.
      strategy: where it runs.
      batch_size: examples over all replicas.
      on_cpu: as in `replica_function`.

    Raises:
      ConfigError: the batch size is not divisible by the replicas.
    """
    per_replica = per_replica_batch_size(batch_size, strategy)

    def replica_call(first: tf.Tensor, *arrays: tf.Tensor) -> Any:
        offset = tf.distribute.get_replica_context().replica_id_in_sync_group * per_replica
        shards = [tf.slice(a, [offset] + [0] * (len(a.shape) - 1), [per_replica, *a.shape[1:]]) for a in arrays]
        return function(first + tf.cast(offset, tf.int64), *shards)

    replica_call = replica_function(replica_call, strategy, on_cpu)

    @tf.function(autograph=False)
    def batch_call(first: tf.Tensor, *arrays: tf.Tensor) -> Any:
        results = strategy.run(replica_call, args=(first, *arrays))
        return tf.nest.map_structure(lambda r: tf.concat(strategy.experimental_local_results(r), axis=0), results)

    def call(first: int, *arrays: tf.Tensor) -> Any:
        count = len(arrays[0]) if arrays else batch_size
        padded = [pad_batch(a, batch_size) for a in arrays]
        return tf.nest.map_structure(lambda r: r[:count], batch_call(tf.constant(first, tf.int64), *padded))

    return call


def pad_batch(examples: tf.Tensor, size: int) -> tf.Tensor:
    """Pads examples [N, ...] with zeros to [size, ...]."""
    return tf.pad(examples, [[0, size - examples.shape[0]]] + [[0, 0]] * (len(examples.shape) - 1))


def shared_batch_size(at_least: int, strategy: tf.distribute.Strategy) -> int:
    """The smallest batch size of `at_least` examples or more that the replicas share equally."""
    replicas = strategy.num_replicas_in_sync
    return -(-at_least // replicas) * replicas


def per_replica_batch_size(batch_size: int, strategy: tf.distribute.Strategy) -> int:
    """Number of examples of each replica.

    Raises:
      ConfigError: the batch size is not divisible by the number of replicas.
    """
    replicas = strategy.num_replicas_in_sync
    if batch_size <= 0 or batch_size % replicas:
        raise ConfigError("batch_size", f"={batch_size} must be a positive multiple of the {replicas} replicas")
    return batch_size // replicas
