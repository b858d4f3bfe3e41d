"""A page about a run, as Markdown and as a PNG: configuration, curves and scores beside the paper's numbers."""

import io
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from diffusion_tf.reports import paper_numbers as paper
from diffusion_tf.reports.captions import sampler_name
from diffusion_tf.reports.run_record import RunRecord, reference_name, scores
from diffusion_tf.storage.files import read_file

_LSUN_COLUMNS = {"lsun_bedroom": 1, "lsun_bedroom_large": 1, "lsun_church": 2, "lsun_cat": 3}


# --- Markdown --------------------------------------------------------------------------------------------------


def to_markdown(record: RunRecord, picture: str) -> str:
    """The page as Markdown; `picture` is the path of its PNG, relative to the page."""
    sections = {
        "Training": _training_section(record),
        "Bits/dim (Eq. 5)": _likelihood_section(record),
        "Rate-distortion (Table 4, Figure 5)": _tables_section(record.rate_distortion, "rate_distortion"),
        "Compressed files (Algorithms 3 and 4)": _tables_section(record.compression, "compress encode"),
        "Sample quality": _evaluation_section(record),
        "Quality against sampling steps": _sampler_section(record),
        "Beside the paper": paper_table(record),
        "Configuration": _markdown_table(["field", "value"], list(record.config.items())),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items() if text)
    return f"# {record.config['dataset']}\n\n![curves and samples]({picture})\n\n{body}\n"


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def _training_section(record: RunRecord) -> str:
    if not record.metrics:
        return "Not trained yet."
    last = record.metrics[-1]
    values = ", ".join(f"{name} {value:.4g}" for name, value in last.items() if name != "step")
    return f"{int(last['step']):,} of {record.config['num_steps']:,} steps: {values}."


def _subject(result: dict[str, Any]) -> str:
    """The images and the checkpoint of a measurement."""
    return f"{result['images']}, {result['num_images']:,} images, step {result['step']}"


def _likelihood_section(record: RunRecord) -> str:
    if not record.likelihood:
        return "Not measured: `python -m experiments.likelihood`."
    rows = []
    for result in record.likelihood.values():
        error = result["bits_per_dim_standard_error"]  # None for one image
        rows.append(
            [
                _subject(result),
                f"{result['bits_per_dim']:.4f}" + ("" if error is None else f" +- {error:.4f}"),
                f"{result['prior_bits_per_dim']:.2e}",
                f"{result['middle_bits_per_dim']:.4f}",
                f"{result['decoder_bits_per_dim']:.4f}",
            ]
        )
    return _markdown_table(["measured on", "bits/dim", "L_T", "L_1..L_T-1", "L_0"], rows)


def _tables_section(results: dict[str, dict[str, Any]], program: str) -> str:
    """The table of each split, as the program wrote it."""
    if not results:
        return f"Not measured: `python -m experiments.{program}`."
    sections = []
    for result in results.values():
        rows = [[f"{v:.5f}" if isinstance(v, float) else v for v in row.values()] for row in result["table"]]
        sections.append(f"{_subject(result)}\n\n{_markdown_table(list(result['table'][0]), rows)}")
    return "\n\n".join(sections)


def _evaluation_section(record: RunRecord) -> str:
    """One row for each score."""
    if not record.evaluations:
        return "Not measured: `python -m experiments.evaluate`."
    rows = [
        [
            line["step"],
            f"{sampler_name(line, record.config['dataset'])}, {line['sampler_steps']}",
            f"{line['num_samples']:,}",
            reference_name(line),
            name,
            f"{score:.5g}",
        ]
        for line in record.evaluations
        for name, score in scores(line).items()
    ]
    return _markdown_table(["step", "sampler, steps", "samples", "against", "score", "value"], rows)


def _sampler_section(record: RunRecord) -> str:
    """One row for each sampler and number of steps; empty if only one was measured."""
    lines = record.sampler_comparison()
    if not lines:
        return ""
    names = _score_names(lines)
    rows = [
        [sampler_name(line, record.config["dataset"]), line["sampler_steps"]]
        + [f"{scores(line)[name]:.5g}" if name in scores(line) else "" for name in names]
        for line in lines
    ]
    title = f"Step {lines[0]['step']}, {lines[0]['num_samples']:,} samples against {reference_name(lines[0])}"
    return f"{title}\n\n{_markdown_table(['sampler', 'steps', *names], rows)}"


def _score_names(lines: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for line in lines for name in scores(line)))


def paper_table(record: RunRecord) -> str:
    """The paper's Table 1 or 3 with a row for this run, and the source of each row; empty for other datasets."""
    dataset, best = record.config["dataset"], record.best_fid()
    fid, sources = "", []
    if best:
        fid = f"{best['fid']:.2f}"
        subject = f"step {best['step']}, {best['num_samples']:,} samples against {reference_name(best)}"
        sources = [f"evaluations.jsonl, {subject}"]
    if dataset == "cifar10":
        score = f"{best['inception_score']:.2f}" if "inception_score" in best else ""
        bits = {split: f"{result['bits_per_dim']:.2f}" for split, result in record.likelihood.items()}
        nll = f"<= {bits['test']}" if "test" in bits else ""
        nll += f" ({bits['train']})" if "train" in bits else ""
        sources += [f"likelihood_{split}.json" for split in bits]
        rows = [[*row, "paper, Table 1"] for row in paper.TABLE_1]
        return _markdown_table(
            ["model", "Inception Score", "FID", "NLL test (train), bits/dim", "source"],
            [*rows, ["**this run**", score, fid, nll, "; ".join(sources) or "not measured"]],
        )
    if dataset in _LSUN_COLUMNS:
        column = _LSUN_COLUMNS[dataset]
        rows = [[row[0], row[column], "paper, Table 3"] for row in paper.TABLE_3]
        ours = ["**this run**", fid, "; ".join(sources) or "not measured"]
        name = dataset.removesuffix("_large")
        table = _markdown_table(["model", f"FID, {name} 256x256", "source"], [*rows, ours])
        return f"{table}\n\nStarred: measured by StyleGAN2's authors; the others by their own."
    return ""


# --- PNG -------------------------------------------------------------------------------------------------------


def to_png(record: RunRecord) -> bytes:
    """The page as a PNG: configuration, curves, scores, and pictures of samples and of compressed files."""
    num_rows = 3 if record.reconstructions else 2
    figure = Figure(figsize=(20.0, 4.5 * num_rows), layout="constrained")
    config = ", ".join(f"{name}={value}" for name, value in record.config.items())
    figure.suptitle(textwrap.fill(config, 260), fontsize=9)
    places = figure.add_gridspec(num_rows, 4)
    grid = np.array([[figure.add_subplot(places[row, column]) for column in range(4)] for row in range(2)])
    names = _score_names(record.sampler_comparison())
    coverage = [name for name in names if name.startswith(("precision", "recall"))]
    _plot_training(grid[0, 0], record, "loss")
    _plot_training(grid[0, 1], record, "grad_norm")
    _plot_scores(grid[0, 2], record)
    _plot_sampler_steps(grid[0, 3], record, [name for name in names if name not in coverage][:1])
    _plot_terms(grid[1, 0], record)
    _plot_rate_distortion(grid[1, 1], record)
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


def _plot_training(axes: Axes, record: RunRecord, name: str) -> None:
    axes.plot([line["step"] for line in record.metrics], [line[name] for line in record.metrics], linewidth=0.8)
    axes.set(title=f"{name} over steps", xlabel="step")
    axes.set_yscale("log")


def _plot_terms(axes: Axes, record: RunRecord) -> None:
    axes.set(title="terms of the bound (bits/dim)", xlabel="t")
    for split, result in record.likelihood.items():
        axes.semilogy(result["terms_bits_per_dim"], label=f"{split}: {result['bits_per_dim']:.3f}")


def _plot_rate_distortion(axes: Axes, record: RunRecord) -> None:
    """The curve of each split, and the points of its compressed files."""
    axes.set(title="rate-distortion", xlabel="rate (bits/dim)", ylabel="distortion (RMSE)")
    for split, result in record.rate_distortion.items():
        points = [(row["rate_bits_per_dim"], row["distortion_rmse"]) for row in result["table"]]
        axes.plot(*zip(*points, strict=True), marker="o", label=split)
    for split, result in record.compression.items():
        points = [(row["steps_bits_per_dim"], row["distortion_rmse"]) for row in result["table"]]
        axes.plot(*zip(*points, strict=True), "x", label=f"files without their header, {split}")


def _plot_scores(axes: Axes, record: RunRecord) -> None:
    """The first score of each evaluation over training steps, with a curve for each way of measuring it.

    It leaves out a single point of another sampler than Algorithm 2, which `_plot_sampler_steps` shows.
    """
    axes.set(title="scores over steps", xlabel="step")
    series: dict[str, list[tuple[int, float]]] = {}
    for line in filter(scores, record.evaluations):
        name, score = next(iter(scores(line).items()))
        sampler = (
            ""
            if record.is_algorithm_2(line)
            else f", {sampler_name(line, record.config['dataset'])}, {line['sampler_steps']}"
        )
        series.setdefault(f"{name}, {line['num_samples']:,} samples{sampler}", []).append((line["step"], score))
    for label, points in series.items():
        if len(points) > 1 or label.endswith(" samples"):
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)


def _plot_sampler_steps(axes: Axes, record: RunRecord, names: Sequence[str]) -> None:
    """Up to two scores over the number of sampling steps, with a colour for each sampler."""
    axes.set(title=" and ".join(names) or "scores over sampling steps", xlabel="sampling steps")
    axes.set_xscale("log")
    lines = record.sampler_comparison()
    for i, sampler in enumerate(dict.fromkeys(sampler_name(line, record.config["dataset"]) for line in lines)):
        for name, style in zip(names, ("-", "--"), strict=False):
            points = [
                (line["sampler_steps"], scores(line)[name])
                for line in lines
                if sampler_name(line, record.config["dataset"]) == sampler and name in scores(line)
            ]
            if points:
                axes.plot(*zip(*points, strict=True), style, color=f"C{i}", marker="o", label=f"{sampler}: {name}")


def _show(axes: Axes, picture: str | None) -> None:
    """Shows the picture at a path in place of a plot."""
    axes.clear()
    axes.set_axis_off()
    if picture:
        axes.imshow(np.asarray(Image.open(io.BytesIO(read_file(picture)))))
