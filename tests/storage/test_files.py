"""Files are written atomically, and errors name them."""

import json

import numpy as np
import pytest

from diffusion_tf.errors import InputError
from diffusion_tf.storage.files import (
    append_line,
    check_writable,
    new_folder,
    read_file,
    read_npz,
    write_file,
    write_json,
    write_npz,
)


def test_writing_a_file_creates_its_folder(tmp_path):
    path = tmp_path / "a" / "b.npz"
    write_npz(str(path), samples=np.arange(3))
    with np.load(path, allow_pickle=False) as archive:
        np.testing.assert_array_equal(archive["samples"], np.arange(3))
    append_line(str(path), "tail")
    assert read_file(str(path)).endswith(b"tail\n")
    write_file(str(path), b"new")
    assert [file.read_bytes() for file in path.parent.iterdir()] == [b"new"]


def test_check_writable_changes_nothing(tmp_path):
    path = tmp_path / "there"
    path.write_text("kept")
    check_writable(str(path))
    check_writable(str(tmp_path / "absent"))
    assert [file.read_text() for file in tmp_path.iterdir()] == ["kept"]


def test_errors_name_the_file(tmp_path):
    (tmp_path / "file").write_text("in the way")
    inside = str(tmp_path / "file" / "config.json")
    for use in (lambda: write_file(inside, b""), lambda: check_writable(inside), lambda: append_line(inside, "")):
        with pytest.raises(InputError, match="cannot write .*file/config.json"):
            use()
    with pytest.raises(InputError, match="cannot read .*absent"):
        read_file(str(tmp_path / "absent"))
    assert (tmp_path / "file").read_text() == "in the way"


def test_errors_name_a_file_that_is_not_an_npz(tmp_path):
    path = str(tmp_path / "a.npz")
    np.save(tmp_path / "array.npy", np.arange(3))
    for damaged in (b"", b"PK\x03\x04 half", b"text", (tmp_path / "array.npy").read_bytes()):
        write_file(path, damaged)
        with pytest.raises(InputError, match=r"a.npz is not an .npz file, or is damaged"):
            read_npz(path)


def test_a_folder_is_not_writable_as_a_file(tmp_path):
    with pytest.raises(InputError, match="it is a folder"):
        check_writable(str(tmp_path))


def test_numbers_that_are_not_finite_become_null_in_json(tmp_path):
    path = tmp_path / "a.json"
    write_json(str(path), {"a": float("nan"), "b": [1.5, {"c": float("-inf")}]})
    assert json.loads(path.read_text()) == {"a": None, "b": [1.5, {"c": None}]}


def test_a_new_folder_is_complete_or_absent(tmp_path):
    path = tmp_path / "new"

    def fail(folder):
        write_file(f"{folder}/a/b", b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), new_folder(str(path)) as folder:
        fail(folder)
    assert not list(tmp_path.iterdir())
    path.mkdir()
    with new_folder(f"{path}/") as folder:
        write_file(f"{folder}/a/b", b"whole")
    assert [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*")] == ["new", "new/a", "new/a/b"]
    for there in (path, path / "a/b"):
        with pytest.raises(InputError, match="already exists: name a new folder"), new_folder(str(there)):
            pass
    with pytest.raises(InputError, match="cannot write /proc/nothing"), new_folder("/proc/nothing/here") as folder:
        write_file(f"{folder}/a", b"")
