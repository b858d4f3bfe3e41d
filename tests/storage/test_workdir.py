"""The folder of a run: its configuration, metrics and lock."""

import dataclasses
import errno
import fcntl
import json
import os
import subprocess
import sys

import pytest

from diffusion_tf.data_settings import DataSettings
from diffusion_tf.errors import InputError
from diffusion_tf.presets import get_preset
from diffusion_tf.storage.workdir import Workdir


def test_the_configuration_reads_back(tmp_path):
    workdir = Workdir(tmp_path / "run")
    preset = get_preset("cifar10", seed=3, attn_resolutions=(16, 8))
    workdir.refuse_other_run(preset, 100)
    workdir.write_config(preset, 100, "--seed=3\n")
    workdir.refuse_other_run(preset, 100)
    assert workdir.read_preset() == preset
    assert (tmp_path / "run" / "flags.txt").read_text() == "--seed=3\n"


def test_another_recipe_is_refused_and_writes_nothing(tmp_path):
    workdir = Workdir(tmp_path)
    workdir.write_config(get_preset("digits"), 100, "first")
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(InputError, match=r"another recipe \(dropout: 0.1 != 0.0; learning_rate: 0.01 != 0.001"):
        workdir.refuse_other_run(get_preset("digits", learning_rate=0.01, dropout=0.1), 100)
    with pytest.raises(InputError, match=r"another recipe \(num_examples: 24 != 100"):
        workdir.refuse_other_run(get_preset("digits"), 24)
    assert (tmp_path / "config.json").read_bytes() == before
    assert (tmp_path / "flags.txt").read_text() == "first"
    workdir.refuse_other_run(get_preset("digits", num_steps=9000), 100)


def test_some_fields_may_change_when_the_user_allows_it_and_the_change_is_recorded(tmp_path):
    workdir, first = Workdir(tmp_path), get_preset("digits")
    workdir.write_config(first, 100, "", allow_recipe_change=True)
    before = json.loads((tmp_path / "config.json").read_text())
    assert "history" not in before and workdir.earlier_recipes() == []
    second = dataclasses.replace(first, learning_rate=1e-4, ema_decay=0.99)
    with pytest.raises(InputError, match="learning_rate: 0.0001 != 0.001.* allow the change by `allow_recipe_change`"):
        workdir.write_config(second, 100, "")
    for other, num_examples in ((dataclasses.replace(second, batch_size=32), 100), (second, 24)):
        with pytest.raises(InputError, match=r"another recipe \([bn][^;]*\): only .*learning_rate.* may change"):
            workdir.write_config(other, num_examples, "", allow_recipe_change=True)
    assert json.loads((tmp_path / "config.json").read_text()) == before
    third = dataclasses.replace(second, learning_rate=1e-5)
    for step, preset in ((400, second), (500, second), (600, third)):
        workdir.write_config(preset, 100, "", step=step, allow_recipe_change=True)
    assert workdir.read_preset() == third and workdir.earlier_recipes() == [second, first]
    changes = {"learning_rate": {"old": 1e-3, "new": 1e-4}, "ema_decay": {"old": first.ema_decay, "new": 0.99}}
    assert json.loads((tmp_path / "config.json").read_text()) == {
        **dataclasses.asdict(third),
        "ch_mult": [1, 2],
        "attn_resolutions": [],
        "num_examples": 100,
        "history": [
            {"step": 400, "changes": changes},
            {"step": 600, "changes": {"learning_rate": {"old": 1e-4, "new": 1e-5}}},
        ],
    }
    workdir.write_config(third, 100, "")
    assert workdir.earlier_recipes() == [second, first]


def test_other_resizing_of_the_same_pictures_is_refused(tmp_path):
    workdir, preset = Workdir(str(tmp_path / "run")), get_preset("digits")
    workdir.write_config(preset, 100, "", data=DataSettings(images="a", resize="pad"))
    workdir.refuse_other_run(preset, 100, data=DataSettings(images="moved", resize="pad"))
    with pytest.raises(InputError, match=r"another recipe \(resize: crop != pad, asked != there\)"):
        workdir.refuse_other_run(preset, 100, data=DataSettings(images="a"))


def test_imported_weights_may_train_on_any_number_of_images(tmp_path):
    workdir = Workdir(tmp_path)
    workdir.write_config(get_preset("digits"), None, "")
    assert workdir.read_preset() == get_preset("digits")
    workdir.refuse_other_run(get_preset("digits"), 24)
    with pytest.raises(InputError, match=r"another recipe \(dropout"):
        workdir.refuse_other_run(get_preset("digits", dropout=0.1), 24)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"dataset": "digits", "num_examples": 1}', '{"unknown": 1, "num_examples": 1}']
)
def test_a_foreign_configuration_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match="config.json is not a configuration of this version"):
        Workdir(tmp_path).read_preset()


def test_an_empty_folder_has_no_preset(tmp_path):
    with pytest.raises(InputError, match="holds no run"):
        Workdir(tmp_path).read_preset()


def test_metrics_are_rewound_to_the_checkpoint(tmp_path):
    workdir = Workdir(tmp_path)
    workdir.rewind_metrics(0)
    for step in (1, 2, 3):
        workdir.append_metrics({"step": step, "loss": 0.5})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # a process died here
    workdir.rewind_metrics(2)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.5}\n'


HOLD = """
import fcntl, os, sys, time
file = open(sys.argv[1] + "/lock", "r+")
fcntl.flock(file, fcntl.LOCK_EX)
file.truncate(0)
print(os.getpid(), file=file, flush=True)
print("held", flush=True)
time.sleep(600)
"""


def test_the_lock_excludes_other_processes_until_they_end(tmp_path):
    workdir = Workdir(str(tmp_path / "run"))
    with workdir.lock(), pytest.raises(InputError, match="in use by process [0-9]+: wait"), workdir.lock():
        pass
    process = subprocess.Popen([sys.executable, "-c", HOLD, workdir.path], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"is in use by process {process.pid}: "), workdir.lock():
            pass
    finally:
        process.kill()
        process.communicate()
    with workdir.lock():
        assert (tmp_path / "run" / "lock").read_text().strip().isdigit()


def test_a_lock_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "victim").write_text("kept")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/lock").symlink_to(tmp_path / "victim")
    linked = Workdir(str(tmp_path / "run"))
    with pytest.raises(InputError, match="cannot write .*run/lock .it is a symbolic link: remove"), linked.lock():
        pass
    assert (tmp_path / "victim").read_text() == "kept"
    (tmp_path / "run/lock").unlink()
    (tmp_path / "link").symlink_to(tmp_path / "run")  # the folder may be one
    with Workdir(str(tmp_path / "link")).lock():
        assert (tmp_path / "run/lock").exists()


def test_a_line_is_not_appended_through_a_link(tmp_path):
    (tmp_path / "victim").write_text("its last line has no end")
    (tmp_path / "evaluations.jsonl").symlink_to(tmp_path / "victim")
    with pytest.raises(InputError, match="evaluations.jsonl .it is a symbolic link: remove it"):
        Workdir(str(tmp_path)).append_evaluation({"step": 1})
    assert (tmp_path / "victim").read_text() == "its last line has no end"


def test_a_workdir_that_is_a_file_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_text("kept")
    workdir = Workdir(str(path))
    for use in (workdir.read_preset, workdir.lock().__enter__):
        with pytest.raises(InputError, match="workdir=.*file is not a folder"):
            use()
    assert path.read_text() == "kept"


def test_a_mount_without_locks_is_warned_about(tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", fail)
    for code in (errno.ENOLCK, errno.EOPNOTSUPP):
        with Workdir(str(tmp_path)).lock():
            assert f"{tmp_path} cannot be locked ({os.strerror(code)}): train there in one process" in caplog.text
    code = errno.EIO
    with pytest.raises(InputError, match="cannot write .*lock .Input/output error"), Workdir(str(tmp_path)).lock():
        pass


def test_there_is_no_lock_in_an_object_store():
    workdir = Workdir("ram://locked")
    with workdir.lock(), workdir.lock():
        workdir.write_config(get_preset("digits"), 100, "")
    assert workdir.read_preset() == get_preset("digits")


def test_a_configuration_without_a_newer_field_is_read(tmp_path):
    workdir = Workdir(tmp_path)
    workdir.write_config(get_preset("digits"), 100, "")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["max_skipped_steps"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    workdir.refuse_other_run(get_preset("digits"), 100)


def test_damaged_metrics_are_refused_and_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"loss": 1}\n')
    for use in (Workdir(tmp_path).read_metrics, lambda: Workdir(tmp_path).rewind_metrics(5)):
        with pytest.raises(
            InputError, match="metrics.jsonl, line 2, is damaged.*missing required field `step`; there are: loss"
        ):
            use()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_the_classes_of_a_conditional_run_are_kept_and_checked(tmp_path):
    workdir, preset = Workdir(tmp_path), get_preset("digits", num_classes=2)
    workdir.write_config(preset, 100, "", classes=("cat", "dog"))
    assert workdir.read_classes() == ("cat", "dog") and workdir.read_preset() == preset
    with pytest.raises(InputError, match=r"another recipe \(classes: cat, cow != cat, dog"):
        workdir.refuse_other_run(preset, 100, classes=("cat", "cow"))
    with pytest.raises(InputError, match=r"another recipe \(num_classes: 0 != 2"):
        workdir.refuse_other_run(get_preset("digits"), 100, classes=("cat", "dog"))
    other = Workdir(tmp_path / "other")
    other.write_config(get_preset("digits"), 100, "")
    assert other.read_classes() == ()
