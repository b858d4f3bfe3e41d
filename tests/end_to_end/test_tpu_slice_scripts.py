"""The scripts for Cloud TPU VMs on slices: each worker of a gcloud that simulates them has a folder of its own."""

import http.server
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.gcloud import SCRIPTS, Machine, Slice, wait_until, write_program

RUN = "--workdir=gs://b/r"
LIBTPU = ".venv/libtpu.so"
# Arguments that a shell changes unless they are quoted.
ODD = ["--a=two words", "--b=it's", '--c="$HOME" `id` \\ *', "--d=line\nends\n", "", "~", "#", "--e=&;|<>()"]


@pytest.fixture
def tpu(tmp_path: Path) -> Iterator[Slice]:
    fake = Slice(Machine(tmp_path), tmp_path)
    yield fake
    fake.stop()
    fake.kill()


def run(tpu: Slice, script: str, *args: str, **env: str) -> str:
    """Runs a script that must succeed, and returns what it prints."""
    result = tpu.run(script, *args, **env)
    assert result.returncode == 0, result.stderr
    return result.stdout


def set_up(tpu: Slice, *flags: str) -> None:
    run(tpu, "create", *flags)
    run(tpu, "setup")


def error_line(tpu: Slice, script: str, *args: str) -> str:
    result = tpu.run(script, *args)
    assert result.returncode != 0
    (line,) = result.stderr.splitlines()
    return line


def test_setup_copies_the_last_commit_to_every_worker(tpu: Slice, tmp_path: Path) -> None:
    run(tpu, "create", "--type=v3-32")
    (tpu.checkout / "not_committed").touch()
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    run(tpu, "setup", TMPDIR=str(temporary))
    for worker in range(4):
        copied = tpu.folder / f"w{worker}/diffusion_tf"
        assert {path.name for path in copied.iterdir()} == {"tpu_scripts", ".venv"}
        assert {path.name for path in (copied / "tpu_scripts").iterdir()} == {path.name for path in SCRIPTS.iterdir()}
    assert list(temporary.iterdir()) == []


def test_a_slice_of_four_hosts_from_creation_to_deletion(tpu: Slice) -> None:
    set_up(tpu, "--type=v3-32")
    tpu.hold.touch()
    run(tpu, "train", "--", RUN, *ODD)
    checkout = tpu.folder / "w0/diffusion_tf"
    for worker in range(4):
        home = str(tpu.folder / f"w{worker}/diffusion_tf")
        assert tpu.wait_for(worker, "serve_tpu") == [[home, None, None, "-m", "experiments.serve_tpu"]]
    assert tpu.wait_for(0, "train") == [[str(checkout), "0", None, "-m", "experiments.train", "--tpu=slice", RUN, *ODD]]
    assert tpu.jobs() == ["w0 serve_tpu", "w0 train", "w1 serve_tpu", "w2 serve_tpu", "w3 serve_tpu"]

    assert "train is still running, as process" in error_line(tpu, "train", "--", RUN)
    assert error_line(tpu, "evaluate", "--tpu", "--", RUN).startswith("on_chips: another job uses the chips")
    server = tpu.pid(2, "serve_tpu")
    os.kill(server, 9)
    tpu.end(0, 75)
    wait_until((tpu.folder / "w2/diffusion_tf/serve_tpu.rc").exists)
    wait_until((checkout / "train.rc").exists)
    status = run(tpu, "status").splitlines()
    assert status[0] == "state: READY" and "w2: serve_tpu ended with 137" in status
    assert "w0: train ended with 75" in status
    assert f"w3: serve_tpu is running, as process {tpu.pid(3, 'serve_tpu')}" in status

    survivor = tpu.pid(3, "serve_tpu")
    run(tpu, "train", "--", RUN)
    assert len(tpu.wait_for(0, "train", 2)) == len(tpu.wait_for(2, "serve_tpu", 2)) == 2
    assert tpu.pid(3, "serve_tpu") == survivor
    logs = run(tpu, "logs", "--lines=1")
    assert [line for line in logs.splitlines() if line.startswith("w")] == ["w0", "w1", "w2", "w3"]
    assert logs.count("==> serve_tpu.log <==") == 4 and logs.count("==> train.log <==") == 1
    tpu.kill()
    run(tpu, "delete")
    assert "NOT_FOUND" in error_line(tpu, "status")


def test_a_slice_of_one_host_needs_no_servers(tpu: Slice) -> None:
    set_up(tpu)
    checkout = str(tpu.folder / "w0/diffusion_tf")
    run(tpu, "train", "--", "--workdir=r", *ODD)
    assert tpu.wait_for(0, "train") == [
        [checkout, None, None, "-m", "experiments.train", "--tpu=local", "--workdir=r", *ODD]
    ]
    run(tpu, "evaluate", "--", *ODD)
    program = ["-m", "experiments.evaluate", "--follow", "--strategy=mirrored"]
    assert tpu.wait_for(0, "evaluate") == [[checkout, "0", None, *program, *ODD]]
    write_program(tpu.machine.bin / "wget", '#!/bin/sh\n[ "$2" = "http://host/it\'s.zip" ]\n')
    run(tpu, "prepare_lsun", "--download=http://host/it's.zip", "--", *ODD)
    assert tpu.wait_for(0, "prepare_lsun", 2) == [
        [checkout, None, None, "-m", "zipfile", "-e", "it's.zip", "."],
        [checkout, "0", None, "-m", "experiments.prepare_lsun", "--source=it's", *ODD],
    ]
    assert tpu.jobs() == ["w0 evaluate", "w0 prepare_lsun", "w0 train"]


@pytest.mark.parametrize(("size", "argument"), [(8, "--tpu=local"), (16, "--tpu=slice")])
def test_newer_chips_are_reached_through_pjrt(tpu: Slice, size: int, argument: str) -> None:
    set_up(tpu, f"--type=v6e-{size}")
    run(tpu, "evaluate", "--tpu", "--", RUN)
    (program,) = tpu.wait_for(0, "evaluate")
    assert program[3:] == ["-m", "experiments.evaluate", argument, "--follow", RUN]
    if size == 8:
        assert program[1:3] == [None, LIBTPU]
    else:
        # The server has the chips, and the program must leave them alone.
        assert program[1:3] == ["0", None]
        assert [tpu.wait_for(worker, "serve_tpu")[0][2] for worker in range(2)] == [LIBTPU, LIBTPU]


def test_several_hosts_need_paths_that_all_reach(tpu: Slice) -> None:
    set_up(tpu, "--type=v3-32")
    for path in ("--workdir=r", "--data_dir=data"):
        line = error_line(tpu, "train", "--", RUN, path)
        assert line.startswith(f"on_chips: {path}: the 4 hosts of this slice share no disk")
    assert tpu.jobs() == []


def test_jax_runs_on_every_worker(tpu: Slice, tmp_path: Path) -> None:
    run(tpu, "create", "--type=v6e-16")
    export = tmp_path / "an export"
    export.mkdir()
    (export / "manifest.json").write_text("{}")
    run(tpu, "train", "--runner=jax", "--", str(export), "--workdir=r", *ODD)
    for worker in range(2):
        checkout = tpu.folder / f"w{worker}/diffusion_tf"
        (program,) = tpu.wait_for(worker, "train")
        assert program[3:] == [
            "-m",
            "experiments.train_exported",
            "exports/an export",
            "--workdir=r",
            *ODD,
            "--distributed",
        ]
        assert (checkout / "exports/an export/manifest.json").exists() and not (checkout / ".venv").exists()
    assert tpu.jobs() == ["w0 train", "w1 train"]


def test_jax_on_one_host_takes_an_export_from_a_bucket_and_the_chips_from_a_server(tpu: Slice) -> None:
    set_up(tpu)
    tpu.hold.touch()
    checkout = tpu.folder / "w0/diffusion_tf"
    run(tpu, "setup", "--runner=jax")
    subprocess.run(
        ["sh", "tpu_scripts/background.sh", "serve_tpu", "sleep", "60"],
        cwd=checkout,
        env={**tpu.machine.env, "PATH": os.environ["PATH"]},
        check=True,
    )
    # The command on the VM finds a gcloud that copies, behind the user's.
    real = (tpu.machine.bin / "gcloud").read_text().splitlines()[1]
    copy = f'if [ "$2" = cp ]; then mkdir "$5/loop"; echo "$4" >"$5/loop/from"; else {real}; fi'
    write_program(tpu.machine.bin / "gcloud", f"#!/bin/sh\n{copy}\n")
    run(tpu, "train", "--runner=jax", "--", "gs://b/loop/", "--workdir=r")
    (program,) = tpu.wait_for(0, "train")
    assert program[3:] == ["-m", "experiments.train_exported", "exports/loop", "--workdir=r"]
    assert (checkout / "exports/loop/from").read_text() == "gs://b/loop\n"
    assert (checkout / "serve_tpu.rc").exists()


@pytest.mark.parametrize(
    ("attribute", "text", "message"),
    [
        ("agent-worker-number", "<html>", "on_chips: the metadata server says that this is worker '<html>'"),
        ("worker-network-endpoints", "<html>", "on_chips: the metadata server names no worker 0: worker-network-"),
    ],
)
def test_a_metadata_server_that_talks_nonsense_is_named(tpu: Slice, attribute: str, text: str, message: str) -> None:
    set_up(tpu)
    (tpu.folder / "w0/attributes" / attribute).write_text(text)
    assert error_line(tpu, "train", "--", RUN).startswith(message)
    assert tpu.jobs() == []


def test_a_metadata_server_that_is_busy_once_is_asked_again(tpu: Slice) -> None:
    set_up(tpu)
    attributes, asked = tpu.folder / "w0/attributes", []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.headers["Metadata-Flavor"], self.path.rpartition("/")[2]))
            self.send_response(503 if len(asked) == 1 else 200)
            self.end_headers()
            if len(asked) > 1:
                self.wfile.write((attributes / asked[-1][1]).read_bytes())

        def log_message(self, *args: object) -> None:
            pass

    (tpu.machine.bin / "curl").unlink()
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            run(tpu, "train", "--", RUN, GCE_METADATA_HOST=f"127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()
    assert asked[:2] == [("Google", "agent-worker-number")] * 2
    assert tpu.wait_for(0, "train")[0][5] == "--tpu=local"


def keep_alive(tpu: Slice, *flags: str) -> None:
    """Starts `train.sh --keep_alive` on a new slice; its trainer runs when this returns."""
    set_up(tpu, *flags)
    tpu.hold.touch()
    tpu.start("train", "--keep_alive", "--", RUN)
    tpu.wait_for(0, "train")


def end(tpu: Slice, code: int) -> list[str]:
    """Waits until the watching ends with an exit code; returns what it printed."""
    assert tpu.watcher and tpu.watcher.wait(120) == code, tpu.printed.read_text()
    return tpu.printed.read_text().splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--spot"], ["--spot", "--queued"], []])
def test_a_preempted_slice_is_created_again_as_it_was(tpu: Slice, flags: list[str]) -> None:
    keep_alive(tpu, "--type=v3-32", "--version=image", *flags)
    created = json.loads((tpu.folder / "created").read_text())
    (tpu.folder / "no_capacity").touch()  # until the second try
    tpu.preempt()
    wait_until(lambda: (tpu.folder / "state").exists() and (tpu.folder / "state").read_text() == "READY")
    tpu.wait_for(0, "train")
    assert [len(tpu.wait_for(worker, "serve_tpu")) for worker in range(4)] == [1] * 4
    assert json.loads((tpu.folder / "created").read_text()) == created
    # A slice that is gone altogether comes back too.
    tpu.kill()
    assert tpu.run("delete", *(["--queued"] if "--queued" in flags else [])).returncode == 0
    tpu.wait_for(0, "train")
    tpu.end(0, 0)
    printed = end(tpu, 0)
    assert printed[-1].startswith("The training on tpu has ended.")
    assert "tpu is PREEMPTED. Creating it again." in printed and "tpu is GONE. Creating it again." in printed
    creations = [call for call in tpu.calls() if call[1] == "create"]
    assert len(creations) == 4 and all(call[2:] == created for call in creations)


@pytest.mark.slow
def test_a_request_that_waits_in_the_queue_is_not_repeated_until_it_has_failed(tpu: Slice) -> None:
    keep_alive(tpu, "--spot", "--queued")
    queue = tpu.folder / "queue"
    queue.write_text("WAITING_FOR_RESOURCES")
    tpu.preempt()

    def made(verb: str) -> int:
        return sum(call[:2] == ["queued-resources", verb] for call in tpu.calls())

    wait_until(lambda: made("describe") > 3)
    assert made("create") == 2
    queue.write_text("FAILED")
    wait_until(lambda: made("create") > 2)
    queue.unlink()
    tpu.wait_for(0, "train")
    tpu.end(0, 0)
    end(tpu, 0)


@pytest.mark.slow
def test_an_interrupted_training_is_started_again_until_it_fails(tpu: Slice) -> None:
    keep_alive(tpu)
    tpu.end(0, 75)
    tpu.wait_for(0, "train", 2)
    # After a reboot the process is gone, and its exit code is not known.
    (tpu.folder / "offline").touch()
    os.kill(tpu.pid(0, "train"), 9)
    record = tpu.folder / "w0/diffusion_tf/train.rc"
    wait_until(record.exists)
    record.unlink()
    (tpu.folder / "offline").unlink()
    tpu.wait_for(0, "train", 3)
    tpu.end(0, 3)
    printed = end(tpu, 1)
    assert printed[-1] == (
        "train: the training on tpu ended with code 3: sh tpu_scripts/logs.sh --name=tpu --job=train"
    )
    assert printed.count("The training on tpu was interrupted.") == 2


@pytest.mark.slow
def test_the_watching_can_be_resumed_and_does_without_gcloud_for_a_while(tpu: Slice) -> None:
    keep_alive(tpu)
    tpu.stop()
    tpu.start("train", "--keep_alive", "--", RUN)
    wait_until(lambda: "train is still running, as process" in tpu.printed.read_text())
    (tpu.folder / "offline").touch()
    asked = len(tpu.calls())
    wait_until(lambda: len(tpu.calls()) > asked + 3)
    assert tpu.watcher and tpu.watcher.poll() is None
    (tpu.folder / "offline").unlink()
    tpu.end(0, 0)
    end(tpu, 0)
    assert len(tpu.log(0, "train")) == 1


def test_only_a_slice_that_exists_is_kept_alive(tpu: Slice) -> None:
    line = error_line(tpu, "train", "--keep_alive", "--", RUN)
    assert line == "train: there is no TPU VM tpu: create it with create.sh"


def test_an_exit_code_is_recorded_for_every_job(tpu: Slice) -> None:
    run(tpu, "create")
    checkout = tpu.folder / "w0/diffusion_tf"
    shutil.copytree(SCRIPTS, checkout / "tpu_scripts")

    def background(*args: str) -> None:
        subprocess.run(["sh", "tpu_scripts/background.sh", *args], cwd=checkout, env=tpu.machine.env, check=True)

    assert run(tpu, "status").splitlines()[1:] == ["w0: no job has been started"]
    exit_codes: list[tuple[str, Callable[[], None]]] = [
        ("0", lambda: background("job", "true")),
        ("7", lambda: background("job", "sh", "-c", "exit 7")),
        ("127", lambda: background("job", "nowhere/python")),
    ]
    for code, start in exit_codes:
        (checkout / "job.rc").unlink(missing_ok=True)
        start()
        wait_until((checkout / "job.rc").exists)
        assert (checkout / "job.rc").read_text() == f"{code}\n"
        assert run(tpu, "status").splitlines()[1:] == [f"w0: job ended with {code}"]
