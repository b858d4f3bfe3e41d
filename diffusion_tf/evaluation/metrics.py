"""Scores of samples from their features: Fréchet and kernel distance, classifier score, precision and recall.

With features of Inception, the first three are FID, KID and Inception Score, computed by TF-GAN. Everything is float64.
"""

import numpy as np
import sklearn.metrics
import sklearn.neighbors
import tensorflow as tf

from diffusion_tf.evaluation.tfgan_eval import classifier_metrics


def frechet_distance(real: np.ndarray, generated: np.ndarray) -> float:
    """Fréchet distance of Gaussians fitted to features [N, D] and [M, D]; covariances have the divisor N - 1."""
    with tf.device("CPU"):
        distance = classifier_metrics().frechet_classifier_distance_from_activations(
            _float64(real), _float64(generated)
        )
    return float(distance)


def kernel_distance(real: np.ndarray, generated: np.ndarray) -> tuple[float, float]:
    """Kernel distance (KID) between features [N, D] and [M, D], and its standard error.

    It averages unbiased estimates of blocks of at most 1,024 features. The error is NaN if there is only one block.
    """
    logger = tf.get_logger()
    level = logger.level
    logger.setLevel("ERROR")  # TF-GAN calls map_fn with deprecated arguments
    with tf.device("CPU"):
        distance, error = classifier_metrics().kernel_classifier_distance_and_std_from_activations(
            _float64(real), _float64(generated)
        )
    logger.setLevel(level)
    return float(distance), float(error)


def classifier_score(logits: np.ndarray) -> float:
    """exp(E[KL(p(y | x) || p(y))]) of logits [N, classes]: the Inception Score, if they are Inception's."""
    with tf.device("CPU"):
        return float(classifier_metrics().classifier_score_from_logits(_float64(logits)))


def classifier_score_splits(logits: np.ndarray, splits: int = 10) -> tuple[float, float]:
    """Mean and standard deviation of `classifier_score` over `splits` equal splits of logits [N, classes]."""
    scores = [classifier_score(split) for split in np.array_split(logits, splits)]
    return float(np.mean(scores)), float(np.std(scores))


def _float64(array: np.ndarray) -> tf.Tensor:
    return tf.constant(array, tf.float64)


def precision_recall(real: np.ndarray, generated: np.ndarray, *, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019).

    The manifold of a set is the union of balls around its points; each ball reaches to the point's k-th nearest
    neighbour in the set. Precision is the share of `generated` inside the manifold of `real`, and recall the share of
    `real` inside the manifold of `generated`. Distances take O(N^2 + N M) time.

    Args:
      real: features [N, D].
      generated: features [M, D].
      k: the neighbour to which a ball reaches.

    Returns:
      (precision, recall), each in [0, 1].
    """
    return _coverage(real, generated, k), _coverage(generated, real, k)


def _coverage(manifold: np.ndarray, points: np.ndarray, k: int) -> float:
    """The share of `points` inside the manifold."""
    neighbors = sklearn.neighbors.NearestNeighbors(n_neighbors=k).fit(manifold)
    radii = neighbors.kneighbors()[0][:, -1]  # kneighbors() does not count a point as its own neighbour
    chunks = sklearn.metrics.pairwise_distances_chunked(points, manifold)
    return float(np.concatenate([(distances <= radii).any(axis=1) for distances in chunks]).mean())
