"""Measures the rate-distortion curve of a trained run (Section 4.3): Table 4 and Figure 5 of the paper.

  python -m experiments.rate_distortion --workdir=runs/digits --split=test

A decoder that holds x_t has received L_T and the terms that led to x_t (rate), and shows its prediction of x_0
(distortion: root mean squared error on [0, 255]). The program reads what `likelihood` measured with the same flags, and
measures the rest. It writes rate_distortion_SPLIT.json (the table, and the curve over every t), .csv (the curve) and
.png into the workdir. The picture includes the files of `compress`, if this checkpoint has compressed the split.
"""

import csv
import io
import os
from typing import Any

import numpy as np
from absl import flags

from . import _flags, _program

FLAGS = flags.FLAGS
_flags.define_bound_flags()

_program.parse_flags(__name__, _flags.check_measured_run)

import tensorflow as tf

from diffusion_tf import figures
from diffusion_tf.likelihood import rate_distortion
from diffusion_tf.reports import paper_numbers as paper
from diffusion_tf.storage.files import write_file
from diffusion_tf.storage.json_files import read_json, write_json
from diffusion_tf.storage.records import Compression

from ._measured_run import MeasuredRun, print_notes


def _table(rows: list[dict[str, Any]], with_paper: bool) -> list[dict[str, Any]]:
    """Ten rows at the reverse process times T, 0.9 T, ... of Table 4; `with_paper` adds the paper's numbers."""
    num_timesteps = len(rows)
    times = [num_timesteps * tenth // 10 for tenth in range(10, 0, -1)]
    table = [rows[time - 1] for time in times if time]
    return [{**row, **paper.TABLE_4[row["reverse_process_time"]]} for row in table] if with_paper else table


def _print_table(table: list[dict[str, Any]]) -> None:
    print("".join(f"{name:>26}" for name in table[0]))
    for row in table:
        print("".join(f"{value:>26.5f}" if isinstance(value, float) else f"{value:>26}" for value in row.values()))


def _csv(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().encode()


def _measured_files(run: MeasuredRun, step: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Bits/dim and RMSE of the files that `compress` wrote for this split with the checkpoint of `step`."""
    path = run.find(os.path.join(run.workdir.path, f"compression_{FLAGS.split}.json"))
    record: dict[str, Any] = read_json(path, Compression) if tf.io.gfile.exists(path) else {}
    if record.get("step") != step:
        return {}
    column = lambda name: np.array([row[name] for row in record["table"]])
    return {"files without their header": (column("steps_bits_per_dim"), column("distortion_rmse"))}


def _figure(rows: list[dict[str, Any]], files: dict[str, tuple[np.ndarray, np.ndarray]]) -> bytes:
    """A PNG of the three curves of Figure 5, with the points of the compressed files."""
    time, rate, rmse = (np.array([row[key] for row in rows]) for key in rows[0])
    steps, bits, distortion = "reverse process steps (T - t + 1)", "rate (bits/dim)", "distortion (RMSE)"
    return figures.curves(
        [
            figures.Curve("distortion over time", steps, distortion, time, rmse),
            figures.Curve("rate over time", steps, bits, time, rate),
            figures.Curve("distortion over rate", bits, distortion, rate, rmse, points=files),
        ]
    )


def main() -> None:
    run = MeasuredRun.from_flags()
    out = _flags.out_path(os.path.join(run.results.path, f"rate_distortion_{FLAGS.split}.json"), ".json")
    bound, subject = run.measure_bound()
    rate, rmse = rate_distortion(bound)
    rows = [
        {"reverse_process_time": len(rate) - t, "rate_bits_per_dim": float(rate[t]), "distortion_rmse": float(rmse[t])}
        for t in reversed(range(len(rate)))
    ]
    table = _table(rows, with_paper=run.preset.dataset == "cifar10" and len(rate) == 1000)
    given = " given their labels" if "given" in subject else ""
    print(f"{subject['images']}: {subject['num_images']} images{given}, step {subject['step']}")
    _print_table(table)
    print_notes(subject["notes"])
    base = os.path.splitext(out)[0]
    write_file(f"{base}.csv", _csv(rows))
    write_file(f"{base}.png", _figure(rows, _measured_files(run, subject["step"])))
    totals = {"bits_per_dim": bound.total_bpd.mean(), "decoder_bits_per_dim": bound.decoder_bpd.mean()}
    result = {**subject, **{name: float(total) for name, total in totals.items()}, "table": table, "curve": rows}
    write_json(out, result)
    print(f"numbers: {out} {base}.csv\npicture: {base}.png")


if __name__ == "__main__":
    _program.run(main)
