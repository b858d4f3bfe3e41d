"""Nearest neighbours of samples among the training images (Figs. 12, 15)."""

from collections.abc import Iterable

import numpy as np
import sklearn.metrics

from diffusion_tf.diffusion_utils import check_finite
from diffusion_tf.errors import ConfigError

SPARE = 8  # candidates beyond k, since distances by products may order nearly equal ones wrongly


def nearest_neighbors(
    queries: np.ndarray, chunks: Iterable[np.ndarray], num_neighbors: int
) -> tuple[np.ndarray, np.ndarray]:
    """Exact nearest neighbours by Euclidean distance, in the memory of one chunk of candidates.

    Products of the features choose the candidates, and differences give their distances: that of a copy is exactly 0.

    Args:
      queries: features [M, D].
      chunks: features [n, D] of all candidates, in order.
      num_neighbors: k, at most the number of candidates.

    Returns:
      Indices of the candidates, int64 [M, k], and distances float64 [M, k], nearest first.

    Raises:
      ConfigError: there are fewer than k candidates.
      NotFiniteError: a feature is not finite.
    """
    queries = np.asarray(queries, np.float64)
    check_finite(queries, "features of samples")
    indices = np.zeros([len(queries), 0], np.int64)
    distances = np.zeros([len(queries), 0])
    first = 0
    for chunk in chunks:
        chunk = np.asarray(chunk, np.float64)
        check_finite(chunk, "features of images", first=first)
        by_products = sklearn.metrics.pairwise_distances(queries, chunk)
        near = np.sort(np.argsort(by_products, axis=1, kind="stable")[:, : num_neighbors + SPARE], axis=1)
        squared = [squared_distances(query, chunk[row]) for query, row in zip(queries, near, strict=True)]
        distances = np.concatenate([distances, np.sqrt(squared)], axis=1)
        indices = np.concatenate([indices, first + near], axis=1)
        order = np.argsort(distances, axis=1, kind="stable")[:, :num_neighbors]
        indices = np.take_along_axis(indices, order, axis=1)
        distances = np.take_along_axis(distances, order, axis=1)
        first += len(chunk)
    if first < num_neighbors:
        raise ConfigError("num_neighbors", f"={num_neighbors} is more than the {first} candidates")
    return indices, distances


def squared_distances(point: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances of a point [D] to others [N, D], by differences: exactly 0 for equal points."""
    return np.square(others - point).sum(axis=1)
