"""Reverse channel coding: sends a sample of q with about KL(q || p) bits, as Algorithms 3 and 4 require.

Encoder and decoder can generate the same candidates from p. The encoder sends the index of one of them, chosen so that
the candidate is distributed as q: the Poisson functional representation (Li & El Gamal 2018). In units of the common
standard deviation, p is N(0, I) and q is N(mu, I), and a candidate z has the weight r(z) = exp(<mu, z> - |mu|^2 / 2).
If z_0, z_1, ... arrive at the times T_0 < T_1 < ... of a Poisson process, the one with the least T / r is a sample of
q. Early candidates win more often, so an index costs about I + 3.5 bits, where I = |mu|^2 / (2 ln 2).

log r has the standard deviation |mu|, so a correct sample of 12 bits needs about 2^25 candidates, and one of 20 bits
2^48. Hence candidates are combinations: the dimensions are split into three segments with R rows of normal numbers
each, and a candidate is one row of each segment. The log-weights of R^3 candidates are then sums of three terms, and
sorting finds those that can still win. A random rotation mixes all dimensions of a step first, so that the segments
have equal shares of mu. The weights of a segment's rows have a relative variance of exp(|mu|^2 / 3) / R, which must be
far below 1: see `rows_for`.
"""

import functools
import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

_SEGMENTS = 3
_PER_WORD = 4  # normal numbers from a word of 64 bits
_BLOCK = 4 * _PER_WORD  # normal numbers per step of the Philox counter, which yields four words
_SIGNS, _PRIOR = 2**32 - 1, 2**32 - 2  # reserved numbers in place of a chunk's
_NUM_ARRIVALS = 1 << 16  # candidates with sampled arrival times; later, T_k is taken as k, which is within 0.4%
_MAX_PAIRS = 1 << 22  # pairs of rows that are listed; with more, only those with the largest sums
_GROUP = 32  # rows that are projected together
_MAX_PRODUCT = 1 << 18  # multiplications in a matrix product


def rows_for(chunk_bits: int) -> int:
    """R for chunks of at most `chunk_bits`.

    The largest chunks have weights with a relative variance of 0.4% (12 bits), 0.6% (16), 1% (20) or 6% (24). In
    simulations, a sample's projection on mu is short by 0.01 to 0.03 of its standard deviation up to 16 bits, by
    0.06 +- 0.05 at 20 bits, and by 0.2 +- 0.06 for a full chunk of 24 bits. Searches take time proportional to R.
    """
    return 1 << (16 if chunk_bits <= 12 else 18 if chunk_bits <= 16 else 20)


class SharedRandomness:
    """The random numbers of one stream, a function of (stream, step, chunk, segment, row): raw words of Philox4x64.

    NumPy promises never to change these words. A normal number is a 16-bit word looked up in a table of quantiles.

    Args:
      stream: int in [0, 2^64).
      stride: row r of a segment starts with number `stride` r of the segment's sequence.
    """

    def __init__(self, stream: int, stride: int = 1):
        self.stream, self.stride = stream, stride

    def numbers(self, step: int, chunk: int, segment: int, first: int, count: int) -> np.ndarray:
        """Numbers first, first + 1, ... of a segment's sequence of normal numbers, float32 [count].

        Args:
          step: the step of the reverse process.
          chunk: the chunk of the step.
          segment: the segment of the chunk, 0 to 2.
          first: the first number.
          count: how many.
        """
        block, skipped = divmod(first, _BLOCK)
        words = self._words(step, chunk, block, segment, -(-(skipped + count) // _PER_WORD))
        return _quantiles().take(words.view("<u2")[skipped : skipped + count], mode="clip")

    def row(self, step: int, chunk: int, segment: int, row: int, width: int) -> np.ndarray:
        """One row of a segment, float32 [width].

        Args:
          step: the step of the coarse reverse process.
          chunk: the chunk of the step.
          segment: the segment of the chunk.
          row: the row of the segment.
          width: the number of dimensions.
        """
        return self.numbers(step, chunk, segment, self.stride * row, width)

    def prior_sample(self, shape: Sequence[int]) -> np.ndarray:
        """x_T ~ N(0, I), float32 of `shape`."""
        return self.numbers(0, _PRIOR, 0, 0, math.prod(shape)).reshape(shape)

    def rotate(self, step: int, x: np.ndarray) -> np.ndarray:
        """A random rotation of x [num_dims]: random signs, then the Hartley transform, which is its own inverse."""
        return _hartley(self._signs(step, len(x)) * x)

    def rotate_back(self, step: int, x: np.ndarray) -> np.ndarray:
        """The inverse of `rotate`."""
        return self._signs(step, len(x)) * _hartley(x)

    def _signs(self, step: int, count: int) -> np.ndarray:
        return np.where(self._words(step, _SIGNS, 0, 0, count) >> np.uint64(63), -1.0, 1.0)

    def _words(self, step: int, chunk: int, block: int, segment: int, count: int) -> np.ndarray:
        """`count` words from block `block` on, uint64 [count]."""
        key = np.array([self.stream, (step << 32) | chunk], np.uint64)
        philox = np.random.Philox(key=key, counter=np.array([block, segment, 0, 0], np.uint64))
        return philox.random_raw(count).astype("<u8", copy=False)


@functools.cache
def _quantiles() -> np.ndarray:
    """Quantiles of the normal distribution at the centers of 2^16 equal intervals, scaled to variance 1; float32."""
    inverse = statistics.NormalDist().inv_cdf
    upper = np.array([inverse((i + 0.5) / 2**16) for i in range(2**15, 2**16)])
    table = np.concatenate([-upper[::-1], upper])
    return (table / np.sqrt(np.mean(table**2))).astype(np.float32)


def _hartley(x: np.ndarray) -> np.ndarray:
    transformed = np.fft.fft(x)
    return (transformed.real - transformed.imag) / math.sqrt(len(x))


def kl_bits(mu: np.ndarray) -> float:
    """I = KL(N(mu, I) || N(0, I)) in bits."""
    return float(np.sum(np.square(mu, dtype=np.float64)) / (2.0 * math.log(2.0)))


def candidate(shared: SharedRandomness, step: int, chunk: int, num_dims: int, index: int, num_rows: int) -> np.ndarray:
    """The candidate with this index, float32 [num_dims]; the decoder's half.

    Args:
      shared: the random numbers of the candidates.
      step: the step of the reverse process.
      chunk: the chunk of the step.
      num_dims: dimensions of the chunk.
      index: what `select` gave the encoder.
      num_rows: R, a power of 2.
    """
    widths = [len(dims) for dims in np.array_split(np.empty(num_dims), _SEGMENTS)]
    rows = _rows(index, num_rows)
    return np.concatenate(
        [shared.row(step, chunk, segment, rows[segment], width) for segment, width in enumerate(widths)]
    )


def select(
    shared: SharedRandomness, step: int, chunk: int, mu: np.ndarray, num_rows: int, arrivals: np.random.Generator
) -> int:
    """The index of a candidate distributed as N(mu, I); the encoder's half.

    Args:
      shared: the random numbers of the candidates.
      step: the step of the reverse process.
      chunk: the chunk of the step.
      mu: float [num_dims]; if its KL exceeds what `num_rows` is for, samples lie noticeably between p and q.
      num_rows: R, a power of 2.
      arrivals: the encoder's own random numbers, which the decoder does not need.
    """
    shares = np.array_split(mu.astype(np.float32), _SEGMENTS)
    u, v, w = (_project(shared, step, chunk, i, share, num_rows) for i, share in enumerate(shares))
    return search(u, v, w, arrivals)


def search(
    u: np.ndarray, v: np.ndarray, w: np.ndarray, arrivals: np.random.Generator, max_pairs: int = _MAX_PAIRS
) -> int:
    """The candidate (a, b, c) with the largest u[a] + v[b] + w[c] - log T, as its index.

    Args:
      u: log-weights of the rows of the first segment, float32 [R].
      v: log-weights of the second segment.
      w: log-weights of the third segment.
      arrivals: random numbers for the first arrival times T.
      max_pairs: bounds time and memory; with more pairs of rows that may win, some are left out.
    """
    num_rows = len(u)
    score = u + v + w - _log_places(num_rows)
    arrived = np.cumsum(arrivals.standard_exponential(_NUM_ARRIVALS))[:num_rows]
    score[: len(arrived)] = (u + v + w)[: len(arrived)] - np.log(arrived)
    index = int(np.argmax(score))
    best = float(score[index])
    # Only candidates with a weight that makes up for their T can win. The first R^2 candidates contain each pair (a, b)
    # once, with T near ((b - a) mod R) R + a.
    highest_v, highest_w = v.max(), w.max()
    maxima: list[np.ndarray] = []
    for largest in itertools.islice(_sliding_maxima(v), num_rows.bit_length() - 1):
        maxima.append(largest)
        threshold = best + math.log(num_rows << (len(maxima) - 1))
        if u.max() + highest_v + highest_w <= threshold:
            return index
        a, b = _pairs_in_band(u, maxima, threshold - highest_w, max_pairs)
        weights = u[a] + v[b] + w[_third_row(a, b, num_rows)]
        index, best = _better(((b - a) % num_rows) * num_rows + a, weights, index, best)
    late, weights = _triples_above(u, v, w, best + 2.0 * math.log(num_rows), max_pairs)
    beyond = late >= num_rows**2
    return _better(late[beyond], weights[beyond], index, best)[0]


@functools.cache
def _log_places(num_rows: int) -> np.ndarray:
    """Logarithms of the places k of the first R candidates, float32 [R]; 0 for the first."""
    return np.log(np.maximum(np.arange(num_rows), 1)).astype(np.float32)


def _better(candidates: np.ndarray, weights: np.ndarray, index: int, best: float) -> tuple[int, float]:
    """The best of late candidates and the one given, with its score."""
    score = weights - np.log(candidates)
    if len(score) and score.max() > best:
        return int(candidates[np.argmax(score)]), float(score.max())
    return index, best


def sample_indices(bits: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Samples the indices that `select` gives for chunks with a KL of `bits`, without a search; float64.

    z ~ q wins at T = tau r with tau ~ Exp(1). The arrivals (t, z') before it are those with t < T and t / r' > tau:
    their number is Poisson distributed with mean tau (r P_p(r' < r) - P_q(r' < r)).
    """
    mu = np.sqrt(2.0 * math.log(2.0) * np.asarray(bits, np.float64))
    z = mu + generator.standard_normal(mu.shape)
    cdf = np.vectorize(statistics.NormalDist().cdf, otypes=[np.float64])
    earlier = generator.standard_exponential(mu.shape) * (np.exp(mu * z - mu**2 / 2) * cdf(z) - cdf(z - mu))
    return generator.poisson(np.clip(earlier, 0.0, 1e18)).astype(np.float64)


def _rows(index: int, num_rows: int) -> tuple[int, int, int]:
    """The rows (a, b, c) of a candidate. R consecutive candidates contain each row once, in ever new combinations."""
    shift, a = divmod(index, num_rows)
    shift_c, shift_b = divmod(shift, num_rows)
    b = (a + shift_b) % num_rows
    return a, b, (_third_row(a, b, num_rows) + shift_c) % num_rows


def _third_row(a: Any, b: Any, num_rows: int) -> Any:
    """The third row of the candidate that contains (a, b) among the first R^2; of ints or integer arrays."""
    return (a + (b - a) * _multiplier(num_rows)) & (num_rows - 1)


def _index(a: np.ndarray, b: np.ndarray, c: np.ndarray, num_rows: int) -> np.ndarray:
    """The inverse of `_rows`, int64."""
    shift_b, shift_c = (b - a) % num_rows, (c - _third_row(a, b, num_rows)) % num_rows
    return (shift_c * num_rows + shift_b) * num_rows + a


def _multiplier(num_rows: int) -> int:
    """An odd number that is no simple fraction of R: R divided by the golden ratio."""
    return round(num_rows * (math.sqrt(5.0) - 1.0) / 2.0) | 1


def _project(
    shared: SharedRandomness, step: int, chunk: int, segment: int, mu: np.ndarray, num_rows: int
) -> np.ndarray:
    """<mu, row> for every row of a segment, float32 [R]; the rows overlap, so groups of them are matrix products.

    Args:
      shared: the random numbers of the candidates.
      step: the step of the reverse process.
      chunk: the chunk of the step.
      segment: the segment of the chunk.
      mu: the segment's share of mu, float32.
      num_rows: R.
    """
    width, stride = len(mu), shared.stride
    numbers = shared.numbers(step, chunk, segment, 0, (num_rows - 1) * stride + width)
    group = min(num_rows, _GROUP)
    shifted = np.zeros(((group - 1) * stride + width, group), np.float32)  # mu, where row i of a group meets it
    for row in range(group):
        shifted[row * stride : row * stride + width, row] = mu
    groups = np.lib.stride_tricks.sliding_window_view(numbers, len(shifted))[:: group * stride]
    # A larger product would start threads, which get in the way of the other searches.
    pieces = range(0, len(groups), max(1, _MAX_PRODUCT // shifted.size))
    return np.concatenate([groups[i : i + pieces.step] @ shifted for i in pieces]).reshape(-1)


def _sliding_maxima(v: np.ndarray) -> Iterator[np.ndarray]:
    """The maxima of v[i : i + 2^k] for every i, cyclically, for k = 0, 1, ...; float32 [R]."""
    for k in itertools.count():
        yield v
        v = _with_later(np.maximum, v, v, 1 << k)


def _with_later(ufunc: np.ufunc, x: np.ndarray, y: np.ndarray, shift: int) -> np.ndarray:
    """ufunc(x[i], y[i + shift]) for every i, cyclically; `np.roll` would need another pass over the memory."""
    result = np.empty_like(x)
    ufunc(x[:-shift], y[shift:], out=result[:-shift])
    ufunc(x[-shift:], y[:shift], out=result[-shift:])
    return result


def _pairs_in_band(
    u: np.ndarray, maxima: Sequence[np.ndarray], threshold: float, max_pairs: int
) -> tuple[np.ndarray, np.ndarray]:
    """The pairs (a, b) with u[a] + v[b] > threshold among those with 2^k <= b - a < 2^(k + 1), cyclically.

    The rows b of a row a are halved as long as the largest v among them is large enough.

    Args:
      u: values of the first rows, float32 [R].
      maxima: sliding maxima of v over 1, 2, 4, ..., 2^k rows.
      threshold: what the sums exceed.
      max_pairs: of more pairs, only those with the largest bounds are followed.
    """
    num_rows, width = len(u), 1 << (len(maxima) - 1)
    a = np.flatnonzero(_with_later(np.add, u, maxima[-1], width) > threshold)
    first = (a + width) % num_rows
    for largest in maxima[-2::-1]:
        width //= 2
        a, first = np.tile(a, 2), np.concatenate([first, (first + width) % num_rows])
        bounds = u[a] + largest[first]
        kept = np.flatnonzero(bounds > threshold)
        if len(kept) > max_pairs:
            kept = np.argpartition(-bounds, max_pairs)[:max_pairs]
        a, first = a[kept], first[kept]
    return a, first


def _triples_above(
    u: np.ndarray, v: np.ndarray, w: np.ndarray, threshold: float, max_pairs: int
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the candidates with u[a] + v[b] + w[c] > threshold, int64, and these sums."""
    a, b = _pairs_above(u, v, threshold - w.max(), max_pairs)
    pair, c = _pairs_above(u[a] + v[b], w, threshold, max_pairs)
    a, b = a[pair], b[pair]
    return _index(a, b, c, len(u)), u[a] + v[b] + w[c]


def _pairs_above(u: np.ndarray, v: np.ndarray, threshold: float, max_pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """The places (i, j) with u[i] + v[j] > threshold; if there are more than `max_pairs`, those with larger sums."""
    top = float(u.max(initial=-np.inf)) + float(v.max())
    while _count_above(u, v, threshold) > max_pairs:
        threshold = threshold + 0.1 * (top - threshold) + 1e-3
    i, j = _possibly_above(u, v, threshold)
    j = j[np.argsort(v[j])]
    first = np.searchsorted(v[j], threshold - u[i], side="right")
    counts = len(j) - first
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(i, counts), j[np.repeat(first, counts) + within]


def _count_above(u: np.ndarray, v: np.ndarray, threshold: float) -> int:
    """Number of pairs with u[i] + v[j] > threshold."""
    i, j = _possibly_above(u, v, threshold)
    return len(i) * len(j) - int(np.searchsorted(np.sort(v[j]), np.sort(threshold - u[i]), side="right").sum())


def _possibly_above(u: np.ndarray, v: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Places in u, and in v, whose sum with the largest value of the other exceeds the threshold."""
    return np.flatnonzero(u > threshold - v.max()), np.flatnonzero(v > threshold - u.max(initial=-np.inf))
