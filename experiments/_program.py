"""Runs a program: parses its flags, and prints an error as one line. Programs import this module last."""

import gc
import os
import sys
from collections.abc import Callable, Sequence

import tensorflow as tf
from absl import app, flags, logging

from diffusion_tf.errors import ConfigError, InputError, PreemptedError

from ._flags import flag_names

FLAGS = flags.FLAGS

# All modules are imported. Their objects stay, so that garbage collection need not look at them.
gc.freeze()
gc.enable()


def run(main: Callable[..., None], commands: Sequence[str] = ()) -> None:
    """Runs a program. An error that the user can mend is printed as one line, and sets the exit code.

    Args:
      main: the program, called after the flags are parsed.
      commands: if given, the first argument must be one of them, and is passed to `main`.
    """
    program = sys.modules["__main__"]
    program.__doc__ = command_lines(program.__doc__ or "")  # what --help prints

    def guarded_main(argv: list[str]) -> None:
        if FLAGS["verbosity"].using_default_value:
            logging.set_verbosity(logging.WARNING)  # TFDS logs every dataset that it opens
        try:
            main(*_check_arguments(argv[1:], commands))
        except (InputError, PreemptedError) as error:
            print(f"{_name()}: {_error_line(error)}", file=sys.stderr)
            sys.exit(error.exit_code)
        except tf.errors.ResourceExhaustedError:
            sys.exit(f"{_name()}: out of memory: a smaller --batch_size, or more replicas, may fit")
        except KeyboardInterrupt:
            sys.exit(f"{_name()}: interrupted")

    app.run(guarded_main, flags_parser=_parse_flags)


def command_lines(text: str) -> str:
    """Replaces `python -m experiments.NAME`, which works in a checkout, by `diffusion-tf NAME` in an installation."""
    return text if __package__ == "experiments" else text.replace("python -m experiments.", "diffusion-tf ")


def _check_arguments(arguments: list[str], commands: Sequence[str]) -> list[str]:
    """The command, if there are commands; raises InputError for anything else that is not a flag."""
    if commands and (not arguments or arguments[0] not in commands):
        raise InputError(f"the first argument must be one of: {', '.join(commands)}")
    expected = 1 if commands else 0
    if len(arguments) > expected:
        raise InputError(f"unknown argument {arguments[expected]}: flags start with --")
    return arguments


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        return FLAGS(argv)
    except flags.Error as error:
        sys.exit(f"{_name()}: {' '.join(str(error).split())}")
    except SystemExit:
        sys.exit(0)  # absl exits with 1 after --help, and nothing else exits here


def _error_line(error: Exception) -> str:
    """The message of a library error with its settings as flags."""
    prefix = "--" if isinstance(error, ConfigError) and error.field in FLAGS else ""
    return prefix + flag_names(str(error))


def _name() -> str:
    return os.path.splitext(os.path.basename(sys.argv[0]))[0]
