"""What a worker of a TPU slice serves."""

import pytest

from diffusion_tf.errors import ConfigError, InputError
from diffusion_tf.runtime.metadata import PREEMPTED, read_metadata
from diffusion_tf.runtime.tpu_server import NoticeServer, tpu_environment


def metadata(accelerator_type, **changes):
    values = {
        "instance/attributes/agent-worker-number": "2",
        "instance/attributes/accelerator-type": accelerator_type,
        "instance/attributes/worker-network-endpoints": "a:8470:10.0.0.2,b:8470:10.0.0.3",
        "instance/network-interfaces/0/ip": "10.0.0.4",
        **changes,
    }

    def read(path):
        if path not in values:
            raise OSError("404")
        return values[path]

    return read


@pytest.mark.parametrize(
    ("accelerator_type", "hosts"),
    # The table in tensorflow/python/tools/grpc_tpu_worker.py of tensorflow-tpu 2.20.0.
    [
        ("v2-8", "1,1,1"), ("v2-32", "2,2,1"), ("v2-128", "4,4,1"), ("v2-256", "4,8,1"), ("v2-512", "8,8,1"),
        ("v3-8", "1,1,1"), ("v3-32", "2,2,1"), ("v3-64", "2,4,1"), ("v3-128", "4,4,1"), ("v3-256", "4,8,1"),
        ("v3-512", "8,8,1"), ("v3-1024", "8,16,1"), ("v3-2048", "16,16,1"),
    ],
)  # fmt: skip
def test_the_layout_of_v2_and_v3_is_that_of_tensorflow(accelerator_type, hosts):
    assert tpu_environment(metadata(accelerator_type)) == {
        "CLOUD_TPU_TASK_ID": "2",
        "TPU_CHIPS_PER_HOST_BOUNDS": "2,2,1",
        "TPU_HOSTNAME_OVERRIDE": "10.0.0.4",
        "TPU_HOST_BOUNDS": hosts,
        "TPU_LOCK_DEVICE": "true",
        "TPU_MESH_CONTROLLER_ADDRESS": "10.0.0.2:8476",
        "TPU_MESH_CONTROLLER_PORT": "8476",
        "TPU_STDERR_LOG_LEVEL": "0",
    }


@pytest.mark.parametrize("accelerator_type", ["v4-32", "v5litepod-16", "v5p-32", "v6e-16"])
def test_newer_types_find_their_layout(accelerator_type):
    found = tpu_environment(metadata(accelerator_type))
    assert found["CLOUD_TPU_TASK_ID"] == "2" and not {"TPU_HOST_BOUNDS", "TPU_CHIPS_PER_HOST_BOUNDS"} & found.keys()


@pytest.mark.parametrize(
    "read",
    [
        metadata("v3"),
        metadata("v3-32", **{"instance/attributes/worker-network-endpoints": "x"}),
        lambda path: read_metadata(path, "127.0.0.1:9"),  # where nothing answers
    ],
)
def test_a_machine_that_is_no_tpu_vm_is_refused(read):
    with pytest.raises(InputError, match="describes no TPU VM .*: run on a TPU VM, or rehearse"):
        tpu_environment(read)


def test_a_worker_tells_its_notice_as_the_metadata_server_does():
    answers = iter([False, True])
    with NoticeServer(0, lambda: next(answers)) as server:
        host = f"127.0.0.1:{server.port}"
        assert server.last_asked is None
        assert [read_metadata(PREEMPTED, host) for _ in range(2)] == ["FALSE", "TRUE"]
        assert server.last_asked is not None
        with pytest.raises(OSError, match="404"):
            read_metadata("instance/attributes/accelerator-type", host)
        with pytest.raises(ConfigError, match=f"port={server.port - 1}: the next port, {server.port}, is in use"):
            NoticeServer(server.port, lambda: False)
