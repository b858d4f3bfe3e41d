"""The programs. In a checkout `python -m experiments NAME --help`, installed `diffusion-tf NAME --help`."""

import gc
import os
import sys

import diffusion_tf  # noqa: F401 (sets the environment that TensorFlow's import reads)

from . import _process

if os.path.basename(sys.argv[0]) in ("-m", "diffusion-tf"):  # a program starts; elsewhere this is an import
    _process.prepare()
# Before TensorFlow is imported: its C++ side reports every optional library that a machine lacks.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Scanning the objects of imported modules for garbage takes a second. `_program` turns collection on again.
gc.disable()
