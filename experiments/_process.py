"""The process that a program runs in: its encoding, what it prints, and the signals that end it."""

import io
import os
import select
import signal
import sys
import threading
from types import FrameType
from typing import Any, NoReturn

_GRACE_SECONDS = 5.0  # to clean up after Ctrl-C
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def prepare() -> None:
    """Prepares this process for a program: call it before the imports that take seconds.

    Names of files are UTF-8 whatever the locale. Output that nobody reads (a closed pipe, terminal or descriptor) does
    not end the program. Ctrl-C ends it at once with one line.
    """
    if sys.getfilesystemencoding() != "utf-8":
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file that opens would get this number, and what is printed
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout, sys.stderr = _open_output(1), _open_output(2)
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # and not ignored, as in a background job
        signal.signal(signal.SIGINT, _end_at_once)


def clean_up_at_ctrl_c() -> None:
    """From now on, Ctrl-C raises KeyboardInterrupt, and the process ends within five seconds, or at the next Ctrl-C.

    A thread sees to that: Python handles no signal while TensorFlow computes or waits, and an exception that is raised
    in a callback is lost.
    """
    if signal.getsignal(signal.SIGINT) == _end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader,), daemon=True).start()


def _watch(reader: int) -> None:
    """Reads the numbers of arriving signals; ends the process at the second, or when cleaning up takes too long."""
    signum = _next_signal(reader, None)
    # Training handles signals itself: it saves, which may take minutes.
    saves = signal.getsignal(signum) not in (signal.default_int_handler, signal.SIG_DFL)
    if saves:
        print(f"\n{signal.Signals(signum).name}: saving; a second signal ends the program at once", file=sys.stderr)
    again = _next_signal(reader, None if saves else _GRACE_SECONDS)
    _end_at_once(again or signum, None)


def _next_signal(reader: int, timeout: float | None) -> int:
    """The number of the next signal that ends programs; 0 after `timeout` seconds."""
    while select.select([reader], [], [], timeout)[0]:
        signum = os.read(reader, 1)[0]
        if signum in _SIGNALS:
            return signum
    return 0


def _end_at_once(signum: int, _: FrameType | None) -> NoReturn:
    print(f"\n{program_name()}: interrupted", file=sys.stderr)
    sys.stdout.flush()
    os._exit(128 + signum)


def program_name() -> str:
    """The program's name, to begin error lines with."""
    name = os.path.splitext(os.path.basename(sys.argv[0]))[0]
    return "diffusion-tf" if name in ("-m", "__main__") else name


class _Descriptor(io.FileIO):
    """A descriptor to print to; what cannot be written is dropped, since a program's work matters more."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return len(data)


def _open_output(descriptor: int) -> io.TextIOWrapper:
    raw = _Descriptor(descriptor, "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding="utf-8",
        errors="backslashreplace",
        line_buffering=raw.isatty() or descriptor == 2,
    )
