"""Runs a program: checks its flags before TensorFlow is imported, and prints an error as one line.

A program defines its flags, calls `parse_flags`, imports what imports TensorFlow, and calls `run` at its end.
"""

import contextlib
import ctypes
import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence

from absl import app, flags, logging

from diffusion_tf.errors import ConfigError, InputError, PreemptedError, StoppedError
from diffusion_tf.runtime.slices import names_servers, slice_workers
from diffusion_tf.storage.gfile import store_reason

from . import _process
from ._flags import flag_names

FLAGS = flags.FLAGS

_arguments: list[str] = []  # those that are not flags


def parse_flags(
    module: str, check: Callable[..., object], commands: Sequence[str] = (), argument: str | None = None
) -> None:
    """Parses the flags, prints --help, and ends the program with one line if a flag is wrong.

    Args:
      module: `__name__` of the program; nothing happens unless it is the main module.
      check: raises InputError for mistakes in flags that can be seen without TensorFlow; called as `main` is.
      commands: if given, the first argument must be one of them, and is passed to `check` and `main`.
      argument: if given, what the first argument is, which is passed on too.
    """
    if module != "__main__":
        return
    program = sys.modules["__main__"]
    program.__doc__ = command_lines(program.__doc__ or "")  # what --help prints
    app.define_help_flags()
    try:
        rest = FLAGS(sys.argv)[1:]
    except flags.Error as error:
        sys.exit(f"{_process.program_name()}: {' '.join(str(error).split())}")
    except SystemExit:
        sys.exit(0)  # absl exits with 1 after --help, and nothing else exits here
    with _one_line_errors():
        _arguments[:] = _check_arguments(rest, commands, argument)
        check(*_arguments)
    if "tpu" in FLAGS and names_servers(FLAGS.tpu):
        os.environ["TPU_LOAD_LIBRARY"] = "0"  # TensorFlow's import must not claim the chips that serve_tpu has


def run(main: Callable[..., None]) -> None:
    """Runs a program after `parse_flags`. An error that the user can mend is one line, and sets the exit code."""
    # All modules are imported. Their objects stay, so that garbage collection need not look at them.
    gc.freeze()
    gc.enable()
    _process.clean_up_at_ctrl_c()
    _quiet_cpp_logging()

    def guarded_main(_: list[str]) -> None:
        if not FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # TFDS logs every dataset that it opens
            if tf := sys.modules.get("tensorflow"):
                tf.get_logger().setLevel("ERROR")  # its warnings are advice for programmers
        with _one_line_errors():
            main(*_arguments)

    app.run(guarded_main, flags_parser=lambda argv: argv)


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Ends the program with one line and the error's exit code, where the user can mend the error."""
    try:
        yield
    except (InputError, PreemptedError) as error:
        print(f"{_process.program_name()}: {_error_line(error)}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print(f"\n{_process.program_name()}: interrupted", file=sys.stderr)
        sys.exit(StoppedError.exit_code)
    except UnicodeEncodeError as error:  # TensorFlow takes no other paths
        sys.exit(f"{_process.program_name()}: the path {error.object!r} is not UTF-8: rename it")
    except Exception as error:
        if reason := store_reason(error):
            sys.exit(f"{_process.program_name()}: {reason}")
        if lost := _lost_server(error):
            print(f"{_process.program_name()}: {_error_line(lost)}", file=sys.stderr)
            sys.exit(lost.exit_code)
        if not _is_out_of_memory(error):
            raise
        sys.exit(f"{_process.program_name()}: out of memory: a smaller --batch_size, or more replicas, may fit")


def _lost_server(error: Exception) -> PreemptedError | None:
    """The error that says that a worker of the TPU slice that --tpu names is gone, if `error` means that."""
    tf = sys.modules.get("tensorflow")
    if tf is None or not isinstance(error, tf.errors.OpError) or "tpu" not in FLAGS:
        return None
    from diffusion_tf.runtime.workers import lost_server  # imports TensorFlow

    with contextlib.suppress(InputError):  # the metadata server may fail too
        return lost_server(slice_workers(FLAGS.tpu), error)
    return None


def _is_out_of_memory(error: Exception) -> bool:
    tf = sys.modules.get("tensorflow")
    return isinstance(error, MemoryError) or (tf is not None and isinstance(error, tf.errors.ResourceExhaustedError))


def _quiet_cpp_logging() -> None:
    """Applies TF_CPP_MIN_LOG_LEVEL to all of TensorFlow's C++ code: parts of it log to Abseil, and do not read it.

    Nothing in Python sets the level of Abseil, so this calls a function of TensorFlow 2.20; elsewhere it does nothing.
    """
    if not (tf := sys.modules.get("tensorflow")):
        return
    path = os.path.join(os.path.dirname(tf.__file__ or ""), "libtensorflow_cc.so.2")
    with contextlib.suppress(OSError, AttributeError, ValueError):
        set_level = ctypes.CDLL(path)._ZN4absl12lts_2025012714SetMinLogLevelENS0_18LogSeverityAtLeastE
        set_level(int(os.environ["TF_CPP_MIN_LOG_LEVEL"]))


def command_lines(text: str) -> str:
    """Replaces `python -m experiments.NAME`, which works in a checkout, by `diffusion-tf NAME` in an installation."""
    return text if __package__ == "experiments" else text.replace("python -m experiments.", "diffusion-tf ")


def _check_arguments(arguments: list[str], commands: Sequence[str], argument: str | None) -> list[str]:
    """The first argument, if there must be one; raises InputError for anything else that is not a flag."""
    if commands and (not arguments or arguments[0] not in commands):
        raise InputError(f"the first argument must be one of: {', '.join(commands)}")
    if argument and not arguments:
        raise InputError(f"the first argument must be {argument}")
    expected = 1 if commands or argument else 0
    if len(arguments) > expected:
        raise InputError(f"unknown argument {arguments[expected]}: flags start with --")
    return arguments


def _error_line(error: Exception) -> str:
    """The message of a library error with its settings as flags."""
    prefix = "--" if isinstance(error, ConfigError) and error.field in FLAGS else ""
    return prefix + flag_names(str(error))
