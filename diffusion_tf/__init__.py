"""Denoising diffusion probabilistic models (Ho, Jain & Abbeel 2020) in TensorFlow 2 and Keras 3.

    import diffusion_tf as dtf

    run = dtf.train("digits", "runs/digits")  # or dtf.load("runs/digits"), or a diffusers folder
    images = run.sample(16, seed=0)  # uint8 [16, 8, 8, 1]
    bits_per_dim = run.bits_per_dim(images)  # float64 [16]

TensorFlow is imported when a name that needs it is first used.
"""

import glob
import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"


def tpu_attached() -> bool:
    """Whether this machine has the device files of a TPU: /dev/accel0, ... or, for newer TPUs, /dev/vfio/0, ..."""
    return bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))


# TensorFlow reads these variables when it is imported.
if not tpu_attached():
    # tensorflow-tpu searches for a TPU for minutes at its import. With device files elsewhere, set this to 1.
    os.environ.setdefault("TPU_LOAD_LIBRARY", "0")
    # Keep a step's memory for the next step: malloc returns fresh pages, and zeroing them takes 1/7 of a CPU's time.
    os.environ.setdefault("TF_CPU_ALLOCATOR_USE_BFC", "1")
    os.environ.setdefault("TF_CPU_BFC_MEM_LIMIT_IN_MB", str(2**20))  # unlimited in practice; the default is 64 GiB

if TYPE_CHECKING:
    from diffusion_tf.diffusion_utils import GaussianDiffusion
    from diffusion_tf.errors import ConfigError, DivergedError, InputError, PreemptedError
    from diffusion_tf.presets import PRESETS, Preset, get_preset
    from diffusion_tf.recipes import choose_preset
    from diffusion_tf.run import Run, load, train
    from diffusion_tf.solvers import SamplerSettings
    from diffusion_tf.unet import UNet

_MODULES = {
    "ConfigError": "errors",
    "DivergedError": "errors",
    "GaussianDiffusion": "diffusion_utils",
    "InputError": "errors",
    "PRESETS": "presets",
    "PreemptedError": "errors",
    "Preset": "presets",
    "Run": "run",
    "SamplerSettings": "solvers",
    "UNet": "unet",
    "choose_preset": "recipes",
    "get_preset": "presets",
    "load": "run",
    "train": "run",
}

__all__ = [
    "PRESETS",
    "ConfigError",
    "DivergedError",
    "GaussianDiffusion",
    "InputError",
    "PreemptedError",
    "Preset",
    "Run",
    "SamplerSettings",
    "UNet",
    "choose_preset",
    "get_preset",
    "load",
    "train",
]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
