"""Nearest neighbours of samples among the training images (Figs. 12, 15)."""

from collections.abc import Iterable

import numpy as np
import sklearn.metrics


def nearest_neighbors(
    queries: np.ndarray, chunks: Iterable[np.ndarray], num_neighbors: int
) -> tuple[np.ndarray, np.ndarray]:
    """Exact nearest neighbours by Euclidean distance, in the memory of one chunk of candidates.

    Args:
      queries: features [M, D].
      chunks: features [n, D] of all candidates, in order.
      num_neighbors: k, at most the number of candidates.

    Returns:
      Indices of the candidates, int64 [M, k], and distances float64 [M, k], nearest first.
    """
    indices = np.zeros([len(queries), 0], np.int64)
    distances = np.zeros([len(queries), 0])
    first = 0
    for chunk in chunks:
        here = sklearn.metrics.pairwise_distances(queries.astype(np.float64), chunk.astype(np.float64))
        distances = np.concatenate([distances, here], axis=1)
        places = np.broadcast_to(np.arange(first, first + len(chunk)), here.shape)
        indices = np.concatenate([indices, places], axis=1)
        order = np.argsort(distances, axis=1, kind="stable")[:, :num_neighbors]
        indices = np.take_along_axis(indices, order, axis=1)
        distances = np.take_along_axis(distances, order, axis=1)
        first += len(chunk)
    return indices, distances
