"""A page about what is wrong with a run: the findings as Markdown, and the curves behind them as a PNG."""

import dataclasses
import io
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diffusion_tf import figures
from diffusion_tf.calibration import Calibration
from diffusion_tf.evaluation.diagnosis import Finding, PictureStatistics

NOTHING = "Nothing wrong found."
_SHOWN = 16  # images of each kind


@dataclasses.dataclass(frozen=True)
class Examination:
    """The findings about a run and the measurements that they rest on.

    Attributes:
      title: the run and its checkpoint.
      findings: what is wrong.
      linear: the loss of the best linear denoiser at the timesteps of `ema` [K].
      ema: the predictions of the EMA weights; None: they are not finite.
      raw: those of the raw weights; None: they are the same weights.
      drift: timesteps, and the drift from there; None: not measured.
      statistics: of training pictures and of samples, by their names.
      images: the pictures and samples uint8 [N, H, W, C], by the same names.
    """

    title: str
    findings: Sequence[Finding]
    linear: np.ndarray
    ema: Calibration | None
    raw: Calibration | None
    drift: tuple[np.ndarray, np.ndarray] | None
    statistics: dict[str, PictureStatistics]
    images: dict[str, np.ndarray]

    def to_json(self) -> dict[str, Any]:
        """The findings and all numbers, as JSON values."""
        curves: dict[str, Any] = {"linear_loss": self.linear.tolist()}
        for name, measured in (("ema", self.ema), ("raw", self.raw)):
            if measured:
                curves["timesteps"] = measured.timesteps.tolist()
                curves[f"{name}_loss"] = measured.loss.tolist()
                curves[f"{name}_calibration"] = measured.scale.tolist()
        if self.drift:
            curves |= {"drift_timesteps": self.drift[0].tolist(), "drift": self.drift[1].tolist()}
        return {
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
            **curves,
            "images": {name: values.summary() for name, values in self.statistics.items()},
        }


def to_markdown(examined: Examination, picture: str) -> str:
    """The page as Markdown; `picture` is the path of its PNG, relative to the page."""
    findings = "\n".join(f"- {finding}" for finding in examined.findings) or NOTHING
    names = list(next(iter(examined.statistics.values())).summary())
    lines = [["", *names], ["---"] * (len(names) + 1)]
    for name, values in examined.statistics.items():
        lines.append([name, *(f"{value:.3g}" for value in values.summary().values())])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"# {examined.title}\n\n{findings}\n\n![curves and samples]({picture})\n\n{table}\n"


def to_png(examined: Examination) -> bytes:
    """The curves, the training pictures and the samples as a PNG."""
    panels = [_plot_loss, _plot_calibration, _plot_drift] if examined.ema else []
    drawings = [partial(panel, examined=examined) for panel in panels]
    drawings += [partial(_show, title=name, images=images) for name, images in examined.images.items()]
    rows = -(-len(drawings) // 3)
    figure = Figure(figsize=(15.0, 4.5 * rows), layout="constrained")
    for i, draw in enumerate(drawings):
        draw(figure.add_subplot(rows, 3, i + 1))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _plot_loss(axes: Axes, examined: Examination) -> None:
    assert examined.ema
    ts = examined.ema.timesteps
    axes.plot(ts, examined.ema.loss, marker="o", markersize=4, label="EMA weights")
    if examined.raw:
        axes.plot(ts, examined.raw.loss, marker="o", markersize=4, label="raw weights")
    axes.plot(ts, examined.linear, "k--", label="best linear denoiser")
    axes.axhline(1.0, color="0.6", label="untrained: no noise predicted")
    axes.set(title="Loss by timestep", xlabel="t", ylabel="E[(eps - eps_hat)^2]", yscale="log")
    axes.set_ylim(bottom=max(1e-4, float(min(examined.ema.loss.min(), 1.0)) / 2))
    axes.legend(fontsize=8)


def _plot_calibration(axes: Axes, examined: Examination) -> None:
    assert examined.ema
    axes.plot(examined.ema.timesteps, examined.ema.scale, marker="o", markersize=4)
    axes.axhline(1.0, color="0.6")
    axes.set(title="Calibration: above 1 it predicts too little noise", xlabel="t")
    axes.set(ylabel="E[eps eps_hat] / E[eps_hat^2]")


def _plot_drift(axes: Axes, examined: Examination) -> None:
    title = "Drift: samples from x_t beside pictures"
    axes.set(title=title, xlabel="t", ylabel="squared distance from the prediction, relative")
    axes.axhline(1.0, color="0.6")
    if examined.drift:
        axes.plot(*examined.drift, marker="o", markersize=4)
    else:
        axes.text(0.5, 0.5, "not measured: the errors come first", ha="center", transform=axes.transAxes)


def _show(axes: Axes, title: str, images: np.ndarray) -> None:
    grid = figures.square_grid(images[:_SHOWN])
    rgb = np.broadcast_to(grid, (*grid.shape[:2], 3)) if grid.shape[-1] == 1 else grid[..., :3]
    axes.imshow(rgb, interpolation="nearest")
    axes.set_title(title)
    axes.axis("off")
