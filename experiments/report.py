"""Writes one page about a run: key numbers, samples, curves, all measurements, and the paper's tables.

  python -m experiments.report --workdir=runs/digits

The program reads the results of training and of measurements in the workdir, and writes report.md and report.png there.
For each missing measurement the report names the command.
"""

import os

from absl import flags

from . import _flags, _program

FLAGS = flags.FLAGS
_flags.define_workdir_flag()
_flags.define_path("out", None, "Markdown file to write, with a PNG beside it. Default: in the workdir.")


def _check() -> None:
    _flags.require_flags("workdir")


_program.parse_flags(__name__, _check)

from diffusion_tf.reports.run_page import to_markdown
from diffusion_tf.reports.run_picture import to_png
from diffusion_tf.reports.run_record import read_run
from diffusion_tf.storage.files import write_file
from diffusion_tf.storage.workdir import Workdir


def main() -> None:
    workdir = Workdir(FLAGS.workdir)
    record = read_run(workdir)
    out = _flags.out_path(os.path.join(workdir.path, "report.md"), ".md")
    picture = f"{os.path.splitext(out)[0]}.png"
    write_file(picture, to_png(record))
    markdown = _program.command_lines(to_markdown(record, os.path.basename(picture)))
    write_file(out, markdown.encode())
    print(f"report: {out} {picture}")


if __name__ == "__main__":
    _program.run(main)
