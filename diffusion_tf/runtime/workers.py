"""Processes that train one model together: equal ones, of which the chief writes files, or servers that one drives."""

import collections
import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow as tf

from diffusion_tf.errors import PreemptedError
from diffusion_tf.runtime.slices import is_up, name_worker
from diffusion_tf.storage.files import first_line
from diffusion_tf.storage.gfile import store_reason

_GONE = (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError)


def is_multi_worker(strategy: tf.distribute.Strategy) -> bool:
    """Whether several processes train together."""
    return isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)


def slice_servers(strategy: tf.distribute.Strategy) -> list[str]:
    """The addresses HOST:PORT of the servers of a TPU slice that this process drives; without any, there are none."""
    resolver = None if is_multi_worker(strategy) else strategy.cluster_resolver
    return resolver.cluster_spec().as_dict().get("worker", []) if resolver else []


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
    """Turns the errors that TensorFlow raises when another process, or a server, is gone into one line.

    Raises:
      PreemptedError: one is gone.
    """
    try:
        yield
    except tf.errors.OpError as error:
        if is_multi_worker(strategy) and isinstance(error, (*_GONE, tf.errors.InternalError)):
            raise PreemptedError(f"another process is gone ({first_line(error)}): start all of them again") from error
        if lost := lost_server(slice_servers(strategy), error):
            raise lost from error
        raise


def lost_server(servers: Sequence[str], error: tf.errors.OpError) -> PreemptedError | None:
    """The error that names the servers HOST:PORT that are gone, if an error of TensorFlow means that one is."""
    if gone := [name_worker(servers, address) for address in servers if not is_up(address)]:
        return PreemptedError(f"{' and '.join(gone)} of the TPU is gone: start `serve_tpu` there, and run this again")
    restarted = "Unable to find a context_id" in str(error)  # an InvalidArgumentError of a server that does not know us
    if servers and (restarted or isinstance(error, _GONE)) and not store_reason(error):
        return PreemptedError(f"the workers of the TPU are out of reach ({first_line(error)}): run this again")
    return None


def any_worker(strategy: tf.distribute.Strategy, flag: bool) -> bool:
    """Whether `flag` is set in any process. A barrier: every process must call it, and returns when all have."""
    if not is_multi_worker(strategy):
        return flag

    def count() -> tf.Tensor:
        return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, tf.constant(float(flag)))

    return bool(strategy.experimental_local_results(strategy.run(count))[0] > 0)


def assign_on_hosts(variable: tf.Variable, array: np.ndarray) -> None:
    """Assigns an array to a variable of any strategy. Each host gets it once, and copies it to its own devices."""
    on_host = collections.defaultdict(list)
    for copy in getattr(variable, "values", (variable,)):
        on_host[tf.DeviceSpec.from_string(copy.device).replace(device_type="CPU", device_index=0).to_string()].append(
            copy
        )
    if len(on_host) == 1:
        variable.assign(array)
        return
    for host, copies in on_host.items():
        with tf.device(host):
            value = tf.constant(array)
        for copy in copies:
            copy.assign(value)
