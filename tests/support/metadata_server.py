"""A server in the place of Compute Engine's metadata server."""

import contextlib
import http.server
import threading
import time
from collections.abc import Callable, Iterator

PREEMPTED = "/computeMetadata/v1/instance/preempted"
Answer = str | int  # the value, or the status of an error; or one of:
SLOW, MALFORMED, NONSENSE = "slow", "malformed", "nonsense"


@contextlib.contextmanager
def serving(answer: Callable[[str], Answer], slow_seconds: float = 0.2, port: int = 0) -> Iterator[str]:
    """Serves `answer(path)` to requests as the metadata server gets them; yields HOST:PORT."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            value = answer(self.path) if self.headers["Metadata-Flavor"] == "Google" else 403
            if value == MALFORMED:
                self.wfile.write(b"\x00\xff not HTTP\r\n\r\n")
                return
            if value == SLOW:
                time.sleep(slow_seconds)
            self.send_response(value if isinstance(value, int) else 200)
            if value == NONSENSE:
                self.send_header("Transfer-Encoding", "chunked")  # and no chunk follows
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(b"\xff\xfe" if value == NONSENSE else str(value).encode() + b"\n")

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
