"""One page about a run, as Markdown and as PNG: its configuration, curves, scores, and the paper's numbers beside them.

All of it is read from the files that training and the measurements left in the run's folder.
"""

import dataclasses
import io
import os
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from diffusion_tf.reports import paper_numbers as paper
from diffusion_tf.solvers import default_spacing
from diffusion_tf.storage.files import read_file, read_json
from diffusion_tf.storage.workdir import Workdir

_LSUN_COLUMNS = {"lsun_bedroom": 1, "lsun_bedroom_large": 1, "lsun_church": 2, "lsun_cat": 3}
_SPLITS = ("train", "test")


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """What a run's folder holds of results; empty where something was not measured."""

    config: dict[str, Any]
    metrics: list[dict[str, float]]
    likelihood: dict[str, dict[str, Any]]
    rate_distortion: dict[str, dict[str, Any]]
    compression: dict[str, dict[str, Any]]
    evaluations: list[dict[str, Any]]
    samples: str | None
    reconstructions: str | None


def read_run(workdir: Workdir) -> RunRecord:
    """Collects the results in `workdir`.

    Raises:
      InputError: it holds no run.
    """
    config = dataclasses.asdict(workdir.read_preset())

    def by_split(name: str) -> dict[str, dict[str, Any]]:
        paths = {split: os.path.join(workdir.path, f"{name}_{split}.json") for split in _SPLITS}
        return {split: read_json(path) for split, path in paths.items() if tf.io.gfile.exists(path)}

    grids = sorted(tf.io.gfile.glob(os.path.join(workdir.samples, "step_*.png")))
    strips = sorted(tf.io.gfile.glob(os.path.join(workdir.path, "compression_*.png")))
    return RunRecord(
        config,
        workdir.read_metrics(),
        by_split("likelihood"),
        by_split("rate_distortion"),
        by_split("compression"),
        workdir.read_evaluations(),
        grids[-1] if grids else None,
        strips[-1] if strips else None,
    )


# --- Markdown ----------------------------------------------------------------------------------------------


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def _scores(evaluation: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line of evaluations.jsonl that are scores."""
    return {name: v for name, v in evaluation.items() if isinstance(v, float) and name != "ddim_eta"}


def _sampler_name(record: RunRecord, line: dict[str, Any]) -> str:
    """How the samples of an evaluation were drawn, but for the number of steps and what is so by default."""
    name, spacing = line["sampler"], line.get("sampler_spacing")
    eta = f"eta {line['ddim_eta']:g}" if line.get("ddim_eta") else ""
    if spacing == default_spacing(name, record.config["dataset"]):
        spacing = None
    return ", ".join(filter(None, (name, eta, spacing)))


def _by_sampler_steps(record: RunRecord) -> list[dict[str, Any]]:
    """The newest evaluations of one checkpoint in one way by several samplers or numbers of steps; none if never."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for line in record.evaluations:
        groups.setdefault((line["step"], line["num_samples"], _reference_name(line)), []).append(line)
    several = [
        lines for lines in groups.values() if len({(line["sampler"], line["sampler_steps"]) for line in lines}) > 1
    ]
    return sorted(several[-1], key=lambda line: (line["sampler"], line["sampler_steps"])) if several else []


def _sampler_section(record: RunRecord) -> str:
    lines = _by_sampler_steps(record)
    names = list(dict.fromkeys(name for line in lines for name in _scores(line)))
    rows = [
        [_sampler_name(record, line), line["sampler_steps"]]
        + [f"{_scores(line)[name]:.5g}" if name in _scores(line) else "" for name in names]
        for line in lines
    ]
    if not rows:
        return ""
    title = f"Step {lines[0]['step']}, {lines[0]['num_samples']:,} samples against {_reference_name(lines[0])}"
    return f"{title}\n\n{_markdown_table(['sampler', 'steps', *names], rows)}"


def _plus_minus(standard_error: float | None) -> str:
    """Of one image there is none."""
    return "" if standard_error is None else f" +- {standard_error:.4f}"


def _likelihood_section(record: RunRecord) -> str:
    rows = [
        [
            f"{result['images']}, {result['num_images']:,} images, step {result['step']}",
            f"{result['bits_per_dim']:.4f}{_plus_minus(result['bits_per_dim_standard_error'])}",
            f"{result['prior_bits_per_dim']:.2e}",
            f"{result['middle_bits_per_dim']:.4f}",
            f"{result['decoder_bits_per_dim']:.4f}",
        ]
        for result in record.likelihood.values()
    ]
    if not rows:
        return "Not measured: `python -m experiments.likelihood`."
    return _markdown_table(["measured on", "bits/dim", "L_T", "L_1..L_T-1", "L_0"], rows)


def _tables_section(results: dict[str, dict[str, Any]], program: str) -> str:
    """The table of each split's file."""
    if not results:
        return f"Not measured: `python -m experiments.{program}`."
    sections = []
    for result in results.values():
        rows = [[f"{v:.5f}" if isinstance(v, float) else v for v in row.values()] for row in result["table"]]
        table = _markdown_table(list(result["table"][0]), rows)
        sections.append(f"{result['images']}, {result['num_images']:,} images, step {result['step']}\n\n{table}")
    return "\n\n".join(sections)


def _evaluation_section(record: RunRecord) -> str:
    if not record.evaluations:
        return "Not measured: `python -m experiments.evaluate`."
    rows = [
        [
            line["step"],
            f"{_sampler_name(record, line)}, {line['sampler_steps']}",
            f"{line['num_samples']:,}",
            _reference_name(line),
            name,
            f"{score:.5g}",
        ]
        for line in record.evaluations
        for name, score in _scores(line).items()
    ]
    return _markdown_table(["step", "sampler, steps", "samples", "against", "score", "value"], rows)


def _reference_name(line: dict[str, Any]) -> str:
    reference = line["reference"]
    return f"{reference['num_images']:,} of {reference.get('images') or reference['file']}"


def _best_fid(record: RunRecord) -> dict[str, Any]:
    """The lowest FID against training images, of the measurements with most samples; empty where there is none.

    Of Algorithm 2 over all steps alone, which is what the paper's rows are of.
    """
    lines = [
        line
        for line in record.evaluations
        if line.get("fid") and line["reference"].get("split") == "train" and _is_algorithm_2(record, line)
    ]
    most = max((line["num_samples"] for line in lines), default=0)
    return min((line for line in lines if line["num_samples"] == most), key=lambda line: line["fid"], default={})


def _is_algorithm_2(record: RunRecord, line: dict[str, Any]) -> bool:
    return (line["sampler"], line["sampler_steps"]) == ("ancestral", record.config["num_timesteps"])


def paper_table(record: RunRecord) -> str:
    """The paper's Table 1 or 3 with this run's row, each number with its source; empty for other datasets."""
    dataset, best = record.config["dataset"], _best_fid(record)
    fid = f"{best['fid']:.2f}" if best else ""
    source = (
        [f"evaluations.jsonl, step {best['step']}, {best['num_samples']:,} samples against {_reference_name(best)}"]
        if best
        else []
    )
    if dataset == "cifar10":
        score = f"{best['inception_score']:.2f}" if "inception_score" in best else ""
        bits = {split: f"{result['bits_per_dim']:.2f}" for split, result in record.likelihood.items()}
        nll = f"<= {bits['test']}" if "test" in bits else ""
        nll += f" ({bits['train']})" if "train" in bits else ""
        source += [f"likelihood_{split}.json" for split in bits]
        rows = [[*row, "paper, Table 1"] for row in paper.TABLE_1]
        return _markdown_table(
            ["model", "Inception Score", "FID", "NLL test (train), bits/dim", "source"],
            [*rows, ["**this run**", score, fid, nll, "; ".join(source) or "not measured"]],
        )
    if dataset in _LSUN_COLUMNS:
        column = _LSUN_COLUMNS[dataset]
        rows = [[row[0], row[column], "paper, Table 3"] for row in paper.TABLE_3]
        ours = ["**this run**", fid, "; ".join(source) or "not measured"]
        name = dataset.removesuffix("_large")
        table = _markdown_table(["model", f"FID, {name} 256x256", "source"], [*rows, ours])
        return f"{table}\n\nStarred: measured by StyleGAN2's authors; the others by their own."
    return ""


def to_markdown(record: RunRecord, picture: str) -> str:
    """The report; `picture` is where its PNG page lies, relative to it."""
    config = _markdown_table(["field", "value"], list(record.config.items()))
    last = record.metrics[-1] if record.metrics else {}
    progress = ", ".join(f"{name} {value:.4g}" for name, value in last.items() if name != "step")
    steps = (
        f"{int(last['step']):,} of {record.config['num_steps']:,} steps: {progress}." if last else "Not trained yet."
    )
    sections = {
        "Training": steps,
        "Bits/dim (Eq. 5)": _likelihood_section(record),
        "Rate-distortion (Table 4, Figure 5)": _tables_section(record.rate_distortion, "rate_distortion"),
        "Compressed files (Algorithms 3 and 4)": _tables_section(record.compression, "compress encode"),
        "Sample quality": _evaluation_section(record),
        "Quality against sampling steps": _sampler_section(record),
        "Beside the paper": paper_table(record),
        "Configuration": config,
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items() if text)
    return f"# {record.config['dataset']}\n\n![curves and samples]({picture})\n\n{body}\n"


# --- The PNG page ------------------------------------------------------------------------------------------


def _plot_training(axes: Axes, record: RunRecord, name: str) -> None:
    axes.plot([line["step"] for line in record.metrics], [line[name] for line in record.metrics], linewidth=0.8)
    axes.set(title=f"{name} over steps", xlabel="step")
    axes.set_yscale("log")


def _plot_terms(axes: Axes, record: RunRecord) -> None:
    axes.set(title="terms of the bound (bits/dim)", xlabel="t")
    for split, result in record.likelihood.items():
        axes.semilogy(result["terms_bits_per_dim"], label=f"{split}: {result['bits_per_dim']:.3f}")


def _plot_rate_distortion(axes: Axes, record: RunRecord) -> None:
    axes.set(title="rate-distortion", xlabel="rate (bits/dim)", ylabel="distortion (RMSE)")
    for split, result in record.rate_distortion.items():
        table = result["table"]
        axes.plot(
            [row["rate_bits_per_dim"] for row in table],
            [row["distortion_rmse"] for row in table],
            marker="o",
            label=split,
        )
    for split, result in record.compression.items():
        rows = [(row["steps_bits_per_dim"], row["distortion_rmse"]) for row in result["table"]]
        axes.plot(*zip(*rows, strict=True), "x", label=f"files without their header, {split}")


def _plot_scores(axes: Axes, record: RunRecord) -> None:
    """The first score of each way of measuring, over steps; one point of another sampler is in its own plot."""
    axes.set(title="scores over steps", xlabel="step")
    series: dict[str, list[tuple[int, float]]] = {}
    for line in filter(_scores, record.evaluations):
        name, score = next(iter(_scores(line).items()))
        sampler = "" if _is_algorithm_2(record, line) else f", {_sampler_name(record, line)}, {line['sampler_steps']}"
        series.setdefault(f"{name}, {line['num_samples']:,} samples{sampler}", []).append((line["step"], score))
    for label, points in series.items():
        if len(points) > 1 or label.endswith(" samples"):
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)


def _plot_sampler_steps(axes: Axes, record: RunRecord, names: Sequence[str]) -> None:
    """Scores of one checkpoint over the steps of each sampler."""
    axes.set(title=" and ".join(names) or "scores over sampling steps", xlabel="sampling steps")
    axes.set_xscale("log")
    lines = _by_sampler_steps(record)
    for i, sampler in enumerate(dict.fromkeys(_sampler_name(record, line) for line in lines)):
        for name, style in zip(names, ("-", "--"), strict=False):
            points = [
                (line["sampler_steps"], _scores(line)[name])
                for line in lines
                if _sampler_name(record, line) == sampler and name in _scores(line)
            ]
            if points:
                axes.plot(*zip(*points, strict=True), style, color=f"C{i}", marker="o", label=f"{sampler}: {name}")


def _show(axes: Axes, picture: str | None) -> None:
    axes.clear()
    axes.set_axis_off()
    if picture:
        axes.imshow(np.asarray(Image.open(io.BytesIO(read_file(picture)))))


def to_png(record: RunRecord) -> bytes:
    """The page: configuration, curves, scores, a grid of samples, and what prefixes of compressed files show."""
    num_rows = 3 if record.reconstructions else 2
    figure = Figure(figsize=(20.0, 4.5 * num_rows), layout="constrained")
    config = ", ".join(f"{name}={value}" for name, value in record.config.items())
    figure.suptitle(textwrap.fill(config, 260), fontsize=9)
    places = figure.add_gridspec(num_rows, 4)
    grid = np.array([[figure.add_subplot(places[row, column]) for column in range(4)] for row in range(2)])
    _plot_training(grid[0, 0], record, "loss")
    _plot_training(grid[0, 1], record, "grad_norm")
    _plot_scores(grid[0, 2], record)
    _plot_terms(grid[1, 0], record)
    _plot_rate_distortion(grid[1, 1], record)
    names = list(dict.fromkeys(name for line in _by_sampler_steps(record) for name in _scores(line)))
    coverage = [name for name in names if name.startswith(("precision", "recall"))]
    _plot_sampler_steps(grid[0, 3], record, [name for name in names if name not in coverage][:1])
    _plot_sampler_steps(grid[1, 3], record, coverage[:2])
    for axes in grid.flat:
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
        elif not axes.lines:
            axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
    _show(grid[1, 2], record.samples)
    if record.reconstructions:
        _show(figure.add_subplot(places[2, :]), record.reconstructions)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
