"""What ends a program with one clear line, and the exit code of each."""


class InputError(ValueError):
    """A flag, file or record that the user gave is wrong.

    The message is one line that names it and says what to do; the programs print it without a traceback.
    """

    exit_code = 1


class DamagedFileError(InputError):
    """A file is there, and does not hold what was written to it."""


class DivergedError(InputError):
    """Training met values that are not finite, also after going back once."""

    exit_code = 3


class PreemptedError(RuntimeError):
    """The machine is wanted back: the run was saved, and the same command goes on with it."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h
