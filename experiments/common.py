"""What the programs share: flags, and errors told in one line."""

import dataclasses
import os
import sys
from collections.abc import Callable

from absl import app, flags

from diffusion_tf.distribution import STRATEGIES
from diffusion_tf.errors import InputError
from diffusion_tf.presets import CHOICES, PRESETS, Preset, get_preset

FLAGS = flags.FLAGS
# Flags defined by these functions belong to the program that calls them, so that its --help shows them.
flags.disclaim_key_flags()


def define_workdir_flag() -> None:
    """--workdir."""
    flags.DEFINE_string("workdir", None, "The run's folder (may be gs://).")


def define_strategy_flags() -> None:
    """--strategy and --tpu."""
    flags.DEFINE_enum(
        "strategy",
        "auto",
        STRATEGIES,
        "Where to run. auto: a TPU if --tpu is given or one is attached, all GPUs if several, else one device."
        " multi_worker reads TF_CONFIG.",
    )
    flags.DEFINE_string("tpu", None, "`local` on a TPU VM, or the TPU's name.")


def define_preset_flags() -> None:
    """--dataset, and a flag for every other field of `Preset` that defaults to the preset's value."""
    flags.DEFINE_string("dataset", "digits", f"The preset: {', '.join(PRESETS)}.")
    for field in dataclasses.fields(Preset):
        doc = f"{field.metadata['help']} Default: the preset's value."
        if field.name == "dataset":
            continue
        if field.name in CHOICES:
            flags.DEFINE_enum(field.name, None, CHOICES[field.name], doc)
        elif field.type is bool:
            flags.DEFINE_boolean(field.name, None, doc)
        elif field.type is int:
            flags.DEFINE_integer(field.name, None, doc)
        elif field.type is float:
            flags.DEFINE_float(field.name, None, doc)
        else:
            flags.DEFINE_list(field.name, None, f"{doc} Whole numbers with commas between them.")


def preset_from_flags() -> Preset:
    """The preset that --dataset names, with the values of the flags that were given.

    Raises:
      InputError: an unknown preset, or a value out of range.
    """
    overrides = {}
    for field in dataclasses.fields(Preset):
        value = FLAGS[field.name].value
        if field.name == "dataset" or value is None:
            continue
        if isinstance(value, list):
            try:
                value = tuple(int(item) for item in value)
            except ValueError as error:
                raise InputError(f"--{field.name}={','.join(value)}: whole numbers with commas between them") from error
        overrides[field.name] = value
    return get_preset(FLAGS.dataset, **overrides)


def require_flags(*names: str) -> None:
    """Raises InputError naming the first of these flags that was not given."""
    for name in names:
        if FLAGS[name].value is None:
            raise InputError(f"--{name} is required")


def run(main: Callable[[], None]) -> None:
    """Runs a program: parses flags, calls `main()`, and tells an `InputError` in one line on stderr (exit code 1)."""

    def guarded_main(argv):
        try:
            if argv[1:]:
                raise InputError(f"unknown argument {argv[1]}: flags start with --")
            main()
        except InputError as error:
            sys.exit(f"{_program()}: {error}")
        except KeyboardInterrupt:
            sys.exit(f"{_program()}: interrupted")

    app.run(guarded_main, flags_parser=_parse_flags)


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        return FLAGS(argv)
    except flags.Error as error:
        sys.exit(f"{_program()}: {' '.join(str(error).split())}")
    except SystemExit:
        sys.exit(0)  # absl's --help exits with 1, and nothing else exits here; asking for help is no error


def _program() -> str:
    return os.path.splitext(os.path.basename(sys.argv[0]))[0]
