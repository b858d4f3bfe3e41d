"""The headers of safetensors files, and their comparison with a network."""

import json
import pickle

import numpy as np
import pytest
import safetensors.numpy
import tensorflow as tf

from diffusion_tf.errors import DamagedFileError, InputError
from diffusion_tf.storage.checkpoints import assign_arrays, check_specs
from diffusion_tf.storage.safetensors_header import ArraySpec, read_arrays, read_header

ARRAYS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.asarray(7, np.int64), "c": np.ones(3, np.float16)}
SPECS = {"a": ArraySpec("float32", (2, 3)), "b": ArraySpec("int64", ()), "c": ArraySpec("float16", (3,))}


def with_header(entries, arrays=b""):
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + arrays


def test_the_header_describes_the_arrays(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors.numpy.save(ARRAYS, {"format": "pt"}))
    header = read_header(str(path))
    assert header.specs == SPECS and header.metadata == {"format": "pt"}
    assert (header.array_bytes, header.file_bytes) == (4 * 6 + 8 + 2 * 3, path.stat().st_size)
    for name, array in read_arrays(str(path), header).items():
        np.testing.assert_array_equal(array, ARRAYS[name])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "its header does not fit"),
        ((2**40).to_bytes(8, "little") + bytes(99), "its header does not fit"),
        (pickle.dumps({"a": 1}, protocol=2), "it is a pickle, which may run code"),
        (pickle.dumps({"a": 1}, protocol=5), "it is a pickle, which may run code"),
        (b"PK\x03\x04" + bytes(99), "it is a pickle, which may run code"),
        ((99).to_bytes(8, "little") + b"[" * 99, "its header does not describe arrays"),
        (with_header([]), "its header does not describe arrays"),
        (with_header({"a": []}), "its header does not describe arrays"),
        (with_header({"a": {"dtype": "X9", "shape": [1]}}, b"1"), "its header does not describe arrays"),
        (with_header({"a": {"dtype": "U8", "shape": ["1"]}}, b"1"), "its header does not describe arrays"),
        (with_header({"a\n": {"dtype": "U8", "shape": [1]}}, b"1"), "its header does not describe arrays"),
        (with_header({"a": {"dtype": "U8", "shape": [2]}}, b"1"), r"it has \d+ bytes, and its header states \d+"),
    ],
)
def test_other_files_are_refused(tmp_path, content, reason):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match=rf"x.safetensors is not a safetensors file, or is damaged \({reason}"):
        read_header(str(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": None}, "a is missing"),
        ({"d": ArraySpec("float32", ())}, "d is unknown"),
        ({"a": ArraySpec("float32", (3, 2))}, r"a is float32 \(3, 2\), not float32 \(2, 3\)"),
        ({"a": ArraySpec("float16", (2, 3))}, r"a is float16 \(2, 3\), not float32 \(2, 3\)"),
    ],
)
def test_arrays_of_another_network_are_named(change, message):
    check_specs(SPECS, SPECS, "file")
    found = {name: spec for name, spec in {**SPECS, **change}.items() if spec}
    with pytest.raises(InputError, match=f"file holds another network: {message}"):
        check_specs(found, SPECS, "file")


def test_arrays_are_assigned_all_or_none():
    variables = {"w": tf.Variable([1.0, 2.0]), "half": tf.Variable([1.0], dtype=tf.bfloat16), "step": tf.Variable(1)}
    arrays = {"w": np.float32([3, 4]), "half": np.float32([5]), "step": np.asarray(6, np.int32)}
    with pytest.raises(InputError, match="step is int64"):
        assign_arrays(variables, {**arrays, "step": np.asarray(6)}, "file")
    assert variables["w"].numpy().tolist() == [1, 2]
    assign_arrays(variables, arrays, "file")
    assert [v.numpy().tolist() for v in variables.values()] == [[3, 4], [5], 6]
