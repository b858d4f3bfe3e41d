"""Nearest neighbours against brute force."""

import numpy as np

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
    assert indices[2, 0] == 30
