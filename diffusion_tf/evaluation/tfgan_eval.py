"""TF-GAN's classifier metrics, without the rest of TF-GAN.

tensorflow-gan 2.1.0 is the last release, and `import tensorflow_gan` fails since TensorFlow 2.16: it reaches for
tf.estimator, which is gone. The module of the metrics does not. So the packages above it are entered as bare packages,
whose `__init__` never runs.
"""

import functools
import importlib
import importlib.util
import os
import sys
import types

from diffusion_tf.errors import InputError

_PACKAGES = ("tensorflow_gan", "tensorflow_gan.python", "tensorflow_gan.python.eval")


def is_installed() -> bool:
    """Whether TF-GAN and TensorFlow Probability are installed."""
    return all(importlib.util.find_spec(name) for name in ("tensorflow_gan", "tensorflow_probability"))


@functools.cache
def classifier_metrics() -> types.ModuleType:
    """The module `tensorflow_gan.python.eval.classifier_metrics`.

    Raises:
      InputError: TF-GAN, or TensorFlow Probability that it needs, is not installed.
    """
    spec = importlib.util.find_spec("tensorflow_gan")
    if spec is None or spec.origin is None or not is_installed():
        raise InputError(
            "scores need TF-GAN and TensorFlow Probability: pip install '.[inception]', or on a TPU VM what the README"
            " says under `Where it runs`"
        )
    root = os.path.dirname(os.path.dirname(spec.origin))
    for name in _PACKAGES:
        package = types.ModuleType(name)
        package.__path__ = [os.path.join(root, *name.split("."))]
        sys.modules[name] = package
    return importlib.import_module(f"{_PACKAGES[-1]}.classifier_metrics")
