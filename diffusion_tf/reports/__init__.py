"""Figures of the paper, and a page about a run."""
