"""Published statistics of real images, with which FID can be compared, and what such a comparison assumes."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_tf.errors import ConfigError, DamagedFileError, InputError
from diffusion_tf.evaluation.feature_networks import FeatureNetwork
from diffusion_tf.evaluation.metrics import Gaussian
from diffusion_tf.storage import gfile
from diffusion_tf.storage.files import first_line
from diffusion_tf.storage.npz_files import describe_arrays, digest_arrays, read_npz

_NAMES = ("mu", "sigma")
_ROUNDING = 1e-4  # relative to the largest entry: float32 covariances of dependent features
_PUBLISHED_SAMPLES = 50_000
_PUBLISHED_REAL = {"cifar10": 50_000}  # the training set
_TF1_RESIZE = "TF1"


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Mean and covariance of the features of real images.

    Attributes:
      description: JSON values that identify the file.
      gaussian: the normal distribution with these moments.
    """

    description: dict[str, Any]
    gaussian: Gaussian


def read_statistics(path: str) -> Statistics | None:
    """Reads the `mu` [D] and `sigma` [D, D] of an .npz file, as pytorch-fid, EDM and guided diffusion distribute them.

    Other arrays, such as the images and `mu_s` of guided diffusion's files, are not read.

    Returns:
      The statistics; None if the file holds neither of both arrays.

    Raises:
      InputError: the file cannot be read.
      DamagedFileError: the file is a pickle, or holds no moments of a distribution.
    """
    _refuse_pickle(path)
    arrays = read_npz(path, names=_NAMES)
    if not arrays:
        return None
    mean, covariance = arrays.get("mu", np.empty(0)), arrays.get("sigma", np.empty(0))
    floats = all(array.dtype in (np.float32, np.float64) for array in (mean, covariance))
    if not floats or not mean.size or mean.ndim != 1 or covariance.shape != mean.shape * 2:
        raise DamagedFileError(
            f"{path} holds {describe_arrays(arrays)}, not mu (D,) and sigma (D, D), float32 or float64"
        )
    if not np.isfinite(mean).all() or not np.isfinite(covariance).all():
        raise DamagedFileError(f"{path} is damaged: its mu or sigma holds NaN or infinity")
    covariance = covariance.astype(np.float64)
    tolerance = _ROUNDING * np.abs(covariance).max()
    if np.abs(covariance - covariance.T).max() > tolerance:
        raise DamagedFileError(f"{path} is damaged: its sigma is not symmetric")
    try:
        gaussian = Gaussian.of_moments(mean, covariance, tolerance)
    except ConfigError as error:
        raise DamagedFileError(f"{path} is damaged: its sigma is no covariance ({error})") from error
    description = {"file": os.path.basename(path), "file_sha256": digest_arrays(arrays)}
    return Statistics(description, gaussian)


def _refuse_pickle(path: str) -> None:
    try:
        with gfile.open_binary(os.path.expanduser(path), "rb") as file:
            is_pickle = file.read(1) == b"\x80"
    except gfile.file_errors() as error:
        raise InputError(f"cannot read {path} ({first_line(error)})") from error
    if is_pickle:
        raise DamagedFileError(
            f"{path} is a pickle, which may run code: give its arrays mu and sigma as an .npz file (numpy.savez)"
        )


def check_size(statistics: Statistics, network: FeatureNetwork, image_shape: tuple[int, int, int]) -> None:
    """Checks, before the work, that statistics are those of as many features as `network` computes.

    Raises:
      InputError: they are not.
    """
    given = len(statistics.gaussian.mean)
    computed = network.apply(tf.zeros([1, *image_shape]))["features"].shape[-1]
    if given != computed:
        advice = "give statistics of the same network and layer"
        if given == 2048 and network.name != "inception":
            advice = "those are Inception's: give `features=inception`"
        raise InputError(
            f"{statistics.description['file']} holds statistics of {given:,} features, and {network.name} computes"
            f" {computed:,}: {advice}"
        )


def convention_note(reference: Mapping[str, Any], num_samples: int) -> str:
    """How a FID was computed otherwise than published ones; empty if it was not.

    They take 50,000 samples, and those of CIFAR-10 its training set. The paper, EDM and guided diffusion resize as TF1
    does, pytorch-fid as PyTorch does.

    Args:
      reference: what `FeatureExtractor.describe` says of the real images.
      num_samples: number of samples.
    """
    reasons = []
    if num_samples != _PUBLISHED_SAMPLES:
        effect = "fewer give a higher distance" if num_samples < _PUBLISHED_SAMPLES else "more give a lower one"
        reasons.append(f"{num_samples:,} samples, where published values take {_PUBLISHED_SAMPLES:,} ({effect})")
    resize = reference["resize"]
    if "split" in reference:
        count = _PUBLISHED_REAL.get(reference["dataset"], reference["num_images"])
        if reference["split"] != "train":
            reasons.append(f"real images of the {reference['split']} split, where published values take train")
        elif reference["num_images"] != count:
            reasons.append(f"{reference['num_images']:,} real images, where published values take {count:,}")
    if "num_images" not in reference:
        reasons.append(
            f"{reference['file']} does not say of which images, how many, and with which resize it was made; this took"
            f" {resize}, and the program that made it must have too"
        )
    elif not resize.startswith(_TF1_RESIZE):
        reasons.append(f"resized by {resize}, where the paper resizes as TF1 does")
    return "; ".join(reasons)
