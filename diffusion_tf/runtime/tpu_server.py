"""Serves the chips of one worker of a TPU slice to the process that trains, and tells it this machine's notices."""

import http.server
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from diffusion_tf.errors import ConfigError, InputError
from diffusion_tf.runtime.metadata import PREEMPTED, ROOT, read_metadata

if TYPE_CHECKING:
    import tensorflow as tf

_ATTRIBUTES = "instance/attributes/"
_MESH_PORT = "8476"  # where libtpu on worker 0 tells libtpu on the others how the slice is laid out
_IN_USE = "is in use: end the `serve_tpu` that runs, or choose another"


def tpu_environment(read: Callable[[str], str] = read_metadata) -> dict[str, str]:
    """The environment variables that tell libtpu which worker of which slice it serves; TensorFlow's import reads them.

    They are those of `start_grpc_tpu_worker` in tensorflow-tpu 2.20, whose table of types lacks v6e. Only for v2 and v3
    they state the layout of the hosts; from v4 on, libtpu finds it.

    Args:
      read: returns a value of the metadata server, or raises OSError.

    Raises:
      InputError: the metadata server does not describe a TPU VM.
    """
    try:
        worker = read(_ATTRIBUTES + "agent-worker-number")
        kind, _, cores = read(_ATTRIBUTES + "accelerator-type").partition("-")
        first = read(_ATTRIBUTES + "worker-network-endpoints").split(",")[0].split(":")[2]  # like `...:8470:10.0.0.2`
        layout = _host_layout(int(cores) // 8) if kind in ("v2", "v3") else {}
        address = read("instance/network-interfaces/0/ip")
    except (OSError, ValueError, IndexError) as error:
        raise InputError(
            f"the metadata server describes no TPU VM ({error}): run on a TPU VM, or rehearse with `virtual_cpus=2`"
        ) from error
    return {
        "CLOUD_TPU_TASK_ID": worker,
        "TPU_HOSTNAME_OVERRIDE": address,
        "TPU_LOCK_DEVICE": "true",
        "TPU_MESH_CONTROLLER_ADDRESS": f"{first}:{_MESH_PORT}",
        "TPU_MESH_CONTROLLER_PORT": _MESH_PORT,
        "TPU_STDERR_LOG_LEVEL": "0",
        **layout,
    }


def _host_layout(hosts: int) -> dict[str, str]:
    """The layout of a v2 or v3 slice: hosts of 2 x 2 chips, in a rectangle as square as can be."""
    width = 2 ** ((hosts.bit_length() - 1) // 2)
    return {"TPU_CHIPS_PER_HOST_BOUNDS": "2,2,1", "TPU_HOST_BOUNDS": f"{width},{hosts // width},1"}


def start_server(port: int, virtual_cpus: int | None = None) -> "tf.distribute.Server":
    """Starts TensorFlow's server of this machine's devices on all interfaces; it ends with the process.

    Args:
      port: where it listens.
      virtual_cpus: the number of CPU devices. Default: one, beside the chips.

    Raises:
      ConfigError: the port is in use.
    """
    import tensorflow as tf

    config = tf.compat.v1.ConfigProto(device_count={"CPU": virtual_cpus} if virtual_cpus else {})
    try:  # the process that connects chooses job and task anew
        return tf.distribute.Server({"worker": [f"localhost:{port}"]}, "worker", 0, config=config)
    except tf.errors.OpError as error:
        raise ConfigError("port", f"={port} {_IN_USE}") from error


class NoticeServer:
    """While it is entered, answers what PREEMPTED is as the metadata server does, on all interfaces.

    Args:
      port: where to listen; 0 chooses one.
      is_preempted: whether the machine is about to be taken away.

    Attributes:
      port: where it listens.
      last_asked: `time.monotonic()` of the last request; None before the first.

    Raises:
      ConfigError: the port is in use.
    """

    def __init__(self, port: int, is_preempted: Callable[[], bool]):
        self.last_asked: float | None = None
        notice = self

        class Handler(http.server.BaseHTTPRequestHandler):
            """Answers one request."""

            timeout = 5.0

            def do_GET(self) -> None:
                """Answers TRUE or FALSE."""
                if self.path != ROOT + PREEMPTED:
                    return self.send_error(404)
                notice.last_asked = time.monotonic()
                answer = b"TRUE" if is_preempted() else b"FALSE"
                self.send_response(200)
                self.send_header("Metadata-Flavor", "Google")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: object) -> None:
                """Logs nothing."""

        try:
            self._server = http.server.ThreadingHTTPServer(("", port), Handler)
        except OSError as error:
            raise ConfigError("port", f"={port - 1}: the next port, {port}, {_IN_USE}") from error
        self.port = self._server.server_port

    def __enter__(self) -> "NoticeServer":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
