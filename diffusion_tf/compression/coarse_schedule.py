"""Chooses the coarse reverse process that compression uses, and how likely the contents of its steps are.

NumPy only: the inputs are the errors |x_0 - pred_xstart|^2 of a few training images on a grid of timesteps.

A step from t to s has the KL divergence (SNR(s) - SNR(t)) |x_0 - pred_xstart|^2 / 2 nats. Its dimensions are split into
chunks of at most `chunk_bits` of KL, and each chunk is sent as one index (see channel.py).
"""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Sequence

import numpy as np

from diffusion_tf.compression.bitstream import INDEX_LENGTHS, UNIT, predicted_chunks
from diffusion_tf.compression.channel import sample_indices

NEGLIGIBLE_BITS = 0.01  # a step with a smaller KL sends no chunk
_MIN_DIMS_PER_CHUNK = 6  # two for each of the three segments of a candidate
_MAX_OVERHEAD = 0.25  # the bits of a prefix of whole steps may exceed the KL of these steps by this share
_TAIL_BITS = 1.5  # bits until the last step of a prefix is certain, whatever follows
_PENALTY = 100.0  # of a bit beyond a limit, in bits
_MU_STEP = 0.125  # spacing of the values of |mu| at which the distribution of indices is tabulated
_SAMPLES = 1 << 14  # samples of each of these distributions


@dataclasses.dataclass(frozen=True)
class StepLaws:
    """The entropy models of the steps, as `StepModel` takes them, with the mean number of chunks of each step."""

    chunk_means: tuple[int, ...]
    chunk_laws: tuple[tuple[int, ...], ...]
    index_laws: tuple[tuple[int, ...], ...]


def num_chunks(bits: np.ndarray, chunk_bits: int, num_dims: int) -> np.ndarray:
    """Number of chunks of steps with a KL of `bits`, int of the same shape, for images of `num_dims` dimensions."""
    chunks = np.clip(np.ceil(bits / chunk_bits), 1, max_chunks(num_dims)).astype(int)
    return np.where(bits < NEGLIGIBLE_BITS, 0, chunks)


def max_chunks(num_dims: int) -> int:
    """Largest number of chunks of a step."""
    return max(1, num_dims // _MIN_DIMS_PER_CHUNK)


class StepCosts:
    """Costs of the steps between any two places i < j on a grid of K timesteps, from noise to image.

    Args:
      errors: |x_0 - pred_xstart|^2 of N images at these timesteps, float64 [K, N].
      snr: signal-to-noise ratio alphas_cumprod / (1 - alphas_cumprod) at these timesteps, float64 [K].
      chunk_bits: largest KL of a chunk, in bits.
      num_dims: dimensions of an image.
      seed: seed of the simulated indices.

    Attributes:
      max_overhead: share by which the bits of a prefix may exceed its KL.
    """

    def __init__(self, errors: np.ndarray, snr: np.ndarray, chunk_bits: int, num_dims: int, seed: int):
        self._errors, self._snr, self._chunk_bits, self._num_dims = errors, snr, chunk_bits, num_dims
        self._length_tables = _index_length_tables(2.0 * chunk_bits, np.random.default_rng(seed))
        # Small chunks cost more than their KL even if all of them are full.
        full_chunk = float(_index_bits(self._length_tables[_mu_place(np.array(float(chunk_bits)))]))
        self.max_overhead = max(_MAX_OVERHEAD, 1.1 * (full_chunk / chunk_bits - 1.0))

    def costs_into(self, j: int) -> tuple[np.ndarray, np.ndarray]:
        """Mean KL, and bits to send, of the steps from each of the places 0, 1, ..., j - 1 to j: float64 [j], [j]."""
        bits, chunks = self._contents(np.arange(j), j)
        counts = _histograms(chunks, np.ones_like(bits), chunks.max() + 1)
        send = _entropy(counts) + chunks.mean(axis=1) * _index_bits(self._lengths(bits, chunks))
        # The number of chunks is limited. Larger chunks would seem cheap, but their samples would not be those of q.
        excess = np.maximum(0.0, bits - self._chunk_bits * max_chunks(self._num_dims)).mean(axis=1)
        return bits.mean(axis=1), send + _PENALTY * excess

    def laws(self, path: Sequence[int]) -> "StepLaws":
        """The entropy models of the steps between the places of `path`."""
        chunk_means: list[int] = []
        chunk_laws, index_laws = [], []
        before: list[np.ndarray] = []  # number of chunks of each image in the steps so far
        for i, j in itertools.pairwise(path):
            bits, chunks = (contents[0] for contents in self._contents(np.array([i]), j))
            chunk_means.append(round(UNIT * float(chunks.mean())))
            earlier = [[int(counts[image]) for counts in before] for image in range(len(bits))]
            predicted = np.array([predicted_chunks(chunk_means, counts) for counts in earlier])
            before.append(chunks)
            samples, sample_predicted = self._smoothed(bits, predicted)
            sample_chunks = num_chunks(samples, self._chunk_bits, self._num_dims)
            index_laws.append(_whole_numbers(2**16 * self._lengths(samples[None], sample_chunks[None])[0]))
            difference = sample_chunks - sample_predicted
            most = 2 * int(np.abs(difference).max()) + 3
            counts = _histograms((difference + most)[None], np.ones((1, len(samples))), 2 * most + 1)[0]
            chunk_laws.append(_whole_numbers(2**14 * counts))
        return StepLaws(tuple(chunk_means), tuple(chunk_laws), tuple(index_laws))

    def _smoothed(self, bits: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A kernel density estimate of a step's KL [N]: 32 samples of each image, and its predicted chunks, [32 N].

        The kernel is Gaussian, with Silverman's width about the prediction.
        """
        spread = (bits - self._chunk_bits * predicted).std()
        width = 1.06 * spread * bits.size**-0.2 + 0.25 * bits.mean() / bits.size
        quantiles = [statistics.NormalDist().inv_cdf((k + 0.5) / 32) for k in range(32)]
        samples = np.maximum(0.0, bits + width * np.array(quantiles)[:, None]).reshape(-1)
        return samples, np.tile(predicted, len(quantiles))

    def _lengths(self, bits: np.ndarray, chunks: np.ndarray) -> np.ndarray:
        """Distribution of the number of bits of index + 1 after the first in these steps, float64 [steps, 61]."""
        places = _mu_place(bits / np.maximum(chunks, 1))
        return _histograms(places, chunks, len(self._length_tables)) @ self._length_tables

    def _contents(self, i: np.ndarray, j: int) -> tuple[np.ndarray, np.ndarray]:
        """KL in bits, float64 [len(i), N], and number of chunks of the steps from the places i to j for each image."""
        bits = (self._snr[j] - self._snr[i])[:, None] * self._errors[i] / (2.0 * math.log(2.0))
        return bits, num_chunks(bits, self._chunk_bits, self._num_dims)


def cheapest_path(
    num_places: int, costs_into: Callable[[int], tuple[np.ndarray, np.ndarray]], max_overhead: float
) -> list[int]:
    """Finds the places 0 = i_0 < i_1 < ... < num_places - 1 with the fewest bits, by dynamic programming.

    It avoids paths on which the bits of some prefix exceed (1 + max_overhead) times its KL. Each place keeps only its
    cheapest path, so the result need not be the exact minimum.

    Args:
      num_places: number of places.
      costs_into: costs_into(j) is (KL, bits) of the steps from 0, 1, ..., j - 1 to j, in bits.
      max_overhead: share by which the bits of a prefix may exceed its KL.
    """
    scores, kls, bits, before = np.zeros((4, num_places))
    for j in range(1, num_places):
        step_kl, step_bits = costs_into(j)
        kl, total = kls[:j] + step_kl, bits[:j] + step_bits
        excess = total + _TAIL_BITS * (total > NEGLIGIBLE_BITS) - (1.0 + max_overhead) * kl
        score = scores[:j] + step_bits + _PENALTY * np.maximum(0.0, excess)
        i = int(np.argmin(score))
        scores[j], kls[j], bits[j], before[j] = score[i], kl[i], total[i], i
    path = [num_places - 1]
    while path[-1]:
        path.append(int(before[path[-1]]))
    return path[::-1]


def _index_length_tables(max_bits: float, generator: np.random.Generator) -> np.ndarray:
    """Distribution of the number of bits of index + 1 after the first, for |mu| = 0, 0.125, ...: float64 [M, 61]."""
    mu = np.arange(0.0, math.sqrt(2.0 * math.log(2.0) * max_bits) + _MU_STEP, _MU_STEP)
    bits = np.repeat(mu**2 / (2.0 * math.log(2.0)), _SAMPLES).reshape(len(mu), _SAMPLES)
    indices = np.minimum(sample_indices(bits, generator), 2.0**60 - 1.0)
    lengths = np.floor(np.log2(indices + 1.0)).astype(int)
    return _histograms(lengths, np.ones_like(bits), INDEX_LENGTHS)


def _mu_place(bits: np.ndarray) -> np.ndarray:
    """Rows of `_index_length_tables` nearest to chunks with a KL of `bits`."""
    return np.round(np.sqrt(2.0 * math.log(2.0) * bits) / _MU_STEP).astype(int)


def _index_bits(lengths: np.ndarray) -> np.ndarray:
    """Mean bits of an index under a distribution of lengths [..., 61]: the entropy of the length, and the bits."""
    return _entropy(lengths) + lengths @ np.arange(INDEX_LENGTHS)


def _histograms(values: np.ndarray, weights: np.ndarray, size: int) -> np.ndarray:
    """Weighted distribution of each row of whole `values` over 0, 1, ..., size - 1 (and more): float64 [rows, size]."""
    places = np.arange(len(values))[:, None] * size + np.minimum(values, size - 1)
    counts = np.bincount(places.reshape(-1), weights.reshape(-1), minlength=len(values) * size).reshape(-1, size)
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1e-12)


def _entropy(probabilities: np.ndarray) -> np.ndarray:
    """Entropy of each row, in bits."""
    return -np.sum(probabilities * np.log2(np.maximum(probabilities, 1e-12)), axis=-1)


def _whole_numbers(frequencies: np.ndarray) -> tuple[int, ...]:
    """The frequencies, rounded, plus one: everything in the table stays possible."""
    return tuple((1 + np.round(frequencies).astype(int)).tolist())
