"""diffusion_tf: denoising diffusion probabilistic models in TensorFlow 2 and Keras 3."""

import pathlib

from setuptools import setup

ROOT = pathlib.Path(__file__).parent

setup(
    name="diffusion_tf",
    version="0.1.0",
    description="Denoising diffusion probabilistic models (Ho, Jain & Abbeel 2020) in TensorFlow 2 and Keras 3",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11,<3.13",
    packages=["diffusion_tf", "experiments"],
    install_requires=[
        "absl-py>=2.3",
        "importlib_resources",  # tensorflow-datasets imports it without naming it
        "keras==3.15.*",
        "numpy>=2.0",
        "pillow>=11",  # PNG grids
        "safetensors>=0.5",  # checkpoints that are read without running code
        "scikit-learn>=1.6",  # the digits; nearest neighbours
        "setuptools<81",  # tensorflow-hub and tensorboard import pkg_resources
        "tensorflow==2.20.*",
        "tensorflow-datasets==4.9.10",
        "tensorflow-gan==2.1.0",
        "tf-keras==2.20.*",  # tensorflow-hub brings it, and a newer one would bring another tensorflow
        "tqdm>=4.66",  # progress bars
    ],
    extras_require={
        "gcs": ["tensorflow[gcs-filesystem]==2.20.*"],  # gs:// paths
        "gpu": ["tensorflow[and-cuda]==2.20.*"],
        # Overwrites tensorflow's files: install it alone and last, with --no-deps (see README).
        "tpu": ["libtpu==0.0.21", "tensorflow-tpu[gcs-filesystem]==2.20.0"],
        "dev": ["mypy>=1.18", "pytest>=8", "ruff>=0.13", "scipy>=1.15"],
    },
)
