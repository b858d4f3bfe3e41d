"""Pretended machines."""

import contextlib
import fnmatch
import glob
import importlib.metadata
from collections.abc import Iterator

import pytest

from diffusion_tf.runtime.strategies import tensorflow_packages


@contextlib.contextmanager
def machine(*, files: str = "", packages: str = "tensorflow") -> Iterator[None]:
    """A machine that has these files, and where these packages provide TensorFlow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(glob, "glob", lambda pattern: fnmatch.filter(files.split(), pattern))
        patch.setattr(importlib.metadata, "packages_distributions", lambda: {"tensorflow": packages.split()})
        tensorflow_packages.cache_clear()
        yield
    tensorflow_packages.cache_clear()
