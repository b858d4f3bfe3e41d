"""Figures of the paper, and a page about a run.

The names here need no TensorFlow: flags are checked before it is imported.
"""

FIGURES = ("samples", "progressive", "shared_latents", "interpolation", "coarse_to_fine", "neighbors", "animation")
SCORED_FIGURES = ("progressive_quality",)  # which need a feature network
