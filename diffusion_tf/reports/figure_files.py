"""The paper's figures as files: names, captions, JSON beside each picture, and a page that shows them all."""

import html
import os
from collections.abc import Mapping

from diffusion_tf.reports import file_name
from diffusion_tf.reports.paper_figures import PaperFigure
from diffusion_tf.storage.files import write_file
from diffusion_tf.storage.json_files import write_json


def write_figure(path: str, figure: str, step: int, made: PaperFigure) -> None:
    """Writes a picture, and its numbers as JSON beside it.

    Args:
      path: of the picture.
      figure: name of the figure.
      step: step of the checkpoint.
      made: the figure.
    """
    write_file(path, made.picture)
    write_json(f"{os.path.splitext(path)[0]}.json", {"figure": figure, "step": step, **made.numbers})


def to_page(title: str, figures: Mapping[str, PaperFigure]) -> bytes:
    """An HTML page that shows the pictures in its folder, each with its explanation."""
    page = [f"<title>{title}</title><h1>{title}</h1>"]
    for figure, made in figures.items():
        image = f'<img src="{file_name(figure)}" alt="{figure}">'
        page.append(f"<h2>{figure}</h2><p>{html.escape(made.explanation)}</p>{image}")
    return "\n".join(page).encode()
