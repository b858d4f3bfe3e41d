"""Imports TF-GAN's classifier metrics without the rest of TF-GAN.

`import tensorflow_gan` fails since TensorFlow 2.16: its last release, 2.1.0, uses tf.estimator, which TensorFlow has
removed. The module of the metrics does not use it, but the `__init__` of its parent packages would fail. So this
registers empty packages in their place.
"""

import functools
import importlib
import importlib.util
import os
import sys
import types

from diffusion_tf.errors import InputError

_PACKAGES = ("tensorflow_gan", "tensorflow_gan.python", "tensorflow_gan.python.eval")


@functools.cache
def classifier_metrics() -> types.ModuleType:
    """The module `tensorflow_gan.python.eval.classifier_metrics`.

    Raises:
      InputError: TF-GAN or TensorFlow Probability, which it needs, is not installed.
    """
    spec = importlib.util.find_spec("tensorflow_gan")
    if spec is None or spec.origin is None or importlib.util.find_spec("tensorflow_probability") is None:
        raise InputError(
            "scores need TF-GAN and TensorFlow Probability: install the extra `cpu` or `gpu`, or on a TPU VM run"
            " tpu_scripts/install.sh"
        )
    root = os.path.dirname(os.path.dirname(spec.origin))
    for name in _PACKAGES:
        package = types.ModuleType(name)
        package.__path__ = [os.path.join(root, *name.split("."))]
        sys.modules[name] = package
    return importlib.import_module(f"{_PACKAGES[-1]}.classifier_metrics")
