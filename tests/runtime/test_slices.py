"""The hosts of a TPU slice: who they are, waiting for them, and the paths that they share."""

import contextlib
import socket
import threading

import pytest
import tensorflow as tf
from support import metadata_server

from diffusion_tf.errors import ConfigError, PreemptedError
from diffusion_tf.runtime import slices
from diffusion_tf.runtime.slices import check_shared_paths, notice_servers, slice_workers, wait_for_servers
from diffusion_tf.runtime.workers import lost_server

ENDPOINTS, NUMBER = "worker-network-endpoints", "agent-worker-number"


@pytest.mark.parametrize(
    ("tpu", "workers"),
    [
        (None, []),
        ("local", []),
        ("my-tpu", []),
        ("grpc://10.0.0.1:8470", ["10.0.0.1:8470"]),
        ("grpc://a:1,b:2", ["a:1", "b:2"]),
        ("grpc://a:1, grpc://b:2", ["a:1", "b:2"]),
        ("grpc://[::1]:5", ["[::1]:5"]),
    ],
)
def test_addresses_name_the_workers_in_their_order(tpu, workers):
    assert slice_workers(tpu) == workers


@pytest.mark.parametrize(
    ("tpu", "reason"),
    [
        ("grpc://", "'' is not HOST:PORT"),
        ("grpc://a", "'a' is not HOST:PORT"),
        ("grpc://a:1,", "'' is not HOST:PORT"),
        ("grpc://a:1,b:70000", "'b:70000' is not HOST:PORT"),
        ("grpc://a:1,a:1", "names a worker twice"),
    ],
)
def test_malformed_addresses_are_refused(tpu, reason):
    with pytest.raises(ConfigError, match=f"^tpu={tpu}.*{reason}"):
        slice_workers(tpu)


@contextlib.contextmanager
def tpu_vm(monkeypatch, *, failures=(), **attributes):
    """A metadata server with these attributes, whose first answers are `failures`."""
    left = list(failures)

    def answer(path):
        if left:
            return left.pop(0)
        return attributes.get(path.removeprefix("/computeMetadata/v1/instance/attributes/"), 404)

    with metadata_server.serving(answer) as host:
        monkeypatch.setenv("GCE_METADATA_HOST", host)
        monkeypatch.setattr(slices, "_PAUSE", 0.0)
        yield


def test_the_metadata_server_names_the_slice_although_some_answers_fail(monkeypatch):
    attributes = {ENDPOINTS: "a:8470:10.0.0.2,b:8470:10.0.0.3", NUMBER: "0"}
    with tpu_vm(monkeypatch, failures=[503, metadata_server.MALFORMED, metadata_server.NONSENSE], **attributes):
        assert slice_workers("slice") == ["10.0.0.2:8470", "10.0.0.3:8470"]


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({}, f"the metadata server gives no instance/attributes/{ENDPOINTS} .*404.*run on worker 0 of a TPU VM"),
        ({ENDPOINTS: "a:8470:10.0.0.2", NUMBER: "3"}, "this is worker 3, and worker 0 trains"),
        ({ENDPOINTS: "10.0.0.2:8470", NUMBER: "0"}, "is '10.0.0.2:8470': name the workers by `tpu=grpc://"),
        ({ENDPOINTS: "a:8470:here", NUMBER: "0"}, "is 'a:8470:here'"),
    ],
)
def test_a_machine_that_is_not_worker_0_of_a_slice_is_refused(monkeypatch, attributes, reason):
    with tpu_vm(monkeypatch, **attributes), pytest.raises(ConfigError, match=f"^tpu=slice: .*{reason}"):
        slice_workers("slice")


def test_the_coordinator_waits_for_all_servers_and_names_those_that_are_missing(caplog):
    with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as second:
        workers = [f"127.0.0.1:{server.getsockname()[1]}" for server in (first, second)]
        second.close()
        thread = threading.Thread(target=wait_for_servers, args=(workers, 0.1), daemon=True)
        thread.start()
        thread.join(0.5)
        assert thread.is_alive()
        lines = {record.getMessage().partition(" for ")[2] for record in caplog.records}
        assert lines == {f"worker 1 ({workers[1]})"}
        with socket.create_server(("127.0.0.1", int(workers[1].rpartition(":")[2]))):
            thread.join(10.0)
            assert not thread.is_alive()


def test_the_hosts_of_a_slice_share_a_bucket_and_a_rehearsal_shares_the_disk():
    here, elsewhere = "127.0.0.1:8470", "192.0.2.1:8470"  # of a network for documentation
    check_shared_paths([here, "localhost:8480"], {"workdir": "runs/a"})
    check_shared_paths([], {"workdir": "runs/a"})
    check_shared_paths([here, elsewhere], {"workdir": "gs://b/a", "npz": None})
    with pytest.raises(ConfigError, match="^tfrecord=/data/a is on this machine, and the 2 hosts .*: use gs://"):
        check_shared_paths([here, elsewhere], {"workdir": "gs://b/a", "tfrecord": "/data/a"})


def test_each_worker_tells_its_notices_at_the_next_port():
    assert notice_servers(["10.0.0.1:8470", "[::1]:5"]) == ["10.0.0.1:8471", "[::1]:6"]


@pytest.mark.parametrize("kind", [tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError])
def test_the_loss_of_a_worker_names_it_and_can_be_repeated(kind):
    with socket.create_server(("127.0.0.1", 0)) as up, socket.create_server(("127.0.0.1", 0)) as down:
        servers = [f"127.0.0.1:{server.getsockname()[1]}" for server in (up, down)]
        error = kind(None, None, "recvmsg:Connection reset by peer")
        assert "out of reach (recvmsg" in str(lost_server(servers, error))
        down.close()
        lost = lost_server(servers, error)
    assert isinstance(lost, PreemptedError) and lost.exit_code == 75
    assert str(lost) == f"worker 1 ({servers[1]}) of the TPU is gone: start `serve_tpu` there, and run this again"


def test_a_server_that_started_anew_does_not_know_the_process():
    message = "Unable to find a context_id matching the specified one (7). Perhaps the worker was restarted"
    with socket.create_server(("127.0.0.1", 0)) as up:
        server = f"127.0.0.1:{up.getsockname()[1]}"
        assert isinstance(lost_server([server], tf.errors.InvalidArgumentError(None, None, message)), PreemptedError)


def test_errors_that_are_not_the_loss_of_a_worker_stay():
    with socket.create_server(("127.0.0.1", 0)) as up:
        server = f"127.0.0.1:{up.getsockname()[1]}"
        assert lost_server([server], tf.errors.InternalError(None, None, "the compiler")) is None
        store = "Error executing an HTTP request: HTTP response code 503 when reading gs://b/a"
        assert lost_server([server], tf.errors.UnavailableError(None, None, store)) is None
    assert lost_server([], tf.errors.UnavailableError(None, None, "the device")) is None
