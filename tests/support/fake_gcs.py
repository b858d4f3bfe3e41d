"""A Google Cloud Storage in a process of this machine, for TensorFlow's real client.

The client knows only the hosts at googleapis.com. It reaches this server as a proxy that the environment names, and
trusts its certificate by `CURL_CA_BUNDLE`. The server speaks the part of the JSON API that the client uses:
https://cloud.google.com/storage/docs/json_api/v1
"""

import contextlib
import dataclasses
import datetime
import http.server
import itertools
import json
import multiprocessing.managers
import pathlib
import random
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

import pytest

HOSTS = ("www.googleapis.com", "storage.googleapis.com")
_ROUTES = {
    ("GET", r"/storage/v1/b/([^/]+)"): "bucket",
    ("GET", r"/storage/v1/b/([^/]+)/o"): "list",
    ("GET", r"/storage/v1/b/([^/]+)/o/([^/]+)"): "stat",
    ("DELETE", r"/storage/v1/b/([^/]+)/o/([^/]+)"): "delete",
    ("POST", r"/storage/v1/b/([^/]+)/o/([^/]+)/rewriteTo/b/([^/]+)/o/([^/]+)"): "rewrite",
    ("POST", r"/upload/storage/v1/b/([^/]+)/o"): "start_upload",
    ("PUT", r"/upload/storage/v1/b/([^/]+)/o"): "upload",
    ("GET", r"/([^/]+)/(.+)"): "read",
}


@dataclasses.dataclass(frozen=True)
class Stored:
    """An object: its bytes, its generation, and when it was written."""

    data: bytes
    generation: int
    updated: float

    def metadata(self, name: str) -> dict[str, str]:
        updated = datetime.datetime.fromtimestamp(self.updated, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        return {"name": name, "size": str(len(self.data)), "generation": str(self.generation), "updated": updated}


class RefusedError(Exception):
    """A request that is answered with an HTTP status of failure."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class FakeGcs:
    """The objects of some buckets, and what goes wrong with requests to them."""

    def __init__(self, *buckets: str):
        self.buckets = set(buckets)
        self.objects: dict[tuple[str, str], Stored] = {}
        self.lock = threading.RLock()
        self._fault: Callable[[str], int | None] = lambda kind: None
        self._generations = itertools.count(1)
        self._sessions: dict[str, tuple[str, str, bytes]] = {}

    def put(self, bucket: str, name: str, data: bytes, age: float = 0.0) -> Stored:
        """Replaces an object; it was written `age` seconds ago."""
        stored = Stored(data, next(self._generations), time.time() - age)
        self.objects[bucket, name] = stored
        return stored

    def data(self, bucket: str, name: str) -> bytes:
        """The bytes of an object."""
        return self.objects[bucket, name].data

    def names(self, bucket: str, prefix: str = "") -> list[str]:
        """The names of the objects that begin with `prefix`, without the markers of folders."""
        return sorted(n for b, n in list(self.objects) if b == bucket and n.startswith(prefix) and n[-1] != "/")

    def fail(self, *statuses: int, kinds: str = "", times: int = 10**9, rate: float = 1.0, seed: int = 0) -> None:
        """From now on, requests fail; without arguments, none does.

        Args:
          statuses: the HTTP statuses to choose from. 0: the request is carried out, with half of its data if it carries
            data, and the connection ends before the answer does.
          kinds: the kinds of requests that fail, with spaces between; default: all.
          times: how many fail.
          rate: the share of the requests that fail.
          seed: of the choice.
        """
        generator, left = random.Random(seed), itertools.chain(itertools.repeat(True, times), itertools.repeat(False))

        def fault(kind: str) -> int | None:
            if statuses and (not kinds or kind in kinds.split()) and generator.random() < rate and next(left):
                return generator.choice(statuses)
            return None

        self._fault = fault

    def next_fault(self, kind: str) -> int | None:
        """How a request fails; None if it does not."""
        with self.lock:
            return self._fault(kind)

    def serve(self, folder: str) -> dict[str, str]:
        """Serves the objects, and returns the environment variables that lead TensorFlow's client to them.

        Args:
          folder: where to write the certificate.
        """
        certificate, key = f"{folder}/certificate.pem", f"{folder}/key.pem"
        names = ",".join(f"DNS:{host}" for host in HOSTS)
        subprocess.run(
            f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=fake"
            f" -addext subjectAltName={names} -keyout {key} -out {certificate}".split(),
            check=True,
            capture_output=True,
        )
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(certificate, key)
        server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"gcs": self, "tls": tls}))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return {
            "https_proxy": f"http://127.0.0.1:{server.server_port}",
            "no_proxy": "",
            "CURL_CA_BUNDLE": certificate,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            # Read when TensorFlow is imported: it retries at once, and reads 1 MiB where it would read 64.
            "GCS_RETRY_CONFIG_INIT_DELAY_TIME_US": "0",
            "GCS_READ_CACHE_BLOCK_SIZE_MB": "1",
        }

    # --- Requests: each gets the names in the path, the query, the headers and the body -------------------------

    def find(self, bucket: str, name: str) -> Stored:
        if (bucket, name) not in self.objects:
            raise RefusedError(404, f"No such object: {bucket}/{name}")
        return self.objects[bucket, name]

    def answer_bucket(self, names: list[str], *_: Any) -> dict[str, str]:
        return {"name": names[0], "location": "US"}

    def answer_list(self, names: list[str], query: dict[str, str], *_: Any) -> dict[str, Any]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        found: dict[str, dict[str, str] | None] = {}  # an item, or None for a folder
        for (bucket, name), stored in sorted(self.objects.items()):
            if bucket != names[0] or not name.startswith(prefix) or name <= query.get("pageToken", ""):
                continue
            head, folder, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
            found[prefix + head + folder if folder else name] = None if folder else stored.metadata(name)
        page = list(found)[: int(query.get("maxResults", 1000))]
        answer: dict[str, Any] = {
            "items": [found[name] for name in page if found[name]],
            "prefixes": [name for name in page if not found[name]],
        }
        if len(page) < len(found):
            answer["nextPageToken"] = page[-1] + ("\U0010ffff" if page[-1].endswith("/") else "")
        return {key: value for key, value in answer.items() if value}

    def answer_stat(self, names: list[str], *_: Any) -> dict[str, str]:
        return self.find(*names).metadata(names[1])

    def answer_delete(self, names: list[str], *_: Any) -> None:
        self.find(*names)
        del self.objects[names[0], names[1]]

    def answer_rewrite(self, names: list[str], *_: Any) -> dict[str, Any]:
        stored = self.put(names[2], names[3], self.find(names[0], names[1]).data)
        return {"done": True, "resource": stored.metadata(names[3])}

    def answer_start_upload(self, names: list[str], query: dict[str, str], headers: Any, body: bytes) -> Any:
        there = self.objects.get((names[0], query["name"]))
        if query.get("ifGenerationMatch") not in (None, str(there.generation if there else 0)):
            raise RefusedError(412, "At least one of the pre-conditions you specified did not hold.")
        if query["uploadType"] == "media":
            return self.put(names[0], query["name"], body).metadata(query["name"])
        session = f"session{len(self._sessions)}"
        self._sessions[session] = (names[0], query["name"], b"")
        return {"Location": f"https://{HOSTS[0]}/upload/storage/v1/b/{names[0]}/o?upload_id={session}"}

    def answer_upload(self, names: list[str], query: dict[str, str], headers: Any, body: bytes) -> Any:
        bucket, name, there = self._sessions[query["upload_id"]]
        span, total = re.fullmatch(r"bytes (.+)/(\d+)", headers.get("Content-Range", "bytes */0")).groups()
        if span != "*":
            first = int(span.partition("-")[0])
            there = there[:first] + body
            self._sessions[query["upload_id"]] = (bucket, name, there)
        if len(there) == int(total):
            return self.put(bucket, name, there).metadata(name)
        raise RefusedError(308, f"bytes=0-{len(there) - 1}" if there else "")

    def answer_read(self, names: list[str], query: dict[str, str], headers: Any, body: bytes) -> bytes:
        data = self.find(*names).data
        first, last = map(int, headers["Range"].removeprefix("bytes=").split("-"))
        if first >= len(data):
            raise RefusedError(416, "The requested range cannot be satisfied.")
        return data[first : last + 1]


class _Handler(http.server.BaseHTTPRequestHandler):
    """Serves the requests of one connection, which begins as that to a proxy."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # it would delay each answer by 40 ms
    gcs: FakeGcs
    tls: ssl.SSLContext

    def log_message(self, *_: Any) -> None:
        pass

    def do_CONNECT(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.connection = self.tls.wrap_socket(self.connection, server_side=True)
        self.rfile, self.wfile = self.connection.makefile("rb"), self.connection.makefile("wb", buffering=0)

    def finish(self) -> None:
        super().finish()
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()

    def _serve(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        kind, names = next(
            (kind, [urllib.parse.unquote(name) for name in match.groups()])
            for (method, pattern), kind in _ROUTES.items()
            if method == self.command and (match := re.fullmatch(pattern, url.path))
        )
        fault = self.gcs.next_fault(kind)
        body = self._read_body()
        body = body[: len(body) // 2] if fault == 0 else body
        query = dict(urllib.parse.parse_qsl(url.query))
        with self.gcs.lock:
            try:
                if fault:
                    raise RefusedError(fault, "a fault of the test")
                if "Authorization" not in self.headers:
                    raise RefusedError(401, "Anonymous caller does not have storage access.")
                if names[0] not in self.gcs.buckets:
                    raise RefusedError(404, "The specified bucket does not exist.")
                status, answer = 200, getattr(self.gcs, f"answer_{kind}")(names, query, self.headers, body)
            except RefusedError as error:
                status, answer = error.status, error
        self.close_connection = fault == 0
        self._answer(status, answer, cut=fault == 0)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while length := int(self.rfile.readline(), 16):
            data += self.rfile.read(length)
            self.rfile.readline()
        self.rfile.readline()
        return data

    do_GET = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815

    def _answer(self, status: int, answer: Any, cut: bool) -> None:
        headers = {}
        if status == 308:
            headers, data = {"Range": str(answer)} if str(answer) else {}, b""
        elif isinstance(answer, RefusedError):
            data = json.dumps({"error": {"code": status, "message": str(answer)}}).encode()
        elif isinstance(answer, dict) and "Location" in answer:
            headers, data = answer, b""
        else:
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode() if answer is not None else b""
        if cut and not isinstance(answer, bytes):
            return
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a killed client leaves its connections open

    def handle_error(self, *_: Any) -> None:
        pass  # a killed client


class _Manager(multiprocessing.managers.BaseManager):
    """A process for the server: TensorFlow's client may wait for an answer while no other thread of Python runs."""


_Manager.register("FakeGcs", FakeGcs)


@contextlib.contextmanager
def serving(folder: pathlib.Path, *buckets: str) -> Iterator[tuple[FakeGcs, dict[str, str]]]:
    """Serves empty buckets; yields them, and the environment variables that lead TensorFlow's client there.

    Skips the test where there is no openssl to make a certificate.
    """
    if not shutil.which("openssl"):
        pytest.skip("this machine has no openssl")
    with _Manager(ctx=multiprocessing.get_context("spawn")) as manager:
        gcs = manager.FakeGcs(*buckets)  # type: ignore[attr-defined]
        yield gcs, gcs.serve(str(folder))
