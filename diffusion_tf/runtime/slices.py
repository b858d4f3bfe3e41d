"""The hosts of a TPU slice: their addresses, whether their servers are up, and the paths that all of them can read.

One process on worker 0 trains. On every worker, `experiments.serve_tpu` serves it the chips there.
"""

import contextlib
import ipaddress
import socket
import time
from collections.abc import Mapping, Sequence

from diffusion_tf.errors import ConfigError
from diffusion_tf.runtime.cluster import split_address, wait_for
from diffusion_tf.runtime.metadata import read_metadata
from diffusion_tf.storage.files import is_local

PORT = 8470  # where TensorFlow's clients look for a TPU; the next port tells the worker's preemption notice
SLICE = "slice"  # the value of `tpu` that stands for the slice of this machine
_GRPC = "grpc://"
_ENDPOINTS = "instance/attributes/worker-network-endpoints"
_TIMEOUT = 1.0  # seconds, of a connection that tells whether a server is up
_TRIES, _PAUSE = 5, 1.0  # of the metadata server, and the seconds between two


def names_servers(tpu: str | None) -> bool:
    """Whether `tpu` names the servers of a slice, which have the chips of their machines."""
    return tpu == SLICE or (tpu or "").startswith(_GRPC)


def slice_workers(tpu: str | None) -> list[str]:
    """The addresses of the servers that `tpu` names, HOST:PORT in the order of the workers.

    Args:
      tpu: `slice` for the slice of this TPU VM, `grpc://HOST:PORT,HOST:PORT,...` for these servers; anything else names
        no servers.

    Raises:
      ConfigError: an address is malformed or there twice, or this is not worker 0 of a TPU VM.
    """
    if tpu == SLICE:
        return _own_slice()
    if not tpu or not names_servers(tpu):
        return []
    workers = [address.strip().removeprefix(_GRPC) for address in tpu.split(",")]
    try:
        for address in workers:
            split_address(address)
    except ValueError as error:
        raise ConfigError("tpu", f"={tpu}: {error}: name the workers by `tpu=grpc://HOST:PORT,HOST:PORT`") from error
    if len(set(workers)) < len(workers):
        raise ConfigError("tpu", f"={tpu} names a worker twice")
    return workers


def _own_slice() -> list[str]:
    """The servers of the slice to which this machine belongs, from the metadata server."""
    endpoints, number = _read_patiently(_ENDPOINTS), _read_patiently("instance/attributes/agent-worker-number")
    if number != "0":
        raise ConfigError("tpu", f"={SLICE}: this is worker {number}, and worker 0 trains: run this program there")
    try:  # an entry is like `...:8470:10.0.0.2`
        hosts = [str(ipaddress.IPv4Address(entry.split(":")[2])) for entry in endpoints.split(",")]
    except (IndexError, ValueError) as error:
        raise ConfigError(
            "tpu", f"={SLICE}: worker-network-endpoints of the metadata server is {endpoints[:200]!r}: name the workers"
            " by `tpu=grpc://HOST:PORT,HOST:PORT`",
        ) from error  # fmt: skip
    return [f"{host}:{PORT}" for host in hosts]


def _read_patiently(path: str) -> str:
    """The metadata server's value at `path`, although some of its answers may fail."""
    for _ in range(_TRIES - 1):
        with contextlib.suppress(OSError):
            return read_metadata(path)
        time.sleep(_PAUSE)
    try:
        return read_metadata(path)
    except OSError as error:
        raise ConfigError(
            "tpu", f"={SLICE}: the metadata server gives no {path} ({error}): run on worker 0 of a TPU VM"
        ) from error


def wait_for_servers(workers: Sequence[str], seconds: float = 10.0) -> None:
    """Returns when a server accepts connections at each address; says every `seconds` for which workers it waits."""
    up: set[str] = set()

    def missing() -> list[str]:
        up.update(address for address in workers if address not in up and is_up(address))
        return [name_worker(workers, address) for address in workers if address not in up]

    wait_for(missing, seconds)


def is_up(address: str) -> bool:
    """Whether a server accepts connections at HOST:PORT."""
    with contextlib.suppress(OSError), socket.create_connection(split_address(address), _TIMEOUT):
        return True
    return False


def name_worker(workers: Sequence[str], address: str) -> str:
    """A worker as messages name it: `worker 1 (10.0.0.2:8470)`."""
    return f"worker {workers.index(address)} ({address})"


def notice_servers(workers: Sequence[str]) -> list[str]:
    """HOST:PORT of the servers that tell the preemption notices of the workers: each is at the next port."""
    return [f"{host}:{int(port) + 1}" for host, _, port in (address.rpartition(":") for address in workers)]


def check_shared_paths(workers: Sequence[str], paths: Mapping[str, str | None]) -> None:
    """Checks that every worker can reach what a run reads and writes.

    Args:
      workers: the addresses of the workers; anything goes if all are addresses of this machine, as in rehearsals.
      paths: the paths by the settings that name them; None names nothing.

    Raises:
      ConfigError: a path is on this machine only.
    """
    if all(map(_is_this_machine, workers)):
        return
    for setting, path in paths.items():
        if path and is_local(path):
            raise ConfigError(
                setting, f"={path} is on this machine, and the {len(workers)} hosts of the TPU need it: use gs://"
            )


def _is_this_machine(address: str) -> bool:
    host, _ = split_address(address)
    with contextlib.suppress(OSError):
        family, *_, where = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind(where)  # only an address of this machine can be bound
            return True
    return False
