"""Scores against the authors' NumPy numbers, a second implementation, and their definitions."""

import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import scipy.spatial.distance
import scipy.special
from support import golden

from diffusion_tf.data.digits import load_digits
from diffusion_tf.errors import ConfigError, NotFiniteError
from diffusion_tf.evaluation.metrics import (
    Gaussian,
    classifier_score,
    classifier_score_splits,
    frechet_distance,
    frechet_standard_error,
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


@pytest.mark.parametrize("scale", [1e-150, 1.0, 1e150])
def test_frechet_distance_to_itself_is_zero(scale):
    features = scale * GOLDEN["real"].astype(np.float64)
    assert 0 <= frechet_distance(features, features) <= 1e-12 * np.square(features).sum(axis=1).mean()
    assert frechet_distance(np.full([5, 3], scale), np.full([4, 3], scale)) == 0


def digit_pixels():
    """Real digits, some of whose pixels are always black, and blurred ones, in [0, 1]."""
    digits = load_digits()[:1000, ..., 0] / 255.0
    return [flat(images) for images in (digits[:500], scipy.ndimage.gaussian_filter(digits[500:], (0, 0.3, 0.3)))]


@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize("features", ["inception", "pixels"])
def test_frechet_distance_matches_its_formula(features, scale):
    sets = digit_pixels() if features == "pixels" else [GOLDEN["real"].astype(np.float64), GOLDEN["gen"]]
    means, covariances = [x.mean(axis=0) for x in sets], [np.cov(x.T) for x in sets]
    vary = np.diag(covariances[0]) * np.diag(covariances[1]) > 0  # sqrtm takes no singular matrix
    root = scipy.linalg.sqrtm(covariances[0][vary][:, vary] @ covariances[1][vary][:, vary]).real
    expected = np.sum((means[0] - means[1]) ** 2) + np.trace(covariances[0] + covariances[1]) - 2 * np.trace(root)
    real, generated = (scale * x.astype(np.float64) for x in sets)
    assert frechet_distance(real, generated) == pytest.approx(scale**2 * expected, rel=1e-6)


def test_a_gaussian_of_moments_is_the_one_that_was_fitted():
    real, generated = (GOLDEN[name].astype(np.float64) for name in ("real", "gen"))
    gaussian = Gaussian.of_moments(real.mean(axis=0), np.cov(real.T))
    assert frechet_distance(gaussian, generated) == pytest.approx(frechet_distance(real, generated), rel=1e-9)
    with pytest.raises(ConfigError, match="covariance has the eigenvalue -1"):
        Gaussian.of_moments(np.zeros(2), -np.eye(2))


@pytest.mark.parametrize("count", [3, 12, 103])  # for 16 features
def test_the_jackknife_leaves_out_each_block(count):
    rng = np.random.RandomState(0)
    real, generated = rng.standard_normal((50, 16)), 1.5 * rng.standard_normal((count, 16)) + 0.3
    blocks = np.array_split(np.arange(count), min(count, 20))
    distances = [frechet_distance(real, np.delete(generated, block, axis=0)) for block in blocks]
    expected = np.sqrt((len(blocks) - 1) * np.var(distances))
    for scale in (1.0, 1e150):
        error = frechet_standard_error(scale * real, scale * generated)
        assert error == pytest.approx(scale**2 * expected, rel=1e-5)
    assert np.isnan(frechet_standard_error(real, generated[:2]))


def test_the_standard_error_is_that_of_repeated_measurements():
    rng = np.random.RandomState(0)
    real, root = Gaussian.fit(rng.standard_normal((5000, 8))), np.eye(8) + 0.3 * rng.standard_normal((8, 8))
    sets = [rng.standard_normal((400, 8)) @ root + 0.3 for _ in range(100)]
    spread = np.std([frechet_distance(real, features) for features in sets])
    errors = [frechet_standard_error(real, features) for features in sets[:30]]
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(spread, rel=0.25)


def test_features_of_half_precision_are_scored_in_double_precision():
    real, generated = (GOLDEN[name].astype(np.float16) for name in ("real", "gen"))
    wide = real.astype(np.float64), generated.astype(np.float64)
    assert frechet_distance(real, generated) == frechet_distance(*wide)
    assert precision_recall(real, generated) == precision_recall(*wide)


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


def test_classifier_score_is_that_of_certain_classes():
    logits = np.repeat([[0.0, -2e4, -9e4], [-3e38, 0.0, -3e38]], 20, axis=0)  # nobody chooses the third class
    assert classifier_score(logits) == pytest.approx(2.0, rel=1e-12)
    assert classifier_score(np.full([7, 5], -1e300)) == pytest.approx(1.0, rel=1e-12)


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
    radii = np.sort(scipy.spatial.distance.cdist(manifold, manifold), axis=1)[:, k]  # entry 0 is the point itself
    return np.mean((scipy.spatial.distance.cdist(points, manifold) <= radii).any(axis=1))


def test_precision_and_recall_match_their_definition():
    rng = np.random.RandomState(0)
    real, generated = rng.standard_normal((200, 5)), 0.5 * rng.standard_normal((150, 5))
    precision, recall = precision_recall(real, generated)
    assert precision == by_definition(real, generated, 3)
    assert recall == by_definition(generated, real, 3)
    assert precision > 0.9 > 0.6 > recall  # the generated distribution is too narrow


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.uint8])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_copies_are_at_distance_zero(dtype, offset):
    features = (np.random.default_rng(0).standard_normal((40, 64)) * 10 + 50 + offset).astype(dtype)
    copies = np.repeat(features, 5, axis=0)
    assert precision_recall(copies, features) == (1.0, 1.0)
    assert precision_recall(features, copies) == (1.0, 1.0)
    moved = features.astype(np.float64) * (1 + 2.0**-40)
    assert precision_recall(copies, moved)[0] == 0.0  # balls of radius 0 hold nothing but their centers


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("kind", ["grid", "far from 0", "nearly equal", "equal", "clusters", "huge", "tiny"])
def test_precision_and_recall_match_their_definition_in_hard_cases(kind, k):
    rng = np.random.default_rng(1)
    both = rng.standard_normal((100, 20))
    real, generated = {
        "grid": lambda x: np.round(x[:, :6]),  # many equal distances
        "far from 0": lambda x: x + 2.0**30,
        "nearly equal": lambda x: 1.0 + 2.0**-40 * x,
        "equal": np.ones_like,
        "clusters": lambda x: np.tile(np.round(x[:10]), (10, 1)) + 2.0**-35 * x,
        "huge": lambda x: 2.0**700 * x,
        "tiny": lambda x: 2.0**-700 * x,
    }[kind](both).reshape(2, 50, -1)
    scale = {"huge": 2.0**-700, "tiny": 2.0**700}.get(kind, 1.0)  # the definition's squares need it
    scores = precision_recall(real, generated, k=k)
    assert scores[0] == by_definition(scale * real, scale * generated, k)
    assert scores[1] == by_definition(scale * generated, scale * real, k)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("metric", [frechet_distance, kernel_distance, precision_recall])
def test_features_that_are_not_finite_have_no_score(metric, value):
    sound, broken = GOLDEN["real"][:50], GOLDEN["gen"][:50].copy()
    broken[[7, 31], 2] = value
    with pytest.raises(NotFiniteError, match="generated features 7, 31 hold NaN or infinity"):
        metric(sound, broken)
    with pytest.raises(NotFiniteError, match="real features 7, 31 hold NaN or infinity"):
        metric(broken, sound)
    with pytest.raises(NotFiniteError, match="logits features 7, 31 hold NaN or infinity"):
        classifier_score(broken)


@pytest.mark.parametrize("metric", [frechet_distance, kernel_distance])
def test_features_too_large_for_a_score_are_said(metric):
    with pytest.raises(NotFiniteError, match="distance is not finite: the features are too large"):
        metric(1e200 * GOLDEN["real"].astype(np.float64), GOLDEN["gen"])


@pytest.mark.parametrize(
    ("metric", "count", "message"),
    [
        (frechet_distance, 0, "real must hold 2 rows or more, not 0"),
        (frechet_distance, 1, "real must hold 2 rows or more, not 1"),
        (kernel_distance, 1, "real must hold 2 rows or more, not 1"),
        (precision_recall, 3, "real must hold 4 rows or more, not 3"),
        (lambda real, _: classifier_score(real), 0, "logits must hold 1 rows or more, not 0"),
        (lambda real, _: classifier_score_splits(real), 9, "logits must hold 10 rows or more, not 9"),
        (lambda real, generated: frechet_distance(real, generated[:, :9]), 9, "generated must be .N, D. with the same"),
        (lambda real, generated: precision_recall(real, generated, k=0), 9, "k=0 must be greater than 0"),
    ],
)
def test_sets_that_are_too_small_are_refused(metric, count, message):
    with pytest.raises(ConfigError, match=message):
        metric(GOLDEN["real"][:count], GOLDEN["gen"])


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
