"""The errors that end a program with one clear line, and the exit code of each."""


def quoted(value: object) -> str:
    """Returns a value as text for an error message, which is one line: shortened and escaped where it must be."""
    text = str(value)
    return text if len(text) <= 80 and text.isprintable() else f"{text[:80]!r}..."


class InputError(ValueError):
    """A setting, file or record that the user gave is wrong.

    The message is one line that names the culprit and says what to do. It quotes settings in backticks, as in
    "use `loss_type=kl`"; programs print them as flags.
    """

    exit_code = 1


class ConfigError(InputError):
    """A setting has a value that cannot be used.

    Args:
      field: the setting, either a field of `Preset` or an argument such as `batch_size`.
      message: the rest of a sentence that starts with the field: "=13 must be even", ": give one", or "is required".
    """

    def __init__(self, field: str, message: str):
        self.field = field
        self._message = message
        super().__init__(field + ("" if message[0] in "=:" else " ") + message)

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.field, self._message)  # worker processes send their errors to the main one


class DamagedFileError(InputError):
    """A file exists, but its contents are not what was written to it."""


class NotFiniteError(InputError):
    """A network or a score gave NaN or infinity, so that there is no picture and no number to show."""


class DivergedError(InputError):
    """Training produced values that are not finite, and did so again after it went back to a checkpoint."""

    exit_code = 3


class PreemptedError(RuntimeError):
    """The machine is about to be taken away. The run is saved; the same command continues it."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h


class StoppedError(PreemptedError):
    """The user stopped training by Ctrl-C. The run is saved; the same command continues it."""

    exit_code = 130  # 128 + SIGINT, as shells have it
