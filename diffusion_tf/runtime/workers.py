"""Which tf.distribute strategy runs this: TPU, GPUs, several hosts, or one device."""

import contextlib
from collections.abc import Iterator

import tensorflow as tf

from diffusion_tf.errors import PreemptedError
from diffusion_tf.storage.files import first_line


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
