"""Scores of samples from their features: Fréchet and kernel distance, classifier score, precision and recall.

With features of Inception, the first three are FID, KID and Inception Score. Everything is float64.
"""

import dataclasses
from typing import Any

import numpy as np
import sklearn.neighbors
import tensorflow as tf

from diffusion_tf.diffusion_utils import check_finite
from diffusion_tf.errors import ConfigError, NotFiniteError
from diffusion_tf.evaluation.neighbors import SPARE, squared_distances
from diffusion_tf.evaluation.tfgan_eval import classifier_metrics

KERNEL_BLOCK = 1024  # the most features in a block of TF-GAN's kernel distance
_JACKKNIFE_BLOCKS = 20
_MIN_LOGIT = -700.0  # below the largest one; a probability of exp(-700) is still a float64
_CHUNK = 2**22  # distances held at once


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """A normal distribution of features.

    Attributes:
      mean: its mean [D], float64.
      root: a root [R, D] of its covariance, root^T root, float64.
    """

    mean: np.ndarray
    root: np.ndarray

    @classmethod
    def fit(cls, features: np.ndarray, name: str = "real") -> "Gaussian":
        """Fits features [N, D], in O(N D^2); the covariance has the divisor N - 1.

        Raises:
          ConfigError: there are fewer than two features.
          NotFiniteError: a feature is not finite.
        """
        (features,) = _float64(least=2, **{name: features})
        features, exponent = _scaled(features)
        mean = features.mean(axis=0)
        root = np.linalg.qr(features - mean, mode="r") / np.sqrt(len(features) - 1)
        return cls(np.ldexp(mean, exponent), np.ldexp(root, exponent))

    @classmethod
    def of_moments(cls, mean: np.ndarray, covariance: np.ndarray, tolerance: float = 0.0) -> "Gaussian":
        """Takes a mean [D] and a symmetric covariance [D, D], in O(D^3).

        Raises:
          ConfigError: an eigenvalue is below -tolerance.
        """
        values, vectors = np.linalg.eigh(np.asarray(covariance, np.float64))
        if values[0] < -tolerance:
            raise ConfigError("covariance", f"has the eigenvalue {values[0]:.3g}")
        return cls(np.asarray(mean, np.float64), np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T)


def frechet_distance(real: np.ndarray | Gaussian, generated: np.ndarray | Gaussian) -> float:
    """Fréchet distance of two Gaussians, or of those that are fitted to features [N, D] and [M, D].

    With a root A of each covariance A^T A, the trace of (C_1 C_2)^(1/2) is the sum of the singular values of A_1 A_2^T.
    TF-GAN takes roots of covariances and leaves eigenvalues below 1e-10 as they are, which differs by 1e-3 for pixels
    in [0, 1].

    Raises:
      ConfigError: a set has fewer than two features, or they differ in D.
      NotFiniteError: a feature, or the distance, is not finite.
    """
    first = real if isinstance(real, Gaussian) else Gaussian.fit(real, "real")
    second = generated if isinstance(generated, Gaussian) else Gaussian.fit(generated, "generated")
    _check_same_size(first.mean, second.mean)
    mean, other, root, other_root, exponent = _scaled(first.mean, second.mean, first.root, second.root)
    cross = np.linalg.svd(root @ other_root.T, compute_uv=False).sum()
    distance = np.square(mean - other).sum() + np.square(root).sum() + np.square(other_root).sum() - 2.0 * cross
    with np.errstate(over="ignore"):
        return _finite_score(np.ldexp(max(0.0, distance), 2 * exponent), "the Fréchet distance")


def frechet_standard_error(real: np.ndarray | Gaussian, generated: np.ndarray) -> float:
    """Standard error of `frechet_distance` that is due to the choice of `generated` [M, D]; `real` counts as exact.

    It is the grouped jackknife (Efron & Tibshirani 1993, chapter 11): of min(M, 20) blocks of features, which must be
    in random order, each is left out once, so it is itself known to one sixth. With M <= D it errs upwards. Takes
    O(M D^2), and 20 times the eigenvalues of a symmetric matrix of size min(M, D). NaN if there are fewer than three
    features.

    Raises:
      ConfigError: a set has fewer than two features, or they differ in D.
      NotFiniteError: a feature is not finite.
    """
    first = real if isinstance(real, Gaussian) else Gaussian.fit(real, "real")
    (generated,) = _float64(generated=generated, least=2)
    _check_same_size(first.mean, generated[0])
    if len(generated) < 3:
        return float("nan")
    generated, mean, root, exponent = _scaled(generated, first.mean, first.root)
    center = generated.mean(axis=0)
    centered, difference = generated - center, center - mean
    # The trace of (C_1 C_2)^(1/2) is that of the root of A_1 C_2 A_1^T, the covariance of features times A_1^T.
    rotated = centered @ root.T
    if len(rotated) < rotated.shape[1]:
        rotated = np.transpose(np.linalg.qr(rotated.T, mode="r"))  # in a basis of their span
    product, squares = rotated.T @ rotated, np.square(centered).sum()
    distances = []
    for rows in np.array_split(np.arange(len(centered)), min(len(centered), _JACKKNIFE_BLOCKS)):
        count = len(centered) - len(rows)
        moved, rotated_mean = (-x[rows].sum(axis=0) / count for x in (centered, rotated))  # the means of the others
        scatter = product - rotated[rows].T @ rotated[rows] - count * np.outer(rotated_mean, rotated_mean)
        cross = np.sqrt(np.maximum(np.linalg.eigvalsh(scatter / (count - 1)), 0.0)).sum()
        trace = (squares - np.square(centered[rows]).sum() - count * np.square(moved).sum()) / (count - 1)
        distances.append(np.square(difference + moved).sum() + trace - 2.0 * cross)
    with np.errstate(over="ignore"):
        return float(np.ldexp(np.std(distances) * np.sqrt(len(distances) - 1), 2 * exponent))


def kernel_distance(real: np.ndarray, generated: np.ndarray) -> tuple[float, float]:
    """Kernel distance (KID) between features [N, D] and [M, D], and its standard error.

    It averages unbiased estimates of blocks of at most 1,024 features. The error is NaN if there is only one block.

    Raises:
      ConfigError: a block has fewer than two features of a set, or the sets differ in D.
      NotFiniteError: a feature, or the distance, is not finite.
    """
    real, generated = _float64(
        real=real, generated=generated, least=2 * max(1, kernel_blocks(len(real), len(generated)))
    )
    logger = tf.get_logger()
    level = logger.level
    logger.setLevel("ERROR")  # TF-GAN calls map_fn with deprecated arguments
    with tf.device("CPU"):
        distance, error = classifier_metrics().kernel_classifier_distance_and_std_from_activations(
            tf.constant(real), tf.constant(generated)
        )
    logger.setLevel(level)
    return _finite_score(distance, "the kernel distance"), float(error)


def kernel_blocks(num_real: int, num_generated: int) -> int:
    """Number of blocks into which the kernel distance splits both sets."""
    return -(-max(num_real, num_generated) // KERNEL_BLOCK)


def classifier_score(logits: np.ndarray) -> float:
    """exp(E[KL(p(y | x) || p(y))]) of logits [N, classes]: the Inception Score, if they are Inception's.

    Raises:
      ConfigError: there are no logits.
      NotFiniteError: a logit is not finite.
    """
    (logits,) = _float64(logits=logits, least=1)
    # A class of probability 0 for all images would give 0 (log 0 - log 0).
    with np.errstate(over="ignore"):
        relative = np.maximum(logits - logits.max(axis=1, keepdims=True), _MIN_LOGIT)
    with tf.device("CPU"):
        score = classifier_metrics().classifier_score_from_logits(tf.constant(relative))
    return _finite_score(score, "the classifier score")


def classifier_score_splits(logits: np.ndarray, splits: int = 10) -> tuple[float, float]:
    """Mean and standard deviation of `classifier_score` over `splits` equal splits of logits [N, classes].

    Raises:
      ConfigError: there are fewer logits than splits.
      NotFiniteError: a logit is not finite.
    """
    (logits,) = _float64(logits=logits, least=splits)
    scores = [classifier_score(split) for split in np.array_split(logits, splits)]
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(real: np.ndarray, generated: np.ndarray, *, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019).

    The manifold of a set is the union of closed balls around its points; each ball reaches to the point's k-th nearest
    neighbour in the set, so copies of one point are neighbours at distance 0. Precision is the share of `generated`
    inside the manifold of `real`, and recall the share of `real` inside the manifold of `generated`. Distances take
    O(N^2 + N M) time. Those that rounding could move across a ball's surface are computed again by differences, which
    are exactly 0 for equal points and the same in both directions.

    Args:
      real: features [N, D].
      generated: features [M, D].
      k: the neighbour to which a ball reaches.

    Returns:
      (precision, recall), each in [0, 1].

    Raises:
      ConfigError: a set has no k-th neighbours, or the sets differ in D.
      NotFiniteError: a feature is not finite.
    """
    if k < 1:
        raise ConfigError("k", f"={k} must be greater than 0")
    real, generated = _float64(real=real, generated=generated, least=k + 1)
    real, generated, _ = _scaled(real, generated)
    return _coverage(real, generated, k), _coverage(generated, real, k)


def _coverage(manifold: np.ndarray, points: np.ndarray, k: int) -> float:
    """The share of `points` [M, D] inside the manifold of [N, D]."""
    center = manifold.mean(axis=0)
    centered = manifold - center
    squared_radii = _squared_radii(manifold, centered, k)
    norms = np.square(centered).sum(axis=1)
    # Of |x|^2 + |y|^2 - 2 <x, y>, relative to |x|^2 + |y|^2: each of D products and sums rounds by at most half of it.
    rounding = 2.0 * (points.shape[1] + 4) * np.finfo(np.float64).eps
    num_inside, stride = 0, max(1, _CHUNK // len(manifold))
    for first in range(0, len(points), stride):
        chunk = points[first : first + stride]
        centered_chunk = chunk - center
        scale = np.square(centered_chunk).sum(axis=1)[:, None] + norms
        beyond = scale - 2.0 * centered_chunk @ centered.T - squared_radii
        scale *= rounding
        inside = (beyond < -scale).any(axis=1)
        for i in np.flatnonzero(~inside):
            near = np.flatnonzero(beyond[i] <= scale[i])
            inside[i] = (squared_distances(chunk[i], manifold[near]) <= squared_radii[near]).any()
        num_inside += inside.sum()
    return float(num_inside / len(points))


def _squared_radii(manifold: np.ndarray, centered: np.ndarray, k: int) -> np.ndarray:
    """Squared distance of each point of [N, D] to its k-th nearest neighbour [N]; `centered` are the points, moved."""
    search = sklearn.neighbors.NearestNeighbors(n_neighbors=min(k + SPARE, len(manifold) - 1)).fit(centered)
    neighbors = search.kneighbors(return_distance=False)  # does not count a point as its own neighbour
    to_neighbors = (squared_distances(point, manifold[near]) for point, near in zip(manifold, neighbors, strict=True))
    return np.array([np.sort(squared)[k - 1] for squared in to_neighbors])


def _float64(*, least: int, **sets: np.ndarray) -> list[np.ndarray]:
    """Features [N, D] by their names, as float64.

    Raises:
      ConfigError: a set has fewer than `least` features, or the sets differ in D.
      NotFiniteError: a feature is not finite.
    """
    arrays = [np.asarray(features, np.float64) for features in sets.values()]
    for name, features in zip(sets, arrays, strict=True):
        if features.ndim != 2 or features.shape[1:] != arrays[0].shape[1:] or not features.shape[1]:
            raise ConfigError(name, f"must be [N, D] with the same D > 0, not {list(features.shape)}")
        if len(features) < least:
            raise ConfigError(name, f"must hold {least} rows or more, not {len(features)}")
        check_finite(features, f"{name} features")
    return arrays


def _check_same_size(real: np.ndarray, generated: np.ndarray) -> None:
    if real.shape != generated.shape:
        raise ConfigError(
            "generated", f"must be [N, D] with the same D > 0, not D = {generated.size} against {real.size}"
        )


def _scaled(*arrays: np.ndarray) -> tuple[Any, ...]:
    """The arrays divided by 2^e, exactly, so that all lie in [-1, 1], and e: squares of others could leave float64."""
    exponent = np.frexp(max(np.abs(array).max(initial=0.0) for array in arrays))[1]
    return *(np.ldexp(array, -exponent) for array in arrays), exponent


def _finite_score(score: float | tf.Tensor, name: str) -> float:
    """A score as a float; raises NotFiniteError if the features were too large for it."""
    if not np.isfinite(score):
        raise NotFiniteError(f"{name} is not finite: the features are too large for float64")
    return float(score)
