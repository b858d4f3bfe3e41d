"""The paper's figures as files: names, captions, JSON beside each picture, and a page that shows them all."""

import html
import os
from collections.abc import Mapping

from diffusion_tf.reports.paper_figures import PaperFigure
from diffusion_tf.reports.run_record import read_run
from diffusion_tf.storage.files import write_file, write_json
from diffusion_tf.storage.workdir import Workdir


def file_name(figure: str) -> str:
    """The name of a figure's file: GIF for the animation, else PNG."""
    return f"{figure}.gif" if figure == "animation" else f"{figure}.png"


def samples_caption(workdir: Workdir, step: int) -> str:
    """Preset and step, and the scores and bits/dim that were measured at this step."""
    lines = [line for line in workdir.read_evaluations() if line["step"] == step]
    scores = [f"{name} {line[name]:.3g}" for line in lines for name in ("fid", "frechet_digits") if name in line]
    bits = [
        f"{result['bits_per_dim']:.2f} bits/dim ({split})"
        for split, result in read_run(workdir).likelihood.items()
        if result["step"] == step
    ]
    return ", ".join([workdir.read_preset().dataset, f"step {step:,}", *scores[-1:], *bits])


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
