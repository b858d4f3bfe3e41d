"""Runs programs in forks of a process that has imported TensorFlow, which would take each of them seconds."""

import dataclasses
import multiprocessing.process
import os
import pathlib
import resource
import runpy
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parent.parent.parent
_OUTPUTS = ("stdout", "stderr")
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        "experiments._measured_run",
        "experiments._program",
        "sklearn.datasets",
        "sklearn.neighbors",
        "tensorflow_datasets",
    ]
)


@dataclasses.dataclass
class RunningProgram:
    """A program in its own process, which prints into files in `folder`."""

    process: multiprocessing.process.BaseProcess
    folder: tempfile.TemporaryDirectory

    def wait(self) -> subprocess.CompletedProcess:
        """Waits for the end: its exit code, or minus the signal that ended it, and its output."""
        self.process.join()
        with self.folder as folder:
            printed = [(pathlib.Path(folder) / name).read_text() for name in _OUTPUTS]
        return subprocess.CompletedProcess(self.process.name, self.process.exitcode, *printed)


def start_fork(program: str, *args: object, folder: pathlib.Path = ROOT, most_bytes: int = 0) -> RunningProgram:
    """Starts `python -m experiments.PROGRAM ARGS` on the CPU.

    Args:
      program: name of the program.
      *args: its arguments.
      folder: its working directory.
      most_bytes: largest size of a file that it may write; 0 for no limit.
    """
    outputs = tempfile.TemporaryDirectory()
    process = _FORKS.Process(
        name=program, target=_main, args=(program, [*map(str, args)], folder, outputs.name, most_bytes)
    )
    process.start()
    return RunningProgram(process, outputs)


def run_fork(
    program: str, *args: object, folder: pathlib.Path = ROOT, most_bytes: int = 0
) -> subprocess.CompletedProcess:
    """Runs a program to its end; arguments as in `start_fork`."""
    return start_fork(program, *args, folder=folder, most_bytes=most_bytes).wait()


def _main(program: str, args: list[str], folder: pathlib.Path, outputs: str, most_bytes: int) -> None:
    for descriptor, name in enumerate(_OUTPUTS, start=1):
        os.dup2(os.open(os.path.join(outputs, name), os.O_CREAT | os.O_WRONLY), descriptor)
    os.chdir(folder)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sys.argv[1:] = args
    if most_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    runpy.run_module(f"experiments.{program}", run_name="__main__", alter_sys=True)
