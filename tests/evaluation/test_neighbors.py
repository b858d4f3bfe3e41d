"""Nearest neighbours against brute force."""

import numpy as np
import pytest

from diffusion_tf.errors import ConfigError, NotFiniteError
from diffusion_tf.evaluation.neighbors import nearest_neighbors


def test_neighbours_are_those_of_brute_force():
    rng = np.random.RandomState(0)
    queries, candidates = rng.standard_normal((7, 5)), rng.standard_normal((50, 5))
    candidates[30] = queries[2]
    indices, distances = nearest_neighbors(queries, np.array_split(candidates, 7), 4)
    for query, found, lengths in zip(queries, indices, distances, strict=True):
        expected = np.sqrt(((candidates - query) ** 2).sum(axis=1))
        np.testing.assert_array_equal(found, np.argsort(expected)[:4])
        np.testing.assert_allclose(lengths, np.sort(expected)[:4], atol=1e-7)
    assert indices[2, 0] == 30 and distances[2, 0] == 0.0


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_copies_come_first_at_distance_zero(offset):
    candidates = np.random.RandomState(0).standard_normal((60, 64)) + offset
    candidates[[17, 41]] = candidates[3]
    indices, distances = nearest_neighbors(candidates[3:4], np.array_split(candidates, 4), 4)
    assert indices[0, :3].tolist() == [3, 17, 41] and distances[0, :3].tolist() == [0.0, 0.0, 0.0]
    assert distances[0, 3] > 1.0


def test_neighbours_that_do_not_exist_are_refused():
    features = np.random.RandomState(0).standard_normal((4, 3))
    with pytest.raises(ConfigError, match="num_neighbors=5 is more than the 4 candidates"):
        nearest_neighbors(features, [features[:2], features[2:]], 5)
    with pytest.raises(NotFiniteError, match="features of images 3 hold NaN or infinity"):
        nearest_neighbors(features, [features[:2], np.float32([[0, 1, 2], [0, np.nan, 0]])], 2)
