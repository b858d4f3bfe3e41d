"""Pictures: grids of images with captions and labels, curves, and animations."""

import dataclasses
import io
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_MARGIN = 8  # pixels around each grid
_CAPTION = 20  # pixels above each grid
_FONT = 13  # font size in pixels
_TILE = 48  # minimum width of a labelled image in pixels
_ANIMATION_HEIGHT = 360  # minimum, in pixels
_LINE = 64  # grey level between the images of a grid


def image_grid(images: np.ndarray, columns: int) -> np.ndarray:
    """Tiles images uint8 [N, H, W, C] row by row, with grey lines: uint8 [rows * (H + 1), columns * (W + 1), C]."""
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    tiles = np.full((rows * columns, height + 1, width + 1, channels), _LINE, np.uint8)
    tiles[:count, :height, :width] = images
    tiles = tiles.reshape(rows, columns, height + 1, width + 1, channels)
    return tiles.transpose(0, 2, 1, 3, 4).reshape(rows * (height + 1), columns * (width + 1), channels)


def square_grid(images: np.ndarray) -> np.ndarray:
    """`image_grid` with about as many columns as rows, and never more columns."""
    return image_grid(images, max(1, int(len(images) ** 0.5)))


def class_grid(images: np.ndarray, labels: np.ndarray, classes: Sequence[str] = ()) -> tuple[np.ndarray, str]:
    """A grid whose rows hold images of one class each, and a line that names the classes from the top.

    Where the classes are too many for the images, it is `square_grid` in the order of the images.

    Args:
      images: uint8 [N, H, W, C].
      labels: the label of each image, int [N]; -1 is none.
      classes: the names of the classes; default: their indices.
    """
    in_order = list(dict.fromkeys(labels.tolist()))
    names = ["no label" if i < 0 else classes[i] if classes else str(i) for i in in_order]
    groups, side = [images[labels == label] for label in in_order], max(1, int(len(images) ** 0.5))
    if len(groups) > 2 * side:
        return square_grid(images), _shortened(f"classes in turn: {', '.join(names)}")
    columns = min(side, max(map(len, groups)))
    rows = -(-max(map(len, groups)) // columns)
    size = rows * columns
    tiles = np.full((len(groups) * size, *images.shape[1:]), _LINE, np.uint8)
    for i, group in enumerate(groups):
        tiles[i * size : i * size + len(group)] = group
    each = "a row" if rows == 1 else f"{rows} rows"
    legend = f"{each} for each class: {', '.join(names)}" if len(names) > 1 else f"class: {names[0]}"
    return image_grid(tiles, columns), _shortened(legend)


def _shortened(line: str) -> str:
    return textwrap.shorten(line, 90, placeholder=" ...")


def captioned_grids(grids: dict[str, np.ndarray], *, min_height: int = 600) -> bytes:
    """A PNG of grids side by side, by caption, enlarged to at least `min_height` pixels by repeating their pixels."""
    panels = []
    for caption, grid in grids.items():
        scale = max(1, -(-min_height // grid.shape[0]))
        panels.append((caption, _enlarged(grid, scale)))

    widths = [max(panel.width, _width(caption)) + 2 * _MARGIN for caption, panel in panels]
    top = _MARGIN + max(_height(caption) for caption in grids)
    picture = Image.new("RGB", (sum(widths), top + max(panel.height for _, panel in panels) + _MARGIN), "white")
    left = _MARGIN
    for (caption, panel), width in zip(panels, widths, strict=True):
        _write(picture, left, caption)
        picture.paste(panel, (left, top))
        left += width
    return _png(picture)


def _width(caption: str) -> int:
    font = ImageFont.load_default(size=_FONT)
    return max(int(font.getlength(line)) + 1 for line in caption.split("\n"))


def _height(caption: str) -> int:
    return _CAPTION * len(caption.split("\n"))


def _write(picture: Image.Image, left: int, caption: str) -> None:
    """Writes the lines of a caption at the top of a picture."""
    font = ImageFont.load_default(size=_FONT)
    for i, line in enumerate(caption.split("\n")):
        ImageDraw.Draw(picture).text((left, _MARGIN + i * _CAPTION), line, fill="black", font=font)


def labelled_grid(
    rows: Sequence[np.ndarray], *, row_labels: Sequence[str], column_labels: Sequence[str], caption: str
) -> bytes:
    """A PNG of images in labelled rows and columns, enlarged by repeating their pixels.

    Args:
      rows: images uint8 [columns, H, W, C], all of one size.
      row_labels: a label for each row.
      column_labels: a label for each column; tiles are at least as wide as the longest.
      caption: lines above the grid.
    """
    height, width = rows[0].shape[1:3]
    font = ImageFont.load_default(size=_FONT)
    label_width = max(int(font.getlength(label)) + _MARGIN for label in column_labels)
    scale = max(1, -(-max(_TILE, label_width) // width))
    tile_height, tile_width = height * scale + 2, width * scale + 2
    left = _MARGIN + max(int(font.getlength(label)) for label in row_labels) + _MARGIN
    top = _MARGIN + _height(caption) + _CAPTION
    right_edge = max(left + len(column_labels) * tile_width, _MARGIN + _width(caption)) + _MARGIN
    picture = Image.new("RGB", (right_edge, top + len(rows) * tile_height + _MARGIN), "white")
    _write(picture, _MARGIN, caption)
    draw = ImageDraw.Draw(picture)
    for column, label in enumerate(column_labels):
        draw.text((left + (column + 0.5) * tile_width, top - 3), label, fill="black", font=font, anchor="ms")
    for row, (images, label) in enumerate(zip(rows, row_labels, strict=True)):
        y = top + row * tile_height
        draw.text((left - _MARGIN, y + tile_height / 2), label, fill="black", font=font, anchor="rm")
        for column, image in enumerate(images):
            picture.paste(_enlarged(image, scale), (left + column * tile_width, y))
    return _png(picture)


def animation(frames: Sequence[np.ndarray], captions: Sequence[str], *, seconds: float) -> bytes:
    """A GIF of pictures uint8 [H, W, C] under captions, of `seconds` in total; the last stays for two seconds more."""
    scale = max(1, -(-_ANIMATION_HEIGHT // frames[0].shape[0]))
    width = max(frames[0].shape[1] * scale, *map(_width, captions)) + 2 * _MARGIN
    top = _MARGIN + max(map(_height, captions))
    pictures = []
    for frame, caption in zip(frames, captions, strict=True):
        picture = Image.new("RGB", (width, top + frame.shape[0] * scale + _MARGIN), "white")
        _write(picture, _MARGIN, caption)
        picture.paste(_enlarged(frame, scale), (_MARGIN, top))
        pictures.append(picture)
    durations = [int(1000 * seconds / len(frames))] * len(frames)
    durations[-1] += 2000
    buffer = io.BytesIO()
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    return buffer.getvalue()


def _enlarged(image: np.ndarray, scale: int) -> Image.Image:
    """An image uint8 [H, W, C] as RGB, enlarged by repeating its pixels."""
    rgb = np.broadcast_to(image, (*image.shape[:2], 3)) if image.shape[-1] == 1 else image[..., :3]
    return Image.fromarray(np.ascontiguousarray(rgb.repeat(scale, 0).repeat(scale, 1)))


@dataclasses.dataclass(frozen=True)
class Curve:
    """A panel of `curves`: y over x.

    Attributes:
      title: title of the panel.
      xlabel: label of the x axis.
      ylabel: label of the y axis.
      x: float [N].
      y: float [N].
      log_y: whether the y axis is logarithmic.
      points: further points (x, y), by their label.
    """

    title: str
    xlabel: str
    ylabel: str
    x: np.ndarray
    y: np.ndarray
    log_y: bool = False
    points: Mapping[str, tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=dict)


def curves(panels: Sequence[Curve], *, caption: str = "") -> bytes:
    """A PNG of curves, side by side, under a caption."""
    from matplotlib.figure import Figure  # takes seconds to import, and only curves need it

    figure = Figure(figsize=(5.0 * len(panels), 4.0), layout="constrained")
    if caption:
        figure.suptitle(caption, fontsize=9)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.plot(panel.x, panel.y)
        axes.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel)
        axes.grid(alpha=0.3)
        for label, (x, y) in panel.points.items():
            axes.plot(x, y, "o", markersize=4, label=label)
        if panel.points:
            axes.legend()
        if panel.log_y:
            axes.set_yscale("log")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()
