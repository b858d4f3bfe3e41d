"""Files are whole or absent, and errors name them."""

import numpy as np
import pytest

from diffusion_tf.errors import InputError
from diffusion_tf.files import append_line, check_writable, read_file, write_file, write_npz


def test_files_are_written_with_their_folder(tmp_path):
    path = tmp_path / "a" / "b.npz"
    write_npz(str(path), samples=np.arange(3))
    with np.load(path, allow_pickle=False) as archive:
        np.testing.assert_array_equal(archive["samples"], np.arange(3))
    append_line(str(path), "tail")
    assert read_file(str(path)).endswith(b"tail\n")
    write_file(str(path), b"new")
    assert [file.read_bytes() for file in path.parent.iterdir()] == [b"new"]


def test_looking_whether_a_file_can_be_written_changes_nothing(tmp_path):
    path = tmp_path / "there"
    path.write_text("kept")
    check_writable(str(path))
    check_writable(str(tmp_path / "absent"))
    assert [file.read_text() for file in tmp_path.iterdir()] == ["kept"]


def test_files_that_cannot_be_used_are_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    inside = str(tmp_path / "file" / "config.json")
    for use in (lambda: write_file(inside, b""), lambda: check_writable(inside), lambda: append_line(inside, "")):
        with pytest.raises(InputError, match="cannot write .*file/config.json"):
            use()
    with pytest.raises(InputError, match="cannot read .*absent"):
        read_file(str(tmp_path / "absent"))
    assert (tmp_path / "file").read_text() == "in the way"
