"""Random weights of FID's Inception by their PyTorch names, for tests without the published ones."""

import math
import zlib

import numpy as np


def random_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A weight as a function of its name: kernels keep the variance of activations, batch norms are plausible."""
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    if len(shape) > 1:
        array = rng.standard_normal(shape) * math.sqrt(2 / math.prod(shape[1:]))
    elif name.endswith(("bn.weight", "running_var")):
        array = rng.uniform(0.5, 1.5, shape)
    else:
        array = 0.1 * rng.standard_normal(shape)
    return array.astype(np.float32)
