"""Files that PyTorch wrote are read to their values, and nothing in a hostile one runs."""

import io
import os
import pathlib
import pickle
import zipfile

import numpy as np
import pytest

from diffusion_tf.errors import DamagedFileError
from diffusion_tf.storage.torch_files import LEGACY_MAGIC, read_torch

FIXTURES = pathlib.Path(__file__).parent.parent / "fixtures"
MEMBERS = {
    name: zipfile.ZipFile(FIXTURES / "torch_small.pth").read(name)
    for name in zipfile.ZipFile(FIXTURES / "torch_small.pth").namelist()
}


@pytest.mark.parametrize("name", ["torch_small.pth", "torch_small_legacy.pth"])
def test_files_of_pytorch_hold_their_tensors(name):
    """The tensors share storages, and one is transposed."""
    base = np.arange(24, dtype=np.float32)
    expected = {
        "kernel": (base / 8).reshape(2, 3, 4), "transposed": base.reshape(4, 6).T, "tail": base[20:],
        "half": np.array([0.5, -2.0], np.float16), "double": np.array([[1 / 3]]), "count": np.array(7),
        "mask": np.array([True, False]), "byte": np.array([255], np.uint8), "empty": np.zeros((0, 3), np.float32),
    }  # fmt: skip
    arrays = read_torch(str(FIXTURES / name))
    bfloat = arrays.pop("bfloat")
    assert bfloat.dtype.name == "bfloat16" and bfloat.astype(np.float32) == [1.5]
    assert arrays.keys() == expected.keys()
    for key, array in expected.items():
        assert arrays[key].dtype == array.dtype
        np.testing.assert_array_equal(arrays[key], array)


def archive(path, pickled=None, compression=zipfile.ZIP_STORED, **changed):
    """Writes the fixture with another pickle, or other members."""
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in MEMBERS.items():
            key = name.split("/")[-1]
            file.writestr(name, pickled if key == "data.pkl" and pickled is not None else changed.get(key, content))
    return str(path)


class Runs:
    """Pickled, it calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_nothing_in_a_pickle_runs(tmp_path):
    (tmp_path / "victim").mkdir()
    for function, arguments, name in (
        (os.rmdir, (str(tmp_path / "victim"),), "posix.rmdir"),
        (eval, ("1",), "__builtin__.eval"),
        (io.open, (str(tmp_path / "x"), "w"), "io.open"),
    ):
        hostile = pickle.dumps({"a": Runs(function, *arguments)}, protocol=2)
        (tmp_path / "legacy.pth").write_bytes(LEGACY_MAGIC + hostile)
        for path in (archive(tmp_path / "x.pth", hostile), str(tmp_path / "legacy.pth")):
            with pytest.raises(DamagedFileError, match=rf"pth is not a PyTorch file .*it names {name}"):
                read_torch(path)
        assert pickle.loads(pickle.dumps(Runs(len, "abc"))) == 3  # such a pickle does run its function elsewhere
    assert (tmp_path / "victim").is_dir() and not (tmp_path / "x").exists()


def tensor_pickle(numel=24, offset=0, shape=(24,), stride=(1,), key="0", kind=b"FloatStorage", twice=b""):
    """The pickle of {"a": tensor}, by hand."""
    numbers = lambda values: b"(" + b"".join(b"J" + value.to_bytes(4, "little", signed=True) for value in values) + b"t"
    text = lambda value: b"X" + len(value).to_bytes(4, "little") + value.encode()
    storage = b"(" + text("storage") + b"ctorch\n" + kind + b"\n" + text(key) + text("cpu") + numbers([numel])[1:-1]
    number = numbers([offset])[1:-1]
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"tQ" + number + numbers(shape) + numbers(stride)
    return b"\x80\x02}" + text("a") + tensor + b"\x89}tR" + b"s" + twice + b"."


def test_a_tensor_outside_its_storage_is_refused(tmp_path):
    sound = archive(tmp_path / "x.pth", tensor_pickle(), **{"0": bytes(96)})
    assert read_torch(sound)["a"].shape == (24,)
    for fields in (
        {"numel": 25}, {"offset": 1}, {"offset": -1}, {"shape": (25,)}, {"shape": (5, 5), "stride": (0, 0)},
        {"shape": (2**31 - 1,) * 2, "stride": (0, 0)}, {"shape": (-1,)}, {"stride": (-1,)}, {"stride": (2,)},
        {"shape": (4, 6)}, {"key": "../0"}, {"kind": b"QInt8Storage"}, {"twice": b"0"},
    ):  # fmt: skip
        path = archive(tmp_path / "x.pth", tensor_pickle(**fields), **{"0": bytes(96)})
        with pytest.raises(DamagedFileError, match="x.pth is not a PyTorch file of tensors alone") as error:
            read_torch(path)
        assert "\n" not in str(error.value)


def test_other_contents_are_refused_by_name(tmp_path):
    path = tmp_path / "x.pth"
    laughs = b"\x80\x02)" + b"".join(b"q\x00h\x00\x86" for _ in range(60)) + b"}h\x00K\x01s."  # a key of 2^60 parts
    for pickled, message in (
        (pickle.dumps({"epoch": 3}, protocol=2), "its entry epoch is no tensor"),
        (pickle.dumps([1], protocol=2), "it holds no dictionary"),
        (pickle.dumps({1: 2}, protocol=2), "a name in it is no text"),
        (pickle.dumps({"a": 1.5}, protocol=2), "its pickle has the opcode BINFLOAT"),
        (b"\x80\x02r\xff\xff\xff\x7f.", "is damaged"),
        (b"\x80\x02}", "is damaged"),
        (laughs, "a name in it is no text"),
    ):
        with pytest.raises(DamagedFileError, match=message):
            read_torch(archive(path, pickled))
    with pytest.raises(DamagedFileError, match="its members are compressed"):
        read_torch(archive(path, compression=zipfile.ZIP_DEFLATED))
    with pytest.raises(DamagedFileError, match="its numbers are not little-endian"):
        read_torch(archive(path, byteorder=b"big"))
    path.write_bytes(pickle.dumps({}))
    with pytest.raises(DamagedFileError, match="it begins as neither a zip archive nor a pickle of PyTorch"):
        read_torch(str(path))
