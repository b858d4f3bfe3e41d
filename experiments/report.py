"""Writes one page about a run: configuration, curves, bits/dim, rate-distortion, scores, samples, the paper's tables.

  python -m experiments.report --workdir=runs/digits

Reads what training and the measurements left in the workdir, and writes report.md and report.png there. What was not
measured says by which command it would be.
"""

import os

from absl import flags

from diffusion_tf.reports.run_page import to_markdown, to_png
from diffusion_tf.reports.run_record import read_run
from diffusion_tf.storage.files import write_file
from diffusion_tf.storage.workdir import Workdir
from experiments import common

FLAGS = flags.FLAGS
common.define_workdir_flag()
flags.DEFINE_string("out", None, "The Markdown file to write; the PNG lies beside it. Default: in the workdir.")


def main() -> None:
    common.require_flags("workdir")
    workdir = Workdir(FLAGS.workdir)
    record = read_run(workdir)
    out = common.out_path(os.path.join(workdir.path, "report.md"), ".md")
    picture = f"{os.path.splitext(out)[0]}.png"
    write_file(picture, to_png(record))
    write_file(out, to_markdown(record, os.path.basename(picture)).encode())
    print(f"report: {out} {picture}")


if __name__ == "__main__":
    common.run(main)
