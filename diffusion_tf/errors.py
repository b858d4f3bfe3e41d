"""The errors that end a program with one clear line, and the exit code of each."""


class InputError(ValueError):
    """A setting, file or record that the user gave is wrong.

    The message is one line that names the culprit and says what to do. It quotes settings in backticks, as in
    "use `loss_type=kl`"; a program prints those as its flags.
    """

    exit_code = 1


class ConfigError(InputError):
    """A setting has a value that cannot be used.

    Args:
      field: the setting: a field of `Preset`, or an argument such as `batch_size`.
      message: the rest of the sentence that begins with the field: "=13 must be even", ": give one", or "is required".
    """

    def __init__(self, field: str, message: str):
        self.field = field
        super().__init__(field + ("" if message[0] in "=:" else " ") + message)


class DamagedFileError(InputError):
    """A file exists, but does not hold what was written to it."""


class DivergedError(InputError):
    """Training produced values that are not finite, also after it went back to a checkpoint once."""

    exit_code = 3


class PreemptedError(RuntimeError):
    """The machine is about to be taken away. The run is saved; the same command continues it."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h
