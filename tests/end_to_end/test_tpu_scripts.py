"""The scripts for Cloud TPU VMs: their arguments, with a gcloud that records its calls, and the installation."""

import os
import shutil
import subprocess
import sys

import pytest
from support.gcloud import NOT_FOR_USERS, SCRIPTS, Machine, write_program

ROOT = SCRIPTS.parent
CREATE = ["gcloud", "compute", "tpus", "tpu-vm", "create", "tpu"]
QUEUE = ["gcloud", "compute", "tpus", "queued-resources", "create", "tpu", "--node-id=tpu"]
SSH = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "tpu"]
START = "--command=sh diffusion_tf/tpu_scripts/background.sh"
START_ON_CHIPS = "--command=sh diffusion_tf/tpu_scripts/on_chips.sh"
PYTHON = ".venv/bin/python -m experiments"
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
    ("create --type=v3-32 --version=new", [[*CREATE, "--accelerator-type=v3-32", "--version=new"]]),
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
                "--worker=all",
                f"{START_ON_CHIPS} train train --workdir=gs://b/r --dry_run",
                "--project=p",
            ]
        ],
    ),
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
        [[*SSH, "--worker=all", f"{START_ON_CHIPS} evaluate evaluate --follow --workdir=r"]],
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
    (
        "status",
        [
            [
                *SSH[:4],
                "describe",
                "tpu",
                "--format=yaml(state,health,acceleratorType,runtimeVersion,schedulingConfig.spot)",
            ],
            [*SSH, "--worker=all", "--command=sh diffusion_tf/tpu_scripts/jobs.sh"],
        ],
    ),
    (
        "logs --job=train --follow",
        [
            [
                *SSH,
                "--worker=all",
                "--command=cd diffusion_tf && hostname && tail -F -v -n 20 train.log 2>/dev/null || true",
            ]
        ],
    ),
    ("delete", [[*SSH[:4], "delete", "tpu", "--quiet"]]),
    ("delete --queued", [[*SSH[:3], "queued-resources", "delete", "tpu", "--force", "--quiet"]]),
]


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
        ("create --name=tpu --type=v9-8 --version=new", "create: --type=v9-8 is not known here"),
        ("create --name=tpu --type=v3-", "create: --type=v3- is not known here"),
        ("create --name=tpu --type=v3-16", "create: --type=v3-16 is no size of v3: choose v3-8, v3-32"),
        ("create --name=tpu --type=tpu7x-8", "create: --type=tpu7x-8: Compute Engine and GKE create TPU7x"),
        ("setup --name=tpu --venv=d", "setup: unknown argument --venv=d"),
        ("train --name=tpu --workdir=r", "train: unknown argument --workdir=r"),
        ("train --name=tpu", "train: what to train is missing"),
        ("train --name=tpu --", "train: what to train is missing"),
        ("train --name=tpu --runner=torch -- --x", "train: --runner=torch: choose tensorflow or jax"),
        ("train --name=tpu --keep_alive -- --workdir=r", "train: --keep_alive needs --workdir=gs://BUCKET/RUN"),
        ("train --name=tpu --keep_alive --runner=jax -- e --x", "train: --keep_alive needs a run in gs://"),
        ("train --name=tpu --runner=jax -- nowhere --x", "train: nowhere is no folder that `export"),
        ("setup --name=tpu --runner=torch", "setup: --runner=torch: choose tensorflow or jax"),
        ("status", "status: --name is required"),
        ("logs --name=tpu --lines=a", "logs: --lines=a is no number"),
        ("logs --name=tpu --job=../x", "logs: --job=../x: choose train"),
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


@pytest.mark.parametrize("script", sorted({path.stem for path in SCRIPTS.glob("*.sh")} - NOT_FOR_USERS))
def test_help_is_the_comment_at_the_top(machine, script):
    result = machine.run(script, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert f"sh tpu_scripts/{script}.sh" in result.stdout and "shellcheck" not in result.stdout
    for flag in ["--zone", "--project", "--dry_run"] if script != "install" else ["--venv", "--python"]:
        assert flag in result.stdout


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


def test_install_for_jax_is_without_tensorflow(machine, fake_venv, tmp_path):
    site = tmp_path / "site"
    for file, text in {
        "diffusion_tf/interop/train_loop.py": "",
        "jax-0.10.2.dist-info/METADATA": "Name: jax\nVersion: 0.10.2",
    }.items():
        (site / file).parent.mkdir(parents=True)
        (site / file).write_text(text)
    both = machine.run("install", "--runner=jax", f"--venv={fake_venv}")
    assert only_line(both).startswith("install: the environment holds TensorFlow")
    shutil.rmtree(site / "tensorflow")
    result = machine.run("install", "--runner=jax", f"--venv={fake_venv}")
    assert result.stdout.splitlines() == [
        f"-m pip install --quiet --disable-pip-version-check {ROOT}[jax-tpu]",
        "install: jax 0.10.2 with libtpu 0.0.21 and no TensorFlow",
    ]


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
