"""The verdict about copies, on samples that are copies and on samples that are not."""

import numpy as np
import pytest
import scipy.stats

from diffusion_tf.data.arrays import array_source
from diffusion_tf.data.digits import load_digits
from diffusion_tf.evaluation.copying import compare, sentence, training_neighbors

DIGITS = np.random.RandomState(0).permutation(load_digits())
TRAIN, HELD_OUT, FRESH = np.split(DIGITS[:1700], [900, 1300])


def noisy(images):
    """Images whose levels differ by at most 1."""
    changed = images.astype(int) + np.random.RandomState(1).randint(-1, 2, images.shape)
    return np.clip(changed, 0, 255).astype(np.uint8)


def neighbors_of(images, train=TRAIN, mirrored=True):
    flat = lambda images: images.reshape(len(images), -1)
    return training_neighbors(images, array_source(train), flat, mirrored=mirrored, label="images")


@pytest.fixture(scope="module")
def held_out():
    return neighbors_of(HELD_OUT).distances


SAMPLES = {
    "copies": TRAIN[:400],
    "copies with noise": noisy(TRAIN[:400]),
    "mirrored copies": TRAIN[:400, :, ::-1],
    "a few copies": np.concatenate([noisy(TRAIN[:30]), FRESH[30:]]),
    "new pictures": FRESH,
    "other pictures": np.random.RandomState(2).randint(0, 256, FRESH.shape, np.uint8),
}


@pytest.mark.parametrize(
    ("name", "verdict", "copies", "mirrored"),
    [
        ("copies", "copies", 400, 0),
        ("copies with noise", "copies", 0, 0),
        ("mirrored copies", "copies", 0, 400),
        ("a few copies", "copies", 0, 0),
        ("new pictures", "no copies", 0, 0),
        ("other pictures", "farther", 0, 0),
    ],
)
def test_the_verdict_tells_copies_from_new_pictures(held_out, name, verdict, copies, mirrored):
    found = neighbors_of(SAMPLES[name])
    result = compare(found.distances, held_out)
    assert result["verdict"] == verdict
    assert (found.num_copies, found.num_mirrored) == (copies, mirrored)
    assert sentence(result).startswith("The samples copy" if verdict == "copies" else "The samples do not copy")
    small = {"copies": "near_p_value", "farther": "p_value_farther"}.get(verdict)
    assert small is None or result[small] < 1e-6
    if verdict == "no copies":
        assert 0.45 < result["probability_nearer"] < 0.55 and result["p_value"] > 0.05


def test_samples_that_are_nearer_without_copies_among_them_are_said_to_be():
    held_out = np.linspace(1.0, 2.0, 200)
    result = compare(held_out - 0.3 * (held_out - 1.0), held_out)
    assert result["verdict"] == "nearer" and "stay nearer" in sentence(result)
    # A small difference is no verdict, however sure it is.
    many = np.linspace(1.0, 2.0, 20_000)
    result = compare(many - 0.02, many)
    assert result["verdict"] == "no copies" and result["p_value"] < 1e-6


def test_mirrored_training_images_count_only_if_training_mirrors():
    flipped = TRAIN[:30, :, ::-1]
    assert neighbors_of(flipped).distances.max() == 0.0
    alone = neighbors_of(flipped, mirrored=False)
    assert alone.distances.min() > 0.0 and not alone.is_mirrored.any() and alone.num_mirrored == 30


def test_each_image_has_its_training_image_beside_it():
    order = np.random.RandomState(3).permutation(len(TRAIN))[:25]
    found = neighbors_of(np.concatenate([TRAIN[order], TRAIN[order, :, ::-1]]))
    np.testing.assert_array_equal(found.indices, np.tile(order, 2))
    assert not found.is_mirrored[:25].any() and found.is_mirrored[25:].all()
    shown = found.images(array_source(TRAIN), np.array([3, 28]))
    np.testing.assert_array_equal(shown, [TRAIN[order[3]], TRAIN[order[3], :, ::-1]])


def test_p_values_hold_where_samples_and_held_out_images_have_one_distribution():
    rng = np.random.RandomState(4)
    results = [compare(*np.split(rng.standard_normal(230), [150])) for _ in range(400)]
    for name in ("p_value", "p_value_farther", "near_p_value"):
        p = np.array([result[name] for result in results])
        for level in (0.01, 0.1, 0.5):
            assert (p <= level).mean() < level + 4 * np.sqrt(level * (1 - level) / len(p)), name
    assert scipy.stats.kstest([result["p_value"] for result in results], "uniform").pvalue > 1e-3
    assert sum(result["verdict"] != "no copies" for result in results) <= 4


def test_the_neighbor_of_a_training_picture_is_another_one():
    images = np.concatenate([TRAIN[:60], TRAIN[:1]])  # the last one is a copy of the first
    flat = images.reshape(61, -1).astype(float)
    both = np.concatenate([flat, images[:, :, ::-1].reshape(61, -1)])
    squared = np.square(flat[:, None] - both[None]).sum(-1)
    for j in range(61):
        squared[j, [j, 61 + j]] = np.inf
    features = lambda images: images.reshape(len(images), -1)
    found = training_neighbors(images, array_source(images), features, mirrored=True, label="x", own=np.arange(61))
    np.testing.assert_allclose(found.distances, np.sqrt(squared.min(axis=1)))
    assert found.distances[0] == found.distances[60] == 0 and (found.indices != np.arange(61)).all()
