"""Precision and recall against their definition."""

import numpy as np
import scipy.spatial.distance

from diffusion_tf.datasets import load_digits
from diffusion_tf.metrics import pixel_features, precision_recall


def by_definition(manifold, points, k):
    distances = scipy.spatial.distance.cdist(manifold, manifold)
    radii = np.sort(distances, axis=1)[:, k]  # entry 0 is the point itself
    return np.mean([(np.linalg.norm(manifold - point, axis=1) <= radii).any() for point in points])


def test_precision_and_recall_are_their_definition():
    rng = np.random.RandomState(0)
    real, generated = rng.standard_normal((200, 5)), 0.5 * rng.standard_normal((150, 5))
    precision, recall = precision_recall(real, generated)
    assert precision == by_definition(real, generated, 3)
    assert recall == by_definition(generated, real, 3)
    assert precision > 0.9 > 0.6 > recall  # too narrow a distribution


def test_a_gaussian_fitted_to_the_digits_scores_poorly():
    real = pixel_features(load_digits())
    rng = np.random.default_rng(0)
    fitted = rng.multivariate_normal(real.mean(axis=0), np.cov(real.T), 1000)
    levels = 255 / 16  # the digits have 17 levels
    fitted = np.round(np.clip(fitted, 0, 255) / levels) * levels
    precision, recall = precision_recall(real, fitted)
    assert abs(precision - 0.16) < 0.03 and abs(recall - 0.49) < 0.03


def test_held_out_digits_score_well():
    precision, recall = precision_recall(pixel_features(load_digits("train")), pixel_features(load_digits("test")))
    assert precision > 0.85 and recall > 0.85
