"""Denoising diffusion probabilistic models (Ho, Jain & Abbeel 2020) in TensorFlow 2 and Keras 3."""

__version__ = "0.1.0"
