"""Progress bars: redrawn in a terminal, a line now and then in a log file."""

import sys
from collections.abc import Iterable
from typing import Any

import tqdm

_LOG_SECONDS = 30.0  # between two lines in a log file
_NESTED_DELAY = 10.0  # before a bar within another one appears


def progress_bar(iterable: Iterable | None = None, *, nested: bool = False, **settings: Any) -> tqdm.tqdm:
    """Returns a `tqdm.tqdm` that suits where standard error goes.

    Args:
      iterable: what to iterate over; default: the caller calls `update`.
      nested: whether it is within another bar. It is shown only in a terminal, after ten seconds, and until it ends.
      **settings: of tqdm, as `total`, `unit` and `desc`.
    """
    if "ipykernel" in sys.modules or (sys.stderr is not None and sys.stderr.isatty()):
        return tqdm.tqdm(iterable, leave=not nested, delay=_NESTED_DELAY if nested else 0, **settings)
    pace = {"mininterval": _LOG_SECONDS, "maxinterval": _LOG_SECONDS, "delay": _LOG_SECONDS}
    return _Lines(iterable, disable=nested, **pace, **settings)


class _Lines(tqdm.tqdm):
    """Prints a whole line at a time, the last one when it closes."""

    disable: bool

    def display(self, msg: str | None = None, pos: int | None = None) -> None:  # noqa: ARG002 (tqdm's signature)
        self.fp.write(f"{msg or self}\n")

    def clear(self, nolock: bool = False) -> None:
        """Does nothing: a line in a file stays."""

    def close(self) -> None:
        if self.disable:
            return
        if self.n != self.last_print_n or self.n == self.initial:
            self.display()
        self._decr_instances(self)  # or later bars in a terminal leave a line free for it
        self.disable = True


def print_line(text: str) -> None:
    """Prints a line to standard error, where progress goes too."""
    print(text, file=sys.stderr, flush=True)
