"""The processes that TF_CONFIG names."""

import json
import socket
import threading

import pytest

from diffusion_tf.errors import InputError
from diffusion_tf.runtime.cluster import read_cluster, wait_for_all

TWO = ["a:1", "b:2"]


def config(worker=TWO, kind="worker", index=0, **jobs):
    return {"cluster": {"worker": worker, **jobs}, "task": {"type": kind, "index": index}}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (config(), (TWO, 0)),
        (config(index=1), (TWO, 1)),
        (config(chief=["c:3"]), (["c:3", *TWO], 1)),
        (config(chief=["c:3"], kind="chief"), (["c:3", *TWO], 0)),
        (config(worker=["[::1]:5"]), (["[::1]:5"], 0)),
    ],
)
def test_the_chief_comes_first(monkeypatch, value, expected):
    monkeypatch.setenv("TF_CONFIG", json.dumps(value))
    assert read_cluster() == expected


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "is not set"),
        ("nonsense", "names no cluster"),
        ({}, "has no entry 'cluster'"),
        ([], "names no cluster"),
        (1, "names no cluster"),
        ({"cluster": {"worker": TWO}}, "has no entry 'task'"),
        (config(worker="a:1"), "worker is 'a:1', not a list"),
        (config(worker=["a"]), "'a' is not HOST:PORT"),
        (config(worker=["a:70000"]), "'a:70000' is not HOST:PORT"),
        (config(worker=[1]), "an address is 1, not a text"),
        (config(worker=["a:1", "a:1"]), "names an address twice"),
        (config(index=2), "index out of range"),
        (config(index=-1), "the index is negative"),
        (config(index="0"), "index is '0', not a number"),
        (config(index=True), "index is True"),
        (config(kind="ps"), "has no entry 'ps'"),
        (config(ps=["c:3"]), "the job 'ps' is not one of chief, worker"),
        (config(chief=["c:3", "d:4"]), "more than one chief"),
    ],
)
def test_a_configuration_that_names_no_cluster_is_refused(monkeypatch, value, reason):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    if value is not None:
        monkeypatch.setenv("TF_CONFIG", value if isinstance(value, str) else json.dumps(value))
    with pytest.raises(InputError, match="^TF_CONFIG.*it must be like|names an address twice") as refused:
        read_cluster()
    assert reason in str(refused.value)


def free_addresses(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    addresses = [f"127.0.0.1:{s.getsockname()[1]}" for s in sockets]
    for s in sockets:
        s.close()
    return addresses


def test_processes_wait_for_all_and_say_for_whom(caplog):
    addresses = free_addresses(3)
    threads = [threading.Thread(target=wait_for_all, args=(addresses, i, 0.2), daemon=True) for i in range(3)]
    for thread in threads[:2]:
        thread.start()
    threads[0].join(1.0)
    assert all(thread.is_alive() for thread in threads[:2])
    lines = [record.getMessage() for record in caplog.records]
    assert lines and all(line.startswith("waiting since ") for line in lines)
    assert lines[-1].endswith(f" for {addresses[2]}")
    threads[2].start()
    for thread in threads:
        thread.join(10.0)
        assert not thread.is_alive()
    for address in addresses:  # which TensorFlow's server may take now
        socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))).close()


def test_another_server_at_the_address_of_a_process_is_not_that_process():
    addresses = free_addresses(2)
    with socket.create_server(("127.0.0.1", int(addresses[1].rpartition(":")[2]))):
        thread = threading.Thread(target=wait_for_all, args=(addresses, 0), daemon=True)
        thread.start()
        thread.join(1.5)
        assert thread.is_alive()
    wait_for_all(addresses, 1)  # the right one at last
    thread.join(10.0)
    assert not thread.is_alive()


def test_an_address_in_use_is_refused():
    with socket.create_server(("", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(InputError, match=f"cannot listen at {address}"):
            wait_for_all([address, "127.0.0.1:1"], 0)
