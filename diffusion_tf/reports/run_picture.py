"""A page about a run as a PNG: key numbers, samples, and the curves of what was measured."""

import io
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from diffusion_tf.data.pictures import decode_picture
from diffusion_tf.reports.captions import sampling_name
from diffusion_tf.reports.run_record import RunRecord
from diffusion_tf.reports.summary import KeyNumber, changed_fields, key_numbers, main_scores, title
from diffusion_tf.storage.files import read_file

_WIDTH = 15.0  # inches
_TITLE, _NUMBERS, _ROW, _FOOTER = 0.9, 0.8, 4.0, 0.6  # heights in inches
_MAX_LINES = 10  # evaluations in a panel


@matplotlib.rc_context({"text.parse_math": False})  # names may hold a $
def to_png(record: RunRecord) -> bytes:
    """The page as a PNG, with a panel for each thing that was measured."""
    panels, numbers = _panels(record), key_numbers(record)
    columns = {1: 1, 2: 2, 4: 2}.get(len(panels), 3)
    rows = -(-len(panels) // columns)
    reconstructions = _read_picture(record.reconstructions) if record.reconstructions else None
    heights = [_ROW] * rows
    if reconstructions is not None:
        heights.append(min(6.0, _WIDTH * reconstructions.shape[0] / reconstructions.shape[1]))
    header = _TITLE + (_NUMBERS if numbers else 0.0)
    total = header + sum(heights) + _FOOTER
    area = (0.01, _FOOTER / total, 0.98, 1 - (header + _FOOTER) / total)
    layout = ConstrainedLayoutEngine(rect=area, h_pad=0.15, w_pad=0.1)
    figure = Figure(figsize=(_WIDTH, total), layout=layout)
    places = figure.add_gridspec(max(1, len(heights)), columns, height_ratios=heights or [1.0])
    for i, draw in enumerate(panels):
        draw(figure.add_subplot(places[divmod(i, columns)]))
    if reconstructions is not None:
        _show(figure.add_subplot(places[rows, :]), reconstructions)
    _write_header(figure, record, numbers, total)
    config = ", ".join(f"{name}={value}" for name, value in record.config.items())
    figure.text(0.02, 0.15 / total, textwrap.fill(config, 300), fontsize=6.5, color="0.45", va="bottom")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _write_header(figure: Figure, record: RunRecord, numbers: Sequence[KeyNumber], total: float) -> None:
    """Title, what was changed, and the key numbers with the paper's below them."""
    from_top = lambda inches: 1.0 - inches / total
    changed = ", ".join(f"{name}={value}" for name, value in changed_fields(record.config).items())
    figure.text(0.02, from_top(0.38), title(record), fontsize=18, weight="bold")
    subtitle = f"the preset with {changed}" if changed else "the preset, unchanged"
    figure.text(0.02, from_top(0.65), textwrap.shorten(subtitle, 170, placeholder=" ..."), fontsize=10, color="0.35")
    for i, number in enumerate(numbers):
        x = 0.02 + i * min(0.19, 0.96 / len(numbers))
        figure.text(x, from_top(1.15), number.value, fontsize=17, color="C0")
        figure.text(x, from_top(1.35), number.name, fontsize=9)
        note = f"paper: {number.paper}" if number.paper else number.note
        figure.text(x, from_top(1.52), note, fontsize=9, color="0.35")


# --- Panels ----------------------------------------------------------------------------------------------------


def _panels(record: RunRecord) -> list[Callable[[Axes], None]]:
    """Functions that draw a panel, for each thing that was measured."""
    panels: list[Callable[[Axes], None]] = []
    if record.samples:
        panels.append(partial(_show, picture=_read_picture(record.samples), title="Samples"))
    for name, label in (("loss", "loss"), ("grad_norm", "gradient norm")):
        if points := [(line["step"], line[name]) for line in record.metrics if name in line]:
            panels.append(partial(_plot_training, points=points, label=label))
    panels += _score_panels(record)
    if terms := {split: r for split, r in record.likelihood.items() if "terms_bits_per_dim" in r}:
        panels.append(partial(_plot_terms, results=terms))
    if record.rate_distortion or record.compression:
        panels.append(partial(plot_rate_distortion, record=record))
    if record.neighbors:
        panels.append(partial(_plot_neighbors, result=record.neighbors))
    return panels


def _score_panels(record: RunRecord) -> list[Callable[[Axes], None]]:
    """Panels of the first score of every evaluation, and of precision and recall."""
    panels: list[Callable[[Axes], None]] = []
    scored = [line for line in record.evaluations if main_scores(line)]
    for name in dict.fromkeys(next(iter(main_scores(line))) for line in scored):
        groups = _by_sampling(scored, name)
        if series := {label: lines for label, lines in groups.items() if len({line["step"] for line in lines}) > 1}:
            panels.append(partial(_plot_over_training, name=name, series=series))
        panels.append(partial(_plot_evaluations, names=[name], groups=groups))
    for suffix in ("", "_pixels"):
        names = [f"precision{suffix}", f"recall{suffix}"]
        if groups := _by_sampling(scored, *names):
            panels.append(partial(_plot_evaluations, names=names, groups=groups))
    return panels


def _by_sampling(evaluations: Sequence[dict[str, Any]], *names: str) -> dict[str, list[dict[str, Any]]]:
    """The evaluations that have the scores `names`, by sampler and number of samples."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in evaluations:
        if main_scores(line).keys() >= set(names):
            label = f"{sampling_name(line)}, {line['num_samples']:,} samples"
            groups.setdefault(label, []).append(line)
    return groups


def _plot_training(axes: Axes, points: Sequence[tuple[float, float]], label: str) -> None:
    axes.plot(*zip(*points, strict=True), linewidth=0.8)
    axes.set(title=f"Training: {label}", xlabel="step")
    _scale_by_logarithm(axes)
    _label_steps(axes)
    axes.grid(alpha=0.3)


def _plot_over_training(axes: Axes, name: str, series: dict[str, list[dict[str, Any]]]) -> None:
    for label, lines in series.items():
        points = sorted((line["step"], line[name]) for line in lines)
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=label)
    axes.set(title=f"{name} over training", xlabel="step")
    _label_steps(axes)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _scale_by_logarithm(axes: Axes) -> None:
    """Makes the y axis logarithmic, with labels such as 0.02 where they have room."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high > 10 * low:
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}" if high < 1000 * low else NullFormatter())


def _label_steps(axes: Axes) -> None:
    """Labels the x axis 50k, 100k, ..."""
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _plot_evaluations(axes: Axes, names: Sequence[str], groups: dict[str, list[dict[str, Any]]]) -> None:
    """A line for the evaluation of the last step in each group, with the scores `names` as points."""
    newest = {label: max(lines, key=lambda line: line["step"]) for label, lines in sorted(groups.items(), reverse=True)}
    lines = list(newest.values())[-_MAX_LINES:]
    for y, (label, line) in enumerate(list(newest.items())[-_MAX_LINES:]):
        text = f"{label}, step {line['step']:,}"
        axes.text(0.02, y + 0.2, text, fontsize=8, color="0.35", transform=axes.get_yaxis_transform())
    for name, marker in zip(names, "os", strict=False):
        axes.plot([line[name] for line in lines], range(len(lines)), marker, label=name)
        for y, line in enumerate(lines if len(names) == 1 else []):
            axes.annotate(f"{line[name]:.3g}", (line[name], y), (6, -3), textcoords="offset points", fontsize=8)
    axes.set(title=" and ".join(names), ylim=(-0.5, max(3, len(lines)) - 0.3), yticks=range(len(lines)), yticklabels=[])
    values = [0.0, *(line[name] for line in lines for name in names)]
    margin = 0.2 * (max(values) - min(values)) or 1.0
    axes.set_xlim(min(values) - margin * (min(values) < 0), max(values) + margin)
    axes.grid(alpha=0.3)
    if len(names) > 1:
        axes.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.08))


def _plot_terms(axes: Axes, results: dict[str, dict[str, Any]]) -> None:
    for split, result in results.items():
        label = f"{split}: {result['bits_per_dim']:.3f} bits/dim in all"
        axes.plot(result["terms_bits_per_dim"], linewidth=1.0, label=label)
    axes.set(title="Terms of the bound", xlabel="t", ylabel="L_t (bits/dim)")
    _scale_by_logarithm(axes)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def plot_rate_distortion(axes: Axes, record: RunRecord) -> None:
    """The curve of each split, and the points of its compressed files."""
    for split, result in record.rate_distortion.items():
        # Chords between the ten points of an older version would lie above the curve.
        rows, style = (result["curve"], "-") if result.get("curve") else (result["table"], ".")
        points = [(row["rate_bits_per_dim"], row["distortion_rmse"]) for row in rows]
        axes.plot(*zip(*points, strict=True), style, label=split)
    for split, result in record.compression.items():
        points = [(row["steps_bits_per_dim"], row["distortion_rmse"]) for row in result["table"]]
        label = f"files without their header, {split}, step {result['step']:,}"
        axes.plot(*zip(*points, strict=True), "x", label=label)
    axes.set(title="Rate-distortion", xlabel="rate (bits/dim)", ylabel="distortion (RMSE)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper right")


def _plot_neighbors(axes: Axes, result: dict[str, Any]) -> None:
    """The share of samples, and of held-out pictures, within each distance of a training picture."""
    for name, key in (("samples", "distances"), ("held-out pictures", "held_out_distances")):
        axes.ecdf(result[key], label=f"{len(result[key]):,} {name}")
    distance = "RMSE on [0, 255]" if result["features"] == "pixels" else f"{result['features']} features"
    axes.set(title=f"Copies: verdict {result['verdict']}", ylabel="share within the distance")
    axes.set(xlabel=f"distance to the nearest training picture ({distance})", xlim=(0.0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _read_picture(path: str) -> np.ndarray:
    return decode_picture(read_file(path), channels=3)


def _show(axes: Axes, picture: np.ndarray, title: str = "") -> None:
    axes.set_title(title)
    axes.set_axis_off()
    axes.imshow(picture)
