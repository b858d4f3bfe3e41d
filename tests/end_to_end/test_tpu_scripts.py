"""The scripts for Cloud TPU VMs, run with a gcloud that records its calls or simulates the VM."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
SCRIPTS = ROOT / "tpu_scripts"
CREATE = ["gcloud", "compute", "tpus", "tpu-vm", "create", "tpu"]
QUEUE = ["gcloud", "compute", "tpus", "queued-resources", "create", "tpu", "--node-id=tpu"]
SSH = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "tpu"]
START = "--command=sh diffusion_tf/tpu_scripts/background.sh"
PYTHON = ".venv/bin/python -m experiments"
PJRT = "env NEXT_PLUGGABLE_DEVICE_USE_C_API=true TF_PLUGGABLE_DEVICE_LIBRARY_PATH=.venv/libtpu.so"
ZIP = "http://dl.yf.io/lsun/scenes/church_outdoor_train_lmdb.zip"
# Arguments that a shell changes unless they are quoted.
ODD = ["--a=two words", "--b=it's", '--c="$HOME" `id` \\ *', "--d=line\nends\n", "", "~", "#", "--e=&;|<>()"]

# (script and flags except --name, the expected calls of gcloud, git and tensorboard)
CALLS = [
    ("create", [[*CREATE, "--accelerator-type=v3-8", "--version=tpu-ubuntu2204-base"]]),
    (
        "create --type=v5litepod-8 --spot",
        [[*CREATE, "--accelerator-type=v5litepod-8", "--version=v2-alpha-tpuv5-lite", "--spot"]],
    ),
    ("create --type=v9-8 --version=new", [[*CREATE, "--accelerator-type=v9-8", "--version=new"]]),
    (
        "create --queued --type=v6e-8 --zone=z --project=p",
        [[*QUEUE, "--accelerator-type=v6e-8", "--runtime-version=v2-alpha-tpuv6e", "--zone=z", "--project=p"]],
    ),
    (
        "create --queued --spot",
        [[*QUEUE, "--accelerator-type=v3-8", "--runtime-version=tpu-ubuntu2204-base", "--spot"]],
    ),
    (
        "setup --zone=z",
        [
            ["git", f"--git-dir={ROOT}/.git", "archive", "--format=tar.gz", "--output=diffusion_tf.tar.gz", "HEAD"],
            [*SSH[:4], "scp", "diffusion_tf.tar.gz", "tpu:", "--worker=all", "--zone=z"],
            [
                *SSH,
                "--worker=all",
                "--command=mkdir -p diffusion_tf && tar -xzf diffusion_tf.tar.gz -C diffusion_tf"
                " && sh diffusion_tf/tpu_scripts/install.sh",
                "--zone=z",
            ],
        ],
    ),
    (
        "train --project=p -- --workdir=gs://b/r --dry_run",
        [
            [
                *SSH,
                "--worker=0",
                f"{START} train {PYTHON}.train --tpu=local --workdir=gs://b/r --dry_run",
                "--project=p",
            ]
        ],
    ),
    ("train --pjrt -- --x", [[*SSH, "--worker=0", f"{START} train {PJRT} {PYTHON}.train --tpu=local --x"]]),
    (
        "evaluate -- --workdir=r",
        [
            [
                *SSH,
                "--worker=0",
                f"{START} evaluate env TPU_LOAD_LIBRARY=0 {PYTHON}.evaluate --follow --strategy=mirrored --workdir=r",
            ]
        ],
    ),
    (
        "evaluate --tpu -- --workdir=r",
        [[*SSH, "--worker=0", f"{START} evaluate {PYTHON}.evaluate --follow --tpu=local --workdir=r"]],
    ),
    ("tensorboard --logdir=gs://b/r", [["tensorboard", "--logdir=gs://b/r", "--port=6006"]]),
    (
        "tensorboard --logdir=runs --port=1",
        [
            [
                *SSH,
                "--worker=0",
                "--ssh-flag=-t -L 1:localhost:1",
                "--command=cd diffusion_tf && env TPU_LOAD_LIBRARY=0 .venv/bin/tensorboard --logdir=runs --port=1",
            ]
        ],
    ),
    (
        "prepare_lsun -- --source=s --out=o",
        [
            [
                *SSH,
                "--worker=0",
                f"{START} prepare_lsun env TPU_LOAD_LIBRARY=0 {PYTHON}.prepare_lsun --source=s --out=o",
            ]
        ],
    ),
    (
        f"prepare_lsun --download={ZIP} -- --out=o",
        [
            [
                *SSH,
                "--worker=0",
                f"{START} prepare_lsun sh -c 'wget --continue {ZIP}"
                " && .venv/bin/python -m zipfile -e church_outdoor_train_lmdb.zip ."
                f" && exec env TPU_LOAD_LIBRARY=0 {PYTHON}.prepare_lsun --source=church_outdoor_train_lmdb --out=o'",
            ]
        ],
    ),
    ("delete", [[*SSH[:4], "delete", "tpu", "--quiet"]]),
    ("delete --queued", [[*SSH[:3], "queued-resources", "delete", "tpu", "--force", "--quiet"]]),
]


def write_program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class Machine:
    """The user's machine: gcloud, git and tensorboard record their arguments; gcloud exits with GCLOUD_EXIT."""

    def __init__(self, folder):
        self.record, self.bin = folder / "calls", folder / "bin"
        unset = ("TPU_NAME", "ZONE", "PROJECT", "TPU_LOAD_LIBRARY")  # importing diffusion_tf sets the last
        self.env = {key: value for key, value in os.environ.items() if key not in unset}
        self.env |= {"PATH": f"{self.bin}:{os.environ['PATH']}", "GCLOUD_EXIT": "0"}
        recorder = f"""#!{sys.executable} -S
import json, os, sys
call = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
open({str(self.record)!r}, "a").write(json.dumps(call) + "\\n")
sys.exit(int(os.environ["GCLOUD_EXIT"]) if call[0] == "gcloud" else 0)
"""
        for name in ("gcloud", "git", "tensorboard"):
            write_program(self.bin / name, recorder)

    def run(self, script, *args, **env):
        return self.sh([str(SCRIPTS / f"{script}.sh"), *map(str, args)], **env)

    def sh(self, args, **env):
        return subprocess.run(
            ["sh", *args],
            env={**self.env, **env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    def calls(self):
        """The calls since the last time."""
        if not self.record.exists():
            return []
        calls = [json.loads(line) for line in self.record.read_text().splitlines()]
        self.record.unlink()
        return calls


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def only_line(result):
    """The one line on stderr of a script that failed."""
    (line,) = result.stderr.splitlines()
    assert result.returncode != 0
    return line


@pytest.mark.parametrize(("line", "calls"), CALLS, ids=[line for line, _ in CALLS])
def test_gcloud_is_called_as_the_dry_run_prints(machine, line, calls):
    script, *args = line.split()
    args = [script, "--name=tpu", *args]
    result = machine.run(*args)
    assert result.returncode == 0, result.stderr
    assert machine.calls() == calls
    dry = machine.run(args[0], "--dry_run", *args[1:])
    assert dry.returncode == 0, dry.stderr
    assert machine.calls() == []
    assert machine.sh(["-c", dry.stdout]).returncode == 0
    assert machine.calls() == calls


@pytest.mark.parametrize("line", [line for line, calls in CALLS if calls[-1][0] == "gcloud"])
def test_a_script_fails_as_gcloud_does(machine, line):
    script, *args = line.split()
    result = machine.run(script, "--name=tpu", *args, GCLOUD_EXIT="7")
    assert (result.returncode, result.stdout) == (7, "")
    # The script stops at the first call that fails.
    assert [call[0] for call in machine.calls()].count("gcloud") == 1


def test_odd_names_and_arguments_survive_the_dry_run(machine):
    for args in (["--name=my tpu", "--zone=it's", "--", *ODD], ["--name=tpu", "--project=$p", "--", "--x=" + ODD[2]]):
        assert machine.run("train", *args).returncode == 0
        calls = machine.calls()
        dry = machine.run("train", "--dry_run", *args)
        assert machine.sh(["-c", dry.stdout]).returncode == 0
        assert machine.calls() == calls
        assert calls[0][5] == args[0].removeprefix("--name=")


def test_environment_variables_replace_flags(machine):
    machine.run("create", TPU_NAME="tpu", ZONE="z", PROJECT="p")
    assert machine.calls() == [[*CALLS[0][1][0], "--zone=z", "--project=p"]]
    machine.run("create", "--name=tpu", "--zone=z", TPU_NAME="other", ZONE="other")
    assert machine.calls() == [[*CALLS[0][1][0], "--zone=z"]]
    assert "--name is required" in only_line(machine.run("delete", TPU_NAME="tpu"))
    assert machine.calls() == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("create", "create: --name is required"),
        ("setup", "setup: --name is required"),
        ("train -- --workdir=r", "train: --name is required"),
        ("evaluate -- --workdir=r", "evaluate: --name is required"),
        ("tensorboard --logdir=runs", "tensorboard: --name is required"),
        ("prepare_lsun -- --out=o", "prepare_lsun: --name is required"),
        ("delete --queued", "delete: --name is required"),
        ("create --name=tpu --sport", "create: unknown argument --sport"),
        ("create --name=tpu --type=v5e-8", "create: --type=v5e-8: gcloud calls it v5litepod-8"),
        ("create --name=tpu --type=h100", "create: --type=h100 is not known here"),
        ("setup --name=tpu --venv=d", "setup: unknown argument --venv=d"),
        ("train --name=tpu --workdir=r", "train: unknown argument --workdir=r"),
        ("train --name=tpu", "train: what to train is missing"),
        ("train --name=tpu --", "train: what to train is missing"),
        ("evaluate --name=tpu --pjrt -- --workdir=r", "evaluate: --pjrt goes with --tpu"),
        ("evaluate --name=tpu", "evaluate: what to score is missing"),
        ("tensorboard --name=tpu", "tensorboard: --logdir is required"),
        ("prepare_lsun --name=tpu", "prepare_lsun: what to prepare is missing"),
        ("delete tpu", "delete: unknown argument tpu"),
        ("install --name=tpu", "install: unknown argument --name=tpu"),
        ("install --python=/nowhere", "install: --python=/nowhere is no Python 3.11 or 3.12"),
    ],
)
def test_bad_input_gets_one_line(machine, line, message):
    result = machine.run(*line.split())
    assert only_line(result).startswith(message) and result.stdout == ""
    assert machine.calls() == []


def test_a_missing_gcloud_gets_one_line_and_a_dry_run_does_without(machine):
    for tool in ("sh", "sed", "basename", "dirname"):
        (machine.bin / tool).symlink_to(shutil.which(tool))
    (machine.bin / "gcloud").unlink()
    (machine.bin / "tensorboard").unlink()
    path = str(machine.bin)
    assert only_line(machine.run("create", "--name=tpu", PATH=path)).startswith("create: gcloud is missing")
    missing = machine.run("tensorboard", "--logdir=gs://b/r", PATH=path)
    assert only_line(missing).startswith("tensorboard: tensorboard is missing")
    assert machine.run("create", "--name=tpu", "--dry_run", PATH=path).stdout == " ".join(CALLS[0][1][0]) + "\n"


@pytest.mark.parametrize("script", sorted({path.stem for path in SCRIPTS.glob("*.sh")} - {"common", "background"}))
def test_help_is_the_comment_at_the_top(machine, script):
    result = machine.run(script, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert f"sh tpu_scripts/{script}.sh" in result.stdout and "shellcheck" not in result.stdout
    for flag in ["--zone", "--project", "--dry_run"] if script != "install" else ["--venv", "--python"]:
        assert flag in result.stdout


def test_setup_copies_the_last_commit(machine, tmp_path):
    checkout = tmp_path / "check out"
    shutil.copytree(SCRIPTS, checkout / "tpu_scripts")
    (machine.bin / "git").unlink()
    identity = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
    for args in (["init", "--quiet"], ["add", "."], [*identity, "commit", "--quiet", "--message=m"]):
        subprocess.run(["git", *args], cwd=checkout, check=True, env=machine.env)
    (checkout / "not_committed").touch()
    write_program(
        machine.bin / "gcloud", f'#!/bin/sh\n[ "$4" = ssh ] || tar -tzf "$5" >>{str(tmp_path / "copied")!r}\n'
    )
    result = machine.sh([str(checkout / "tpu_scripts/setup.sh"), "--name=tpu"], TMPDIR=str(tmp_path))
    assert result.returncode == 0, result.stderr
    copied = {name for name in (tmp_path / "copied").read_text().splitlines() if not name.endswith("/")}
    assert copied == {f"tpu_scripts/{path.name}" for path in SCRIPTS.iterdir()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "check out", "copied"]


@pytest.fixture
def vm(machine, tmp_path):
    """A folder as the VM's home, where gcloud runs its --command; its Python prints its arguments."""
    home = tmp_path / "vm"
    shutil.copytree(SCRIPTS, home / "diffusion_tf/tpu_scripts")
    write_program(machine.bin / "gcloud", f'#!/bin/sh\ncd {home} && sh -c "${{7#--command=}}"\n')
    write_program(
        home / "diffusion_tf/.venv/bin/python",
        f"""#!{sys.executable} -S
import json, os, sys
print(json.dumps([os.getcwd(), os.environ.get("TPU_LOAD_LIBRARY"), *sys.argv[1:]]), flush=True)
""",
    )
    return home / "diffusion_tf"


def read_log(path, count):
    """The first `count` JSON lines of a log that a background process writes."""
    for _ in range(1000):
        lines = path.read_text().splitlines() if path.exists() else []
        if len(lines) >= count:
            break
        time.sleep(0.01)
    return [json.loads(line) for line in lines]


def test_arguments_reach_the_programs_on_the_vm(machine, vm):
    result = machine.run("train", "--name=tpu", "--", *ODD)
    assert result.returncode == 0, result.stderr
    assert read_log(vm / "train.log", 1) == [[str(vm), None, "-m", "experiments.train", "--tpu=local", *ODD]]
    assert "tail -F diffusion_tf/train.log" in result.stdout
    machine.run("evaluate", "--name=tpu", "--", *ODD)
    program = ["-m", "experiments.evaluate", "--follow", "--strategy=mirrored"]
    assert read_log(vm / "evaluate.log", 1) == [[str(vm), "0", *program, *ODD]]
    write_program(machine.bin / "wget", '#!/bin/sh\n[ "$2" = "http://host/it\'s.zip" ]\n')
    machine.run("prepare_lsun", "--name=tpu", "--download=http://host/it's.zip", "--", *ODD)
    assert read_log(vm / "prepare_lsun.log", 2) == [
        [str(vm), None, "-m", "zipfile", "-e", "it's.zip", "."],
        [str(vm), "0", "-m", "experiments.prepare_lsun", "--source=it's", *ODD],
    ]


def test_a_job_outlives_the_connection_and_is_started_once(machine, vm):
    write_program(vm / ".venv/bin/python", '#!/bin/sh\necho "[]"\nexec sleep 60\n')
    train = ["train", "--name=tpu", "--", "--workdir=r"]
    assert machine.run(*train).returncode == 0
    read_log(vm / "train.log", 1)
    pid = int((vm / "train.pid").read_text())
    try:
        os.kill(pid, 0)
        assert only_line(machine.run(*train)) == f"background: train is still running, as process {pid}"
    finally:
        os.kill(pid, 9)
    ended = subprocess.Popen(["true"])
    ended.wait()
    (vm / "train.pid").write_text(f"{ended.pid}\n")
    again = machine.run(*train)
    lines = read_log(vm / "train.log", 2)
    os.kill(int((vm / "train.pid").read_text()), 9)
    assert again.returncode == 0 and lines == [[], []]


@pytest.fixture
def fake_venv(tmp_path):
    """An environment whose pip prints its arguments, beside a folder with fake packages."""
    write_program(
        tmp_path / "venv/bin/python",
        f"""#!/bin/sh
[ "$2" != pip ] || {{ echo "$@"; exit; }}
cd {tmp_path}/site && PYTHONPATH={tmp_path}/site exec {sys.executable} -S "$@"
""",
    )
    for file, text in {
        "tensorflow/__init__.py": "__version__ = '2.20.0'",
        "libtpu/__init__.py": "get_library_path = lambda: '/site/libtpu.so'",
        "diffusion_tf/evaluation/tfgan_eval.py": "classifier_metrics = int",
        "tensorflow_tpu-2.20.0.dist-info/METADATA": "Name: tensorflow_tpu\nVersion: 2.20.0",
        "tensorflow_tpu-2.20.0.dist-info/top_level.txt": "tensorflow",
        "libtpu-0.0.21.dist-info/METADATA": "Name: libtpu\nVersion: 0.0.21",
    }.items():
        path = tmp_path / "site" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "venv"


def test_install_keeps_tensorflow_away_from_tensorflow_tpu(machine, fake_venv, tmp_path):
    result = machine.run("install", f"--venv={fake_venv}")
    assert result.returncode == 0, result.stderr
    *pips, summary = result.stdout.splitlines()
    pip = "-m pip install --quiet --disable-pip-version-check"
    scores = "tensorflow-gan==2.1.0 tensorflow-hub==0.16.1 tensorflow-probability==0.25.0 tf-keras==2.20.1"
    assert pips == [f"{pip} {ROOT}[tpu]", f"{pip} --no-deps {scores}", f"{pip} cloudpickle decorator dm-tree lmdb"]
    assert set(scores.split()) <= set((ROOT / "requirements.lock").read_text().split())
    wanted = "install: import tensorflow gives 2.20.0, of tensorflow-tpu 2.20.0 with libtpu 0.0.21, and no other"
    assert summary.startswith(wanted)
    assert os.readlink(fake_venv / "libtpu.so") == "/site/libtpu.so"
    shutil.copytree(tmp_path / "site/tensorflow_tpu-2.20.0.dist-info", tmp_path / "site/tensorflow-2.20.0.dist-info")
    (tmp_path / "site/tensorflow-2.20.0.dist-info/METADATA").write_text("Name: tensorflow\nVersion: 2.20.0")
    both = machine.run("install", f"--venv={fake_venv}")
    assert only_line(both).startswith("install: tensorflow is from tensorflow and tensorflow-tpu, which overwrite")


def test_install_uses_a_suitable_python_or_downloads_one_with_uv(machine, fake_venv, tmp_path):
    # Each Python suits only if FITS names it, and links the fake environment for `-m venv DIR` and `-m uv venv DIR`.
    for name in ("python3.11", "python3.12", "python3"):
        program = f"""#!/bin/sh
[ "$1" != -c ] || [ "$FITS" = {name} ] || exit 1
[ "$1" != -c ] || exit 0
echo {name} "$@"
for last; do :; done
case "$*" in *venv*) ln -s {fake_venv} "$last" ;; esac
"""
        write_program(machine.bin / name, program)
    for fits, made in (
        ("python3.12", ["python3.12 -m venv {}"]),
        ("python3", ["python3 -m venv {}"]),
        ("", ["python3 -m pip install --quiet --user uv", "python3 -m uv venv --quiet --python=3.11 --seed {}"]),
    ):
        new = tmp_path / f"new{fits}"
        result = machine.run("install", f"--venv={new}", FITS=fits)
        assert result.returncode == 0, result.stderr
        assert [line for line in result.stdout.splitlines() if line.startswith("python3")] == [
            line.format(new) for line in made
        ]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    result = subprocess.run(
        ["shellcheck", "-x", *map(str, sorted(SCRIPTS.glob("*.sh")))], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout
