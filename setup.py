"""diffusion_tf: denoising diffusion probabilistic models in TensorFlow 2 and Keras 3."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
# For scores of samples. tf-keras depends on tensorflow: docs/tpu.md says how to install this group on a TPU VM.
EVALUATION = ["tensorflow-gan==2.1.0", "tensorflow-hub==0.16.*", "tf-keras==2.20.*"]

setup(
    name="diffusion_tf",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "diffusion_tf" / "__init__.py").read_text(encoding="utf-8"))[1],
    description="Denoising diffusion probabilistic models (Ho, Jain & Abbeel 2020) in TensorFlow 2 and Keras 3",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11,<3.13",
    # The programs lie at the top of a checkout. Installed, they are a subpackage: the name `experiments` stays free.
    packages=[*find_packages(include=["diffusion_tf", "diffusion_tf.*"]), "diffusion_tf.experiments"],
    package_dir={"diffusion_tf.experiments": "experiments"},
    package_data={"diffusion_tf": ["py.typed", "pretrained/**/*"]},
    entry_points={"console_scripts": ["diffusion-tf = diffusion_tf.experiments.__main__:main"]},
    # An extra chooses TensorFlow: the build for TPUs overwrites the files of the other one.
    install_requires=[
        "absl-py>=2.3,<3",
        "constriction>=0.5,<0.6",  # entropy coding of compressed images
        "google-crc32c>=1.5,<2",  # TFRecords without TensorFlow; in Python a CRC takes longer than a training step
        "importlib_resources",  # tensorflow-datasets imports it without requiring it
        "keras==3.15.*",
        "matplotlib>=3.10,<4",  # pictures of curves
        "ml_dtypes>=0.4",  # bfloat16 in NumPy
        "msgspec>=0.19,<1",  # types of the values in JSON files
        "numpy>=2,<3",
        "pillow>=11,<14",  # PNG grids
        "safetensors>=0.5,<1",  # checkpoints, read without running code
        "protobuf>=5",  # the records of TFRecords without TensorFlow
        "scikit-learn>=1.6,<2",  # the digits, nearest neighbours
        "scipy>=1.15",  # tests of the distances to training pictures
        "setuptools<81",  # tensorboard imports pkg_resources
        "tensorflow-datasets==4.9.10",
        "tqdm>=4.66,<5",  # progress bars
    ],
    extras_require={  # names with hyphens: the pip of Python 3.11 finds no others
        "cpu": ["tensorflow==2.20.*", *EVALUATION],
        "gpu": ["tensorflow[and-cuda]==2.20.*", *EVALUATION],
        # The last release of TensorFlow for TPUs, of August 2025; TensorFlow itself goes on, and later ones have none.
        # It also admits newer versions of libtpu, which lack functions that it calls.
        "tpu": ["libtpu==0.0.21", "tensorflow-tpu==2.20.0"],
        # For train_exported, without TensorFlow: the way that lasts on a TPU.
        "jax-gpu": ["jax[cuda12]>=0.7,<0.11"],
        "jax-tpu": ["jax[tpu]>=0.7,<0.11"],
        "lsun": ["lmdb>=1.6,<4"],  # LSUN's own format
        # The compiler for TPUs, on any machine but a TPU VM. Exact versions: JAX has no public function for this.
        "tpu-report": ["jax==0.10.2", "libtpu==0.0.52"],
        "dev": [
            "hypothesis>=6.100,<7",
            "jax==0.10.2",
            "libtpu==0.0.52",
            "lmdb>=1.6,<4",
            "mypy>=1.18",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.13",
        ],
    },
)
