"""A user's machine with a gcloud that records its calls, or one that keeps each worker of a slice in a folder."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parent.parent.parent / "tpu_scripts"
# Scripts that others call on the VM, or source.
NOT_FOR_USERS = {"background", "common", "jobs", "keep_alive", "on_chips"}
HOSTS = {"v3-8": 1, "v3-32": 4, "v6e-8": 1, "v6e-16": 2}

# gcloud of a slice: the folder is its sys.argv[1], and its state is in the file `state` there.
_GCLOUD = """
import json, os, pathlib, shutil, signal, subprocess, sys

folder, hosts = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
service, verb, *rest = sys.argv[5:]
flags = dict(word[2:].split("=", 1) if "=" in word else (word[2:], "") for word in rest if word.startswith("--"))
state = folder / "state"
with open(folder / "calls", "a") as calls:
    calls.write(json.dumps(sys.argv[5:]) + "\\n")

def fail(line):
    sys.exit(f"ERROR: (gcloud) {line}")

if (folder / "offline").exists():
    fail("no network")
if verb == "create":
    if (folder / "no_capacity").exists():
        (folder / "no_capacity").unlink()
        fail("There is no more capacity in the zone")
    if state.exists():
        fail("already exists")
    if (folder / "queue").exists():
        sys.exit()
    count = hosts[flags["accelerator-type"]]
    for worker in range(count):
        attributes = folder / f"w{worker}/attributes"
        attributes.mkdir(parents=True)
        ends = ",".join(f"unknown:unknown:10.0.0.{host}" for host in range(count))
        for key, value in {"agent-worker-number": str(worker), "worker-network-endpoints": ends,
                           "accelerator-type": flags["accelerator-type"]}.items():
            (attributes / key).write_text(value)
    (folder / "created").write_text(json.dumps(rest))
    state.write_text("READY")
elif verb == "list":
    if state.exists():
        made = dict(word[2:].split("=", 1) for word in json.loads((folder / "created").read_text()) if "=" in word)
        spot = "--spot" in json.loads((folder / "created").read_text())
        image, queue = made.get("version") or made["runtime-version"], "tpu" if "node-id" in made else ""
        print("tpu", state.read_text(), made["accelerator-type"], image, spot, queue, sep=",")
    print("other,READY,v3-8,image,False,")
elif service == "queued-resources" and verb == "describe":
    print((folder / "queue").read_text() if (folder / "queue").exists() else "ACTIVE")
elif not state.exists():
    fail("NOT_FOUND: the TPU was not found")
elif verb == "delete":
    for worker in folder.glob("w*"):
        shutil.rmtree(worker)
    state.unlink()
elif verb == "describe":
    print("state:", state.read_text())
elif state.read_text() != "READY":
    fail("the TPU is " + state.read_text())
else:
    workers = sorted(folder.glob("w*" if flags["worker"] == "all" else "w" + flags["worker"]))
    code = 0
    for worker in workers:
        if verb == "scp":
            shutil.copy(rest[0], worker)
        else:
            command = ["sh", "-c", flags["command"]]
            code = max(code, subprocess.run(command, cwd=worker, env={**os.environ, "HOME": str(worker)}).returncode)
    sys.exit(code)
"""

# The Python of a VM: prints its arguments as JSON, and while HOME/hold exists waits for an exit code in HOME/exit.
_PYTHON = """
import json, os, pathlib, sys, time

names = ("TPU_LOAD_LIBRARY", "TF_PLUGGABLE_DEVICE_LIBRARY_PATH")
print(json.dumps([os.getcwd(), *map(os.environ.get, names), *sys.argv[1:]]), flush=True)
home = pathlib.Path.home()
while (home.parent / "hold").exists():
    if "experiments.serve_tpu" not in sys.argv and (home / "exit").exists():
        code = int((home / "exit").read_text())
        (home / "exit").unlink()
        sys.exit(code)
    time.sleep(0.05)
"""


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def wait_until(is_true: Callable[[], object]) -> None:
    """Returns when the condition holds; fails after two minutes, for a busy machine."""
    deadline = time.monotonic() + 120
    while not is_true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


class Machine:
    """The user's machine: gcloud, git and tensorboard record their arguments; gcloud exits with GCLOUD_EXIT."""

    def __init__(self, folder: Path) -> None:
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

    def run(self, script: str, *args: object, scripts: Path = SCRIPTS, **env: str) -> subprocess.CompletedProcess[str]:
        return self.sh([str(scripts / f"{script}.sh"), *map(str, args)], **env)

    def sh(self, args: list[str], **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", *args],
            env={**self.env, **env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,  # a job that keeps the connection's files open would hold it for ever
        )

    def calls(self) -> list[list[str]]:
        """The calls since the last time."""
        if not self.record.exists():
            return []
        calls = [json.loads(line) for line in self.record.read_text().splitlines()]
        self.record.unlink()
        return calls


class Slice:
    """A TPU slice called `tpu`, each worker with a home of its own, and a checkout with the scripts."""

    def __init__(self, machine: Machine, folder: Path) -> None:
        self.machine, self.folder, self.checkout = machine, folder / "slice", folder / "checkout"
        self.folder.mkdir()
        self.hold, self.printed = self.folder / "hold", folder / "printed"
        self.watcher: subprocess.Popen[bytes] | None = None
        (machine.bin / "git").unlink()
        python = f"{sys.executable} -S"
        gcloud = self.folder / "gcloud.py"
        gcloud.write_text(_GCLOUD)
        hosts = json.dumps(HOSTS)
        write_program(machine.bin / "gcloud", f"#!/bin/sh\nexec {python} {gcloud} {self.folder} '{hosts}' \"$@\"\n")
        write_program(machine.bin / "sleep", "#!/bin/sh\nexec /bin/sleep 0.1\n")
        write_program(machine.bin / "hostname", '#!/bin/sh\nbasename "$HOME"\n')
        write_program(machine.bin / "curl", '#!/bin/sh\nfor url; do :; done\nexec cat "$HOME/attributes/${url##*/}"\n')
        write_program(self.folder / "python", f"#!{python}\n{_PYTHON}")
        self._commit_scripts()

    def _commit_scripts(self) -> None:
        """Makes a checkout whose install.sh installs nothing but a Python that prints its arguments."""
        shutil.copytree(SCRIPTS, self.checkout / "tpu_scripts")
        write_program(
            self.checkout / "tpu_scripts/install.sh",
            f"""#!/bin/sh
case $* in '') venv=.venv ;; --runner=jax) venv=.venv_jax ;; esac
mkdir -p "$HOME/diffusion_tf/$venv/bin"
cp {self.folder}/python "$HOME/diffusion_tf/$venv/bin/"
""",
        )
        identity = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
        for args in (["init", "--quiet"], ["add", "."], [*identity, "commit", "--quiet", "--message=m"]):
            subprocess.run(["git", *args], cwd=self.checkout, check=True, env=self.machine.env)

    def run(self, script: str, *args: object, **env: str) -> subprocess.CompletedProcess[str]:
        """Runs a script of the checkout for this slice."""
        return self.machine.run(script, "--name=tpu", *args, scripts=self.checkout / "tpu_scripts", **env)

    def start(self, script: str, *args: object) -> None:
        """Starts a script that goes on: `watcher`, which prints to `printed`."""
        command = ["sh", str(self.checkout / f"tpu_scripts/{script}.sh"), "--name=tpu", *map(str, args)]
        with open(self.printed, "w") as file:
            # A session of its own, to end it with what it started.
            self.watcher = subprocess.Popen(
                command, env=self.machine.env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    def stop(self) -> None:
        """Ends the script that goes on, as Ctrl-C would."""
        if self.watcher and self.watcher.poll() is None:
            os.killpg(self.watcher.pid, signal.SIGINT)
            self.watcher.wait(120)

    def log(self, worker: int, job: str) -> list[Any]:
        """What the programs of a job printed; the shell's own lines are left out."""
        path = self.folder / f"w{worker}/diffusion_tf/{job}.log"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.startswith("[") and line.endswith("]")]

    def wait_for(self, worker: int, job: str, count: int = 1) -> list[Any]:
        """What the programs of a job printed, once that is so many lines."""
        wait_until(lambda: len(self.log(worker, job)) >= count)
        return self.log(worker, job)

    def jobs(self) -> list[str]:
        """Worker and name of every job that has been started."""
        return sorted(f"{path.parts[-3]} {path.stem}" for path in self.folder.glob("w*/diffusion_tf/*.pid"))

    def pid(self, worker: int, job: str) -> int:
        return int((self.folder / f"w{worker}/diffusion_tf/{job}.pid").read_text())

    def end(self, worker: int, code: int) -> None:
        """Lets a worker's program end with an exit code."""
        (self.folder / f"w{worker}/exit").write_text(str(code))

    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]

    def preempt(self) -> None:
        (self.folder / "state").write_text("PREEMPTED")
        self.kill()

    def kill(self) -> None:
        """Kills all programs of the slice."""
        for path in self.folder.glob("w*/diffusion_tf/*.pid"):
            if not path.with_suffix(".rc").exists():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(path.read_text()), signal.SIGKILL)
                wait_until(path.with_suffix(".rc").exists)
