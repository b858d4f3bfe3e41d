"""Reads the metadata server of Compute Engine, or a server that answers in its form."""

import http.client
import os
import urllib.request

PREEMPTED = "instance/preempted"  # TRUE from 30 s before the machine is taken away, else FALSE
ROOT = "/computeMetadata/v1/"
_MAX_BYTES = 2**20
# The servers are near: bypass any proxy.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def read_metadata(path: str, host: str | None = None, timeout: float = 2.0) -> str:
    """Returns a value without the white space around it.

    Args:
      path: which value, for example PREEMPTED.
      host: HOST or HOST:PORT of the server. Default: that of this machine, or the one that the environment variable
        GCE_METADATA_HOST names.
      timeout: seconds to wait for the server.

    Raises:
      OSError: no server answers in time, it has no such value, or the answer is malformed.
    """
    host = host or os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
    try:
        request = urllib.request.Request(f"http://{host}{ROOT}{path}", headers={"Metadata-Flavor": "Google"})
        with _OPENER.open(request, timeout=timeout) as response:
            return response.read(_MAX_BYTES).decode().strip()
    except (http.client.HTTPException, ValueError) as error:
        raise OSError(f"{host} gives a malformed answer ({type(error).__name__})") from error
