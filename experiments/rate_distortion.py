"""Measures progressive lossy compression (Section 4.3): Table 4 and Figure 5 of the paper for a trained run.

  python -m experiments.rate_distortion --workdir=runs/digits --split=test

A decoder that holds x_t has received L_T and the terms that led to x_t (rate), and shows the x_0 that it predicts
(distortion: root mean squared error on [0, 255]). Reads what `experiments.likelihood` has measured with the same flags,
and measures what is missing. Writes rate_distortion_SPLIT.json (the table), .csv (every t) and .png into the workdir.
The picture shows the files of `experiments.compress` too, where this checkpoint has compressed the split.
"""

import csv
import io
import os
from typing import Any

import numpy as np
import tensorflow as tf
from absl import flags

from diffusion_tf import figures
from diffusion_tf.likelihood import rate_distortion
from diffusion_tf.reports import paper_numbers as paper
from diffusion_tf.storage.files import read_json, write_file, write_json
from experiments import common

FLAGS = flags.FLAGS
common.define_bound_flags()


def _table(rows: list[dict], with_paper: bool) -> list[dict]:
    """Ten rows at reverse process times T, 0.9 T, ..., as Table 4 has them; the paper's numbers beside ours."""
    num_timesteps = len(rows)
    times = [num_timesteps * tenth // 10 for tenth in range(10, 0, -1)]
    table = [rows[time - 1] for time in times if time]
    return [{**row, **paper.TABLE_4[row["reverse_process_time"]]} for row in table] if with_paper else table


def _print_table(table: list[dict]) -> None:
    print("".join(f"{name:>26}" for name in table[0]))
    for row in table:
        print("".join(f"{value:>26.5f}" if isinstance(value, float) else f"{value:>26}" for value in row.values()))


def _csv(rows: list[dict]) -> bytes:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().encode()


def _measured_files(run: common.Run, step: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Bits/dim and RMSE of what `experiments.compress` wrote of this split by the checkpoint of `step`."""
    path = os.path.join(run.workdir.path, f"compression_{FLAGS.split}.json")
    record: dict[str, Any] = read_json(path) if tf.io.gfile.exists(path) else {}
    if record.get("step") != step:
        return {}
    column = lambda name: np.array([row[name] for row in record["table"]])
    return {"files without their header": (column("steps_bits_per_dim"), column("distortion_rmse"))}


def _figure(rows: list[dict], files: dict[str, tuple[np.ndarray, np.ndarray]]) -> bytes:
    """The three curves of Figure 5, and the files' points."""
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
    run = common.Run.from_flags()
    out = common.out_path(os.path.join(run.workdir.path, f"rate_distortion_{FLAGS.split}.json"), ".json")
    bound, subject = common.bound_from_flags(run)
    rate, rmse = rate_distortion(bound)
    rows = [
        {"reverse_process_time": len(rate) - t, "rate_bits_per_dim": float(rate[t]), "distortion_rmse": float(rmse[t])}
        for t in reversed(range(len(rate)))
    ]
    table = _table(rows, with_paper=run.preset.dataset == "cifar10" and len(rate) == 1000)
    print(f"{subject['images']}: {subject['num_images']} images, step {subject['step']}")
    _print_table(table)
    base = os.path.splitext(out)[0]
    write_file(f"{base}.csv", _csv(rows))
    write_file(f"{base}.png", _figure(rows, _measured_files(run, subject["step"])))
    totals = {"bits_per_dim": bound.total_bpd.mean(), "decoder_bits_per_dim": bound.decoder_bpd.mean()}
    write_json(out, {**subject, **{name: float(total) for name, total in totals.items()}, "table": table})
    print(f"numbers: {out} {base}.csv\npicture: {base}.png")


if __name__ == "__main__":
    common.run(main)
