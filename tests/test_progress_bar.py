"""Progress bars in log files and in terminals."""

import io

from diffusion_tf import progress_bar as module
from diffusion_tf.progress_bar import progress_bar


class Stream(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


def shown(monkeypatch, terminal, seconds=0.0):
    """What two bars, one within the other, print when a line is due every `seconds`."""
    stream = Stream(terminal)
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(module, "_LOG_SECONDS", seconds)
    for _ in progress_bar(range(3), desc="images", unit="image"):
        with progress_bar(total=4, desc="steps", unit="step", nested=True) as bar:
            bar.update(4)
    return stream.getvalue()


def test_a_log_file_gets_whole_lines_of_the_outer_bar(monkeypatch):
    text = shown(monkeypatch, terminal=False)
    assert text.endswith("\n") and "\r" not in text and "steps" not in text and "\n\n" not in text
    assert [line.split("|")[-1].split()[0] for line in text.splitlines()][-2:] == ["2/3", "3/3"]


def test_a_short_task_is_one_line_in_a_log_file(monkeypatch):
    lines = shown(monkeypatch, terminal=False, seconds=30.0).splitlines()
    assert len(lines) == 1 and lines[0].startswith("images: 100%")


def test_a_terminal_gets_one_bar_that_is_redrawn(monkeypatch):
    text = shown(monkeypatch, terminal=True)
    assert text.count("\n") == 1 and text.count("\r") > 1


def test_a_closed_bar_of_a_log_file_takes_no_line_of_a_terminal(monkeypatch):
    monkeypatch.setattr("sys.stderr", Stream(terminal=False))
    closed = progress_bar(total=1)
    closed.close()
    assert shown(monkeypatch, terminal=True).count("\n") == 1
    assert closed.disable  # and so it is still there
