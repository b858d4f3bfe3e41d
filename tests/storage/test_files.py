"""Files are written atomically, and errors name them."""

import errno
import json
import math
import os
import tracemalloc
import warnings
import zipfile
from typing import NotRequired, TypedDict

import numpy as np
import pytest
import tensorflow as tf
from support.full_disks import mounted

from diffusion_tf.errors import DamagedFileError, InputError
from diffusion_tf.storage import gfile
from diffusion_tf.storage.files import (
    append_line,
    check_writable,
    copy_file,
    listed,
    new_folder,
    read_file,
    replacing,
    warn_once,
    write_file,
    writing,
)
from diffusion_tf.storage.json_files import read_json, write_json
from diffusion_tf.storage.npz_files import read_npz, write_npz


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


def test_an_npz_file_is_read_in_the_memory_of_its_arrays(tmp_path):
    arrays = {"samples": np.arange(2**22, dtype=np.uint32), "empty": np.zeros((0, 3)), "scalar": np.float32(0.5)}
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", **arrays)
        tracemalloc.start()
        found = read_npz(str(tmp_path / "x.npz"))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1.2 * 2**24
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array)
    write_file("ram://x.npz", (tmp_path / "x.npz").read_bytes())
    np.testing.assert_array_equal(read_npz("ram://x.npz")["samples"], arrays["samples"])


def test_an_npz_file_that_unpacks_to_far_more_than_its_size_is_refused(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", samples=np.zeros(2**27, np.uint8))
    with pytest.raises(DamagedFileError, match="bytes unpack to 134,217,728: save the arrays without compression"):
        read_npz(str(tmp_path / "x.npz"))
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with zipfile.ZipFile(tmp_path / "x.npz", "w", method) as archive, archive.open("x.npy", "w") as file:
            np.lib.format.write_array(file, np.zeros(2**20))
        with pytest.raises(DamagedFileError, match=r"x.npy is compressed by another method than NumPy's"):
            read_npz(str(tmp_path / "x.npz"))


class Point(TypedDict):
    step: int
    name: NotRequired[str]
    values: NotRequired[list[float]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "a.json is not JSON, or is damaged"),
        ("[1]", r"a.json is damaged, or not of this program \(Expected `object`, got `array`\)"),
        ('{"name": "x"}', r"Object missing required field `step`; there are: name\)"),
        ('{"step": true}', r"Expected `int`, got `bool` - at `\$.step`; there are: step"),
        ('{"step": 1.0}', r"Expected `int`, got `float`"),
        ('{"step": "1"}', r"Expected `int`, got `str`"),
        ('{"step": 1, "values": [1, null]}', r"Expected `float`, got `null` - at `\$.values\[1\]`"),
        ('{"step": 1, "values": [NaN]}', "the number NaN is too large, or not finite"),
        ('{"step": 1, "values": [1e39]}', "the number 1e39 is too large, or not finite"),
        ('{"step": 99999999999999999999999999}', "the number 99999999999999999999... is too large"),
    ],
)
def test_json_of_another_type_is_refused(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DamagedFileError, match=message):
        read_json(str(tmp_path / "a.json"), Point)


def test_json_keeps_further_keys_and_what_others_write_may_hold_nan(tmp_path):
    (tmp_path / "a.json").write_text('{"step": 1, "values": [1, 0.5], "more": [{}]}')
    assert read_json(str(tmp_path / "a.json"), Point) == {"step": 1, "values": [1, 0.5], "more": [{}]}
    (tmp_path / "a.json").write_text("[-Infinity]")
    assert read_json(str(tmp_path / "a.json")) == [-math.inf]


def test_a_list_of_names_is_one_line():
    assert listed([]) == "none" and listed(["a", "b"]) == "a, b"
    assert listed(map(str, range(10))) == "0, 1, 2, 3, 4, 5, 6, 7, 2 others"
    assert listed(["a\nb"]) == "'a\\nb'..."


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


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "x"), "the disk is full: make room on it"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk is full: make room on it"),
        (tf.errors.ResourceExhaustedError(None, None, "x; No space left on device\n\tdetails"), "the disk is full"),
        (tf.errors.ResourceExhaustedError(None, None, "x; Disk quota exceeded"), "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "Permission denied"),
        (OSError(errno.ELOOP, "Too many levels of symbolic links"), "it is a symbolic link: remove it"),
        (tf.errors.PermissionDeniedError(None, None, "x; Permission denied\n\tdetails"), "x; Permission denied"),
    ],
)
def test_a_failed_write_is_one_line_with_the_reason(error, reason):
    with pytest.raises(InputError) as raised, writing("runs/a.json"):
        raise error
    assert str(raised.value).startswith(f"cannot write runs/a.json ({reason}") and "\n" not in str(raised.value)


def test_a_full_disk_keeps_what_is_there_and_leaves_nothing_else(tmp_path):
    (tmp_path / "large").write_bytes(bytes(2**17))
    with mounted(tmp_path / "disk", 2**16) as disk:
        (disk / "old").write_bytes(b"kept\n")

        def fill_folder():
            with new_folder(f"{disk}/new") as folder:
                write_file(f"{folder}/a", b"small")
                write_file(f"{folder}/b", bytes(2**17))

        for path, use in (
            ("old", lambda: write_file(f"{disk}/old", bytes(2**17))),
            ("old", lambda: append_line(f"{disk}/old", "x" * 2**17)),
            ("old", lambda: copy_file(str(tmp_path / "large"), f"{disk}/old")),
            ("new.npz", lambda: write_npz(f"{disk}/new.npz", x=np.zeros(2**16))),
            ("new", fill_folder),
        ):
            with pytest.raises(InputError, match=f"cannot write {disk}/{path}.*the disk is full"):
                use()
            assert {path.name: path.read_bytes() for path in disk.iterdir()} == {"old": b"kept\n"}


def test_a_line_is_appended_after_the_last_whole_line(tmp_path):
    path = tmp_path / "lines"
    for before, after in (("", "c\n"), ("a\nb\n", "a\nb\nc\n"), ("a\nhal", "a\nc\n"), ("hal", "c\n")):
        path.write_text(before)
        append_line(str(path), "c")
        assert path.read_text() == after


def fork(work):
    """Runs `work` in a process that ends without cleaning up, and returns its number."""
    with warnings.catch_warnings(action="ignore"):  # JAX, if another test imported it, warns of its threads
        child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    return child


def test_what_a_killed_process_left_is_removed_and_what_others_write_stays(tmp_path):
    folder = tmp_path / "folder"

    def die():
        with replacing(f"{folder}/a.npz") as file:
            with open(file, "wb") as opened:
                opened.write(b"half")
            os._exit(0)

    child = fork(die)
    [left] = [path.name for path in folder.iterdir()]
    alive = left.replace(f"-{child}-", "-1-")
    restarted = left.replace(f"-{child}-", f"-{os.getpid()}-").replace(left[-12:-4], "0123abcd")
    others = [alive, left.replace(os.uname().nodename, "elsewhere"), "a.npz.tmp", "mine.tmp"]
    for name in (restarted, *others):
        (folder / name).write_bytes(b"")
    write_file(f"{folder}/b", b"")
    assert {path.name for path in folder.iterdir()} == {"b", *others}


def test_processes_that_write_one_file_do_not_meet(tmp_path):
    path = tmp_path / "a"
    with replacing(str(path)) as ours:
        with open(ours, "wb") as file:
            file.write(b"ours")
        fork(lambda: write_file(str(path), b"theirs"))
        assert path.read_bytes() == b"theirs"
    assert path.read_bytes() == b"ours" and [path] == list(tmp_path.iterdir())


def test_no_link_is_followed(tmp_path):
    victim, links = tmp_path / "victim", tmp_path / "links"
    victim.write_text("kept")
    links.mkdir()
    for name in ("a.json", "a.json.tmp"):
        (links / name).symlink_to(victim)
    write_json(str(links / "a.json"), 1)
    assert victim.read_text() == "kept" and (links / "a.json").read_text() == "1\n"
    (tmp_path / "link").symlink_to(links)  # a folder may be one
    write_json(str(tmp_path / "link" / "a.json"), 2)
    assert (links / "a.json").read_text() == "2\n"


def test_a_mount_that_cannot_flush_is_warned_about_once(tmp_path, monkeypatch, caplog):
    def fail(_):
        raise OSError(code, os.strerror(code))

    warn_once.cache_clear()
    monkeypatch.setattr(os, "fsync", fail)
    for code in (errno.EINVAL, errno.ENOTSUP):
        for name in "ab":
            write_file(str(tmp_path / name), b"")
        assert caplog.text.count(f"cannot flush to the disk ({os.strerror(code)})") == 1
    code = errno.EIO
    with pytest.raises(InputError, match="cannot write .*/c .Input/output error"):
        write_file(str(tmp_path / "c"), b"")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize(
    ("path", "folder"),
    [
        ("gs://bucket/run/x", "gs://bucket/run"),
        ("gs://bucket/x", "gs://bucket"),
        ("ram://x", "ram://"),
        ("/x", "/"),
        ("run/x", "run"),
        ("x", "."),
    ],
)
def test_the_folder_of_a_path(path, folder):
    assert gfile.folder_of(path) == folder


def test_a_path_with_a_scheme_never_makes_a_local_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_file("ram://top", b"1")
    check_writable("ram://top")
    assert read_file("ram://top") == b"1" and not os.listdir(tmp_path)
    assert gfile.is_local("folder/a://b") and not gfile.is_local("hdfs://host/x")
