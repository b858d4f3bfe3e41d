"""How close a set of samples is to real images."""

import numpy as np
import sklearn.metrics
import sklearn.neighbors


def precision_recall(real: np.ndarray, generated: np.ndarray, *, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019).

    A set's manifold is the union of balls about its points, each reaching to the point's k-th nearest neighbour in the
    set. Precision is the share of `generated` inside the manifold of `real`, recall that of `real` inside the manifold
    of `generated`.

    Args:
      real: features [N, D].
      generated: features [M, D].
      k: which neighbour a ball reaches to.

    Returns:
      (precision, recall), each in [0, 1].
    """
    return _coverage(real, generated, k), _coverage(generated, real, k)


def _coverage(manifold: np.ndarray, points: np.ndarray, k: int) -> float:
    """The share of `points` inside the manifold."""
    neighbors = sklearn.neighbors.NearestNeighbors(n_neighbors=k).fit(manifold)
    radii = neighbors.kneighbors()[0][:, -1]  # without arguments a point is not its own neighbour
    chunks = sklearn.metrics.pairwise_distances_chunked(points, manifold)
    return float(np.concatenate([(distances <= radii).any(axis=1) for distances in chunks]).mean())


def pixel_features(images: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W, C] as features float64 [N, H * W * C] in pixel levels."""
    return images.reshape(len(images), -1).astype(np.float64)
