"""The processes that TF_CONFIG names: checks it, and waits for them."""

import contextlib
import json
import os
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from absl import logging

from diffusion_tf.errors import InputError

_JOBS = ("chief", "worker")
_KINDS = {dict: "an object", list: "a list", str: "a text", int: "a number"}
_GREETING = b"diffusion_tf waits"
_TIMEOUT = 1.0  # seconds, of a connection between two processes that wait
_EXAMPLE = '{"cluster": {"worker": ["host0:2222", "host1:2222"]}, "task": {"type": "worker", "index": 0}}'


def read_cluster() -> tuple[list[str], int]:
    """The addresses of the processes in TF_CONFIG, HOST:PORT, and the place of this process among them.

    Raises:
      InputError: TF_CONFIG is not set, or does not say which processes there are and which of them this is.
    """
    text = os.environ.get("TF_CONFIG", "")
    try:
        config = json.loads(text)
        cluster: dict[str, list[str]] = _expect(config["cluster"], dict, "cluster")
        task: dict[str, Any] = _expect(config["task"], dict, "task")
        for job, addresses in cluster.items():
            if job not in _JOBS:
                raise ValueError(f"the job {job!r} is not one of {', '.join(_JOBS)}")
            for address in _expect(addresses, list, job):
                split_address(_expect(address, str, "an address"))
        if len(cluster.get("chief", ())) > 1:
            raise ValueError("there is more than one chief")
        mine = cluster[task["type"]][_expect(task["index"], int, "index")]
        if task["index"] < 0:
            raise ValueError("the index is negative")
    except KeyError as error:
        raise InputError(f"TF_CONFIG has no entry {error}: it must be like {_EXAMPLE}") from error
    except (ValueError, TypeError, IndexError) as error:
        what = f"={text!r} names no cluster ({error})" if text else " is not set"
        raise InputError(f"TF_CONFIG{what}: it must be like {_EXAMPLE}") from error
    addresses = [address for job in _JOBS for address in cluster.get(job, ())]
    if len(set(addresses)) < len(addresses):
        raise InputError(f"TF_CONFIG names an address twice: {', '.join(addresses)}")
    return addresses, addresses.index(mine)


def _expect(value: Any, kind: type, name: str) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}, not {_KINDS[kind]}")
    return value


def split_address(address: str) -> tuple[str, int]:
    """Splits HOST:PORT.

    Raises:
      ValueError: it is malformed.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"{address!r} is not HOST:PORT")
    return host.strip("[]"), int(port)


def wait_for_all(addresses: list[str], index: int, seconds: float = 10.0) -> None:
    """Returns when all processes of a cluster wait here; says every `seconds` which are missing, and since when.

    TensorFlow's own waiting holds Python's global lock for minutes: no signal is handled, and no thread can tell.

    Args:
      addresses: of all processes; this one listens at its own until TensorFlow does.
      index: the place of this process in `addresses`.
      seconds: between two messages.

    Raises:
      InputError: this process cannot listen at its address.
    """
    heard: set[int] = set()

    class Answer(socketserver.StreamRequestHandler):
        """Answers a process that asks whether this one is here: both know of each other then."""

        def handle(self) -> None:
            self.request.settimeout(_TIMEOUT)
            with contextlib.suppress(OSError, ValueError):
                greeting, _, place = self.rfile.readline(64).rpartition(b" ")
                if greeting == _GREETING:
                    heard.add(int(place))
                    self.wfile.write(_GREETING)

    try:
        server = _Server(("", split_address(addresses[index])[1]), Answer)
    except OSError as error:
        raise InputError(f"TF_CONFIG: cannot listen at {addresses[index]} ({error.strerror})") from error
    answered = {index}

    def missing() -> list[str]:
        answered.update(i for i, a in enumerate(addresses) if i not in answered and _is_here(a, index))
        return [a for i, a in enumerate(addresses) if i != index and not (i in heard and i in answered)]

    with server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        wait_for(missing, seconds)
        server.shutdown()


def wait_for(missing: Callable[[], Sequence[str]], seconds: float) -> None:
    """Calls `missing` until it returns nothing; says every `seconds` what it returned, and since when it waits."""
    began, reported = time.strftime("%H:%M:%S"), time.monotonic()
    while names := missing():
        if time.monotonic() - reported >= seconds:
            logging.warning("waiting since %s for %s", began, ", ".join(names))
            reported = time.monotonic()
        time.sleep(0.05)


class _Server(socketserver.ThreadingTCPServer):
    address_family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    allow_reuse_address = True
    daemon_threads = True


def _is_here(address: str, index: int) -> bool:
    """Whether the process at `address` waits too; tells it that the process of `index` does."""
    with contextlib.suppress(OSError), socket.create_connection(split_address(address), _TIMEOUT) as connection:
        connection.sendall(b"%s %d\n" % (_GREETING, index))
        return connection.recv(len(_GREETING)) == _GREETING
    return False
