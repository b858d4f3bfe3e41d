"""Processes that train one model together, and the one of them, the chief, that writes files."""

import contextlib
from collections.abc import Iterator

import tensorflow as tf

from diffusion_tf.errors import PreemptedError
from diffusion_tf.storage.files import first_line


def is_multi_worker(strategy: tf.distribute.Strategy) -> bool:
    """Whether several processes train together."""
    return isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Whether this process writes the files."""
    if not is_multi_worker(strategy):
        return True
    resolver = strategy.cluster_resolver
    if "chief" in resolver.cluster_spec().jobs:
        return resolver.task_type == "chief"
    return resolver.task_id == 0


@contextlib.contextmanager
def lost_worker_errors(strategy: tf.distribute.Strategy) -> Iterator[None]:
    """Turns the errors that TensorFlow raises when another process is gone into one line.

    Raises:
      PreemptedError: another process is gone.
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
    """Whether `flag` is set in any process. A barrier: every process must call it, and returns when all have."""
    if not is_multi_worker(strategy):
        return flag

    def count() -> tf.Tensor:
        return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, tf.constant(float(flag)))

    return bool(strategy.experimental_local_results(strategy.run(count))[0] > 0)
