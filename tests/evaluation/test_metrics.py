"""Scores against the authors' NumPy numbers, a second implementation, and their definitions."""

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial.distance
import scipy.special
from support import golden

from diffusion_tf.data.digits import load_digits
from diffusion_tf.evaluation.metrics import (
    classifier_score,
    classifier_score_splits,
    frechet_distance,
    kernel_distance,
    precision_recall,
)

GOLDEN = golden.load("metrics")


@pytest.mark.parametrize(
    ("real", "generated", "expected"),
    [
        ("real", "gen", "fid"),
        ("gen", "real", "fid_swapped"),
        ("real_small", "gen_small", "fid_small"),  # fewer images than dimensions
        ("real_small", "gen", "fid_small_vs_big"),
    ],
)
def test_frechet_distance_matches_the_authors(real, generated, expected):
    assert frechet_distance(GOLDEN[real], GOLDEN[generated]) == pytest.approx(float(GOLDEN[expected]), rel=1e-4)


def test_frechet_distance_to_itself_is_zero():
    assert abs(frechet_distance(GOLDEN["real"], GOLDEN["real"])) < 1e-8


def test_frechet_distance_matches_its_formula():
    real, generated = GOLDEN["real"].astype(np.float64), GOLDEN["gen"].astype(np.float64)
    root = scipy.linalg.sqrtm(np.cov(real.T) @ np.cov(generated.T)).real
    trace = np.trace(np.cov(real.T) + np.cov(generated.T) - 2 * root)
    expected = np.sum((real.mean(axis=0) - generated.mean(axis=0)) ** 2) + trace
    assert frechet_distance(real, generated) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("logits", "expected"), [("logits", "is"), ("logits_small", "is_small"), ("logits1008", "is_1008")]
)
def test_classifier_score_matches_the_authors(logits, expected):
    assert classifier_score(GOLDEN[logits]) == pytest.approx(float(GOLDEN[expected]), rel=1e-4)


def test_classifier_score_of_splits_matches_its_definition():
    def by_definition(logits):
        log_p = scipy.special.log_softmax(logits.astype(np.float64), axis=1)
        marginal = np.exp(log_p).mean(axis=0)
        return np.exp((np.exp(log_p) * (log_p - np.log(marginal))).sum(axis=1).mean())

    scores = [by_definition(GOLDEN["logits"][i * 50 : (i + 1) * 50]) for i in range(10)]
    mean, std = classifier_score_splits(GOLDEN["logits"])
    assert mean == pytest.approx(np.mean(scores), rel=1e-6) and std == pytest.approx(np.std(scores), rel=1e-5)


def test_kernel_distance_is_the_unbiased_mmd():
    real, generated = GOLDEN["real"].astype(np.float64), GOLDEN["gen"][:400].astype(np.float64)
    kernel = lambda x, y: (x @ y.T / 64 + 1) ** 3
    within = lambda x: (kernel(x, x).sum() - np.trace(kernel(x, x))) / (len(x) * (len(x) - 1))
    expected = within(real) + within(generated) - 2 * kernel(real, generated).mean()
    distance, error = kernel_distance(real, generated)
    assert distance == pytest.approx(expected, rel=1e-9) and np.isnan(error)  # one block
    repeated = np.concatenate([real] * 4)
    _, error = kernel_distance(repeated, generated)
    assert error > 0


def by_definition(manifold, points, k):
    distances = scipy.spatial.distance.cdist(manifold, manifold)
    radii = np.sort(distances, axis=1)[:, k]  # entry 0 is the point itself
    return np.mean([(np.linalg.norm(manifold - point, axis=1) <= radii).any() for point in points])


def test_precision_and_recall_match_their_definition():
    rng = np.random.RandomState(0)
    real, generated = rng.standard_normal((200, 5)), 0.5 * rng.standard_normal((150, 5))
    precision, recall = precision_recall(real, generated)
    assert precision == by_definition(real, generated, 3)
    assert recall == by_definition(generated, real, 3)
    assert precision > 0.9 > 0.6 > recall  # the generated distribution is too narrow


def flat(images):
    return images.reshape(len(images), -1).astype(np.float64)


def test_gaussian_fitted_to_digits_has_low_precision_and_recall():
    real = flat(load_digits())
    rng = np.random.default_rng(0)
    fitted = rng.multivariate_normal(real.mean(axis=0), np.cov(real.T), 1000)
    levels = 255 / 16  # the digits have 17 levels
    fitted = np.round(np.clip(fitted, 0, 255) / levels) * levels
    precision, recall = precision_recall(real, fitted)
    assert abs(precision - 0.16) < 0.03 and abs(recall - 0.49) < 0.03


def test_held_out_digits_have_high_precision_and_recall():
    precision, recall = precision_recall(flat(load_digits("train")), flat(load_digits("test")))
    assert precision > 0.85 and recall > 0.85
