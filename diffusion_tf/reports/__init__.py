"""Figures of the paper, and a page about a run.

The names here need no TensorFlow: flags are checked before it is imported.
"""

FIGURES = ("samples", "progressive", "shared_latents", "interpolation", "coarse_to_fine", "neighbors", "animation")
SCORED_FIGURES = ("progressive_quality",)  # which need a feature network


def file_name(figure: str) -> str:
    """The name of a figure's file: GIF for the animation, else PNG."""
    return f"{figure}.gif" if figure == "animation" else f"{figure}.png"
