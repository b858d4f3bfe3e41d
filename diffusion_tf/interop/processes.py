"""Processes that train an exported program together, by `jax.distributed`; process 0, the chief, writes the files."""

import atexit
import contextlib
import ctypes
import os
import signal
import socket
import sys
import zlib
from collections.abc import Iterator, Mapping

import numpy as np

from diffusion_tf.errors import ConfigError, DivergedError, InputError, PreemptedError
from diffusion_tf.progress_bar import print_line
from diffusion_tf.storage.files import first_line, listed

_HEARTBEAT_SECONDS = 30  # without one, a process is gone
_LOST_CODES = ("ABORTED", "CANCELLED", "DEADLINE_EXCEEDED", "INTERNAL", "UNAVAILABLE", "UNKNOWN")  # XLA's
_GONE = "another process is gone, or did not start: start all of them again"


@contextlib.contextmanager
def joined(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> Iterator[None]:
    """Joins the other processes, before JAX is used; they leave together, or at once where one of them fails.

    Args:
      coordinator: HOST:PORT at which process 0 serves the others; default: that of the TPU slice or of Slurm.
      num_processes: how many there are; default: as there.
      process_id: which one this is; default: as there.

    Raises:
      ConfigError: there is no cluster, or the coordinator's port is not free.
      PreemptedError: another process is gone.
    """
    import jax

    if coordinator and process_id == 0:
        _require_free_port(coordinator)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    with contextlib.suppress(AttributeError):  # JAX 0.7 has no such option
        jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from PreemptionNotice
    _end_at_abort()
    print_line("waiting for the other processes")
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            "distributed",
            f": JAX finds no cluster here ({first_line(error)}): give `coordinator`, `num_processes` and `process_id`",
        ) from error
    try:
        yield
    except (PreemptedError, DivergedError):  # of all processes at the same step
        raise
    except BaseException as error:
        # Some functions of JAX raise ValueError with the same text.
        if isinstance(error, (ValueError, jax.errors.JaxRuntimeError)) and str(error).startswith(_LOST_CODES):
            error = PreemptedError(f"{_GONE} ({first_line(error)})")
        # At its end, JAX would first wait for the processes that wait for this one.
        atexit.register(_leave, getattr(error, "exit_code", 1))
        raise error


def is_chief() -> bool:
    """Whether this process writes the files."""
    import jax

    return jax.process_index() == 0


def are_several() -> bool:
    """Whether several processes train together."""
    import jax

    return jax.process_count() > 1


def any_process(flag: bool) -> bool:
    """Whether `flag` is set in any process. A barrier: every process must call it, and returns when all have."""
    return bool(_gathered(np.array(flag)).any())


def from_chief(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the chief's arrays in every process; those of the others only state the shapes and dtypes, of 32 bits."""
    from jax.experimental import multihost_utils

    # One by one, since each is on the devices twice meanwhile.
    return {name: np.asarray(multihost_utils.broadcast_one_to_all(array)) for name, array in arrays.items()}


def require_same(facts: Mapping[str, object]) -> None:
    """Checks that all processes have the same facts.

    Raises:
      InputError: they do not; the message names these facts.
    """
    values = np.array([zlib.crc32(str(value).encode()) for value in facts.values()], np.uint32)
    differ = (_gathered(values) != values).any(axis=0)
    if names := [name for name, other in zip(facts, differ, strict=True) if other]:
        raise InputError(
            f"the processes do not have the same {listed(names)}: give all of them the same export, flags and images"
        )


def _gathered(values: np.ndarray) -> np.ndarray:
    """The values of each process, [processes, ...]."""
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(values)) if are_several() else values[None]


def _require_free_port(coordinator: str) -> None:
    """Raises ConfigError if the port of the coordinator is taken, of which JAX would crash."""
    port = int(coordinator.rpartition(":")[2])
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except (OSError, OverflowError) as error:
            raise ConfigError("coordinator", f"={coordinator}: its port is not free ({first_line(error)})") from error


def _end_at_abort() -> None:
    """Makes SIGABRT end the process with one line and the code of PreemptedError.

    JAX aborts a process when it notices that another one is gone, or when some do not start within five minutes. Python
    would run a handler of its own too late.
    """

    def end(_: int) -> None:
        os.write(2, f"{_GONE}\n".encode())
        os._exit(PreemptedError.exit_code)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(end)
    atexit.register(lambda: handler)  # keeps it
    ctypes.CDLL(None).signal(int(signal.SIGABRT), handler)


def _leave(code: int) -> None:
    sys.stdout.flush()
    os._exit(code)
