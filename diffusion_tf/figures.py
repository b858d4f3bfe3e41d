"""Pictures as PNG: grids of images with captions, and curves."""

import dataclasses
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

_MARGIN = 8  # pixels round each grid
_CAPTION = 20  # pixels above each grid
_LINE = 64  # grey level between the images of a grid


def image_grid(images: np.ndarray, columns: int) -> np.ndarray:
    """Tiles uint8 [N, H, W, C] row by row, a grey line after each: [rows * (H + 1), columns * (W + 1), C]."""
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    tiles = np.full((rows * columns, height + 1, width + 1, channels), _LINE, np.uint8)
    tiles[:count, :height, :width] = images
    tiles = tiles.reshape(rows, columns, height + 1, width + 1, channels)
    return tiles.transpose(0, 2, 1, 3, 4).reshape(rows * (height + 1), columns * (width + 1), channels)


def square_grid(images: np.ndarray) -> np.ndarray:
    """`image_grid` with as many columns as rows, or one more row."""
    return image_grid(images, max(1, int(len(images) ** 0.5)))


def captioned_grids(grids: dict[str, np.ndarray], *, min_height: int = 600) -> bytes:
    """A PNG of captioned grids side by side, each pixel repeated until the picture is `min_height` pixels high."""
    panels = []
    for caption, grid in grids.items():
        scale = max(1, -(-min_height // grid.shape[0]))
        rgb = np.broadcast_to(grid, (*grid.shape[:2], 3)) if grid.shape[-1] == 1 else grid[..., :3]
        panels.append((caption, Image.fromarray(np.ascontiguousarray(rgb.repeat(scale, 0).repeat(scale, 1)))))

    width = sum(panel.width + 2 * _MARGIN for _, panel in panels)
    height = max(panel.height for _, panel in panels) + _CAPTION + 2 * _MARGIN
    picture = Image.new("RGB", (width, height), "white")
    left = _MARGIN
    for caption, panel in panels:
        ImageDraw.Draw(picture).text((left, _MARGIN), caption, fill="black")
        picture.paste(panel, (left, _MARGIN + _CAPTION))
        left += panel.width + 2 * _MARGIN
    return _png(picture)


@dataclasses.dataclass(frozen=True)
class Curve:
    """One panel: y over x, with its labels; `log_y` for a logarithmic axis."""

    title: str
    xlabel: str
    ylabel: str
    x: np.ndarray
    y: np.ndarray
    log_y: bool = False


def curves(panels: Sequence[Curve]) -> bytes:
    """A PNG of curves side by side."""
    from matplotlib.figure import Figure  # seconds to import, and only curves need it

    figure = Figure(figsize=(5.0 * len(panels), 4.0), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.plot(panel.x, panel.y)
        axes.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel)
        axes.grid(alpha=0.3)
        if panel.log_y:
            axes.set_yscale("log")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()
