"""The programs: `python -m experiments.NAME --help`."""

import gc
import os

import diffusion_tf  # noqa: F401  (says what TensorFlow's import reads)

# Before TensorFlow is imported: its C++ side reports every optional library that a machine lacks.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# To look for garbage among the modules' objects, which all stay, takes a second of TensorFlow's import and of tracing.
gc.disable()
import tensorflow  # noqa: F401

gc.freeze()
gc.enable()
