"""Reverse channel coding: a sample of q for about KL(q || p) bits, which Algorithms 3 and 4 take for granted.

Both sides can draw the same candidates from p. The encoder names one, so that what the decoder draws is distributed as
q: the Poisson functional representation (Li & El Gamal 2018). In units of their common standard deviation p is N(0, I)
and q is N(mu, I), and a candidate z has the weight r(z) = exp(<mu, z> - |mu|^2 / 2). If z_0, z_1, ... arrive at the
times T_0 < T_1 < ... of a Poisson process, the one with the least T / r is a sample of q. Early ones win more often, so
that naming its place costs about I + 3.5 bits, I = |mu|^2 / (2 ln 2).

Since log r has a standard deviation of |mu|, an honest sample of 12 bits takes some 2^25 candidates. They are triples:
the dimensions have three parts, each with 2^16 rows of normal numbers, and a candidate is one row of each. So the
weights of 2^48 candidates are sums of three terms, and those which can still win are found by sorting. All dimensions
of a step are mixed first by a random rotation, so that the parts have equal shares of mu.
"""

import functools
import math
import statistics
from collections.abc import Sequence

import numpy as np

_PARTS = 3
_ROWS = 1 << 16
NUM_CANDIDATES = _ROWS**_PARTS
_MULTIPLIER = 40503  # odd, and no simple fraction of 2^16
_SCANNED = 256  # stretches of 2^16 candidates that are looked at one by one
_MAX_PAIRS = 1 << 22
_NORMALS_AT_ONCE = 1 << 20
_WORDS_PER_BLOCK = 16  # 16-bit words to one step of the Philox counter
_SIGNS, _PRIOR = 2**32 - 1, 2**32 - 2  # in place of a chunk's number


class SharedRandomness:
    """The random numbers of one stream, a function of (stream, step, chunk, candidate): Philox4x64's raw words.

    NumPy promises that those never change. A normal number is a 16-bit word's place in a table.

    Args:
      stream: int in [0, 2^64).
    """

    def __init__(self, stream: int):
        self.stream = stream

    def normals(self, step: int, chunk: int, part: int, first_row: int, num_rows: int, width: int) -> np.ndarray:
        """Rows first_row ... of one part of a chunk's dimensions, float32 [num_rows, width]."""
        blocks = -(-width // _WORDS_PER_BLOCK)
        words = self._words(step, chunk, first_row * blocks, part, num_rows * blocks * _WORDS_PER_BLOCK // 4)
        return _quantiles().take(words.view("<u2"), mode="clip").reshape(num_rows, -1)[:, :width]

    def prior_sample(self, shape: Sequence[int]) -> np.ndarray:
        """x_T, float32 of `shape`, from N(0, I)."""
        return self.normals(0, _PRIOR, 0, 0, 1, math.prod(shape)).reshape(shape)

    def rotate(self, step: int, x: np.ndarray) -> np.ndarray:
        """A random rotation of x [num_dims]: signs, and the Hartley transform, which is its own inverse."""
        return _hartley(self._signs(step, len(x)) * x)

    def rotate_back(self, step: int, x: np.ndarray) -> np.ndarray:
        """The inverse of `rotate`."""
        return self._signs(step, len(x)) * _hartley(x)

    def _signs(self, step: int, count: int) -> np.ndarray:
        return np.where(self._words(step, _SIGNS, 0, 0, count) >> np.uint64(63), -1.0, 1.0)

    def _words(self, step: int, chunk: int, block: int, part: int, count: int) -> np.ndarray:
        key = np.array([self.stream, (step << 32) | chunk], np.uint64)
        philox = np.random.Philox(key=key, counter=np.array([block, part, 0, 0], np.uint64))
        return philox.random_raw(count).astype("<u8", copy=False)


@functools.cache
def _quantiles() -> np.ndarray:
    """The normal's quantiles at the middles of 2^16 equal intervals, scaled to variance 1; float32."""
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


def draw(shared: SharedRandomness, step: int, chunk: int, num_dims: int, index: int) -> np.ndarray:
    """Candidate `index` of a chunk, float32 [num_dims]: what the decoder does."""
    rows = _rows(index)
    widths = [len(part) for part in np.array_split(np.empty(num_dims), _PARTS)]
    return np.concatenate(
        [shared.normals(step, chunk, part, rows[part], 1, width)[0] for part, width in enumerate(widths)]
    )


def select(shared: SharedRandomness, step: int, chunk: int, mu: np.ndarray, arrivals: np.random.Generator) -> int:
    """The index of a candidate that is distributed as N(mu, I): what the encoder does.

    Args:
      shared: the random numbers of candidates.
      step: which step of the reverse process.
      chunk: which chunk of it.
      mu: float [num_dims]; beyond 16 bits the sample is noticeably nearer to p than q is.
      arrivals: the encoder's own randomness, of which the decoder needs to know nothing.
    """
    parts = enumerate(np.array_split(mu.astype(np.float32), _PARTS))
    u, v, w = (_project(shared, step, chunk, part, share) for part, share in parts)
    # The first 2^16 arrive one by one. After them T_k is k to 0.4%.
    score = u + v + w - np.log(np.cumsum(arrivals.standard_exponential(_ROWS)))
    index = int(np.argmax(score))
    best = float(score[index])
    v_twice, w_twice = np.concatenate([v, v]), np.concatenate([w, w])
    for stretch in range(1, _SCANNED):
        first = stretch * _ROWS
        _, b, c = _rows(first)
        weight = u + v_twice[b : b + _ROWS] + w_twice[c : c + _ROWS]
        if weight.max() - math.log(first) > best:
            score = weight - np.log(np.arange(first, first + _ROWS))
            if score.max() > best:
                best, index = float(score.max()), first + int(np.argmax(score))
    # Of the rest, only such can win as have a weight that makes up for T.
    late, weight = _triples_above(u, v, w, best + math.log(_SCANNED * _ROWS))
    score = np.where(late >= _SCANNED * _ROWS, weight - np.log(np.maximum(late, 1)), -np.inf)
    if len(late) and score.max() > best:
        index = int(late[np.argmax(score)])
    return index


def sample_indices(bits: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Indices as `select` gives them for chunks of these bits, by their law rather than by a search; float64.

    z ~ q wins at T = tau r with tau ~ Exp(1). Before it came all arrivals (t, z') with t < T and t / r' > tau: their
    number is Poisson's, of mean tau (r P_p(r' < r) - P_q(r' < r)).
    """
    mu = np.sqrt(2.0 * math.log(2.0) * np.asarray(bits, np.float64))
    z = mu + generator.standard_normal(mu.shape)
    cdf = np.vectorize(statistics.NormalDist().cdf, otypes=[np.float64])
    earlier = generator.standard_exponential(mu.shape) * (np.exp(mu * z - mu**2 / 2) * cdf(z) - cdf(z - mu))
    return np.minimum(generator.poisson(np.clip(earlier, 0.0, 1e18)), NUM_CANDIDATES - 1.0)


def _rows(index: int) -> tuple[int, int, int]:
    """The rows of a candidate. Each 2^16 candidates in a row have each row once, beside ever others."""
    shift, a = divmod(index, _ROWS)
    shift_c, shift_b = divmod(shift, _ROWS)
    return a, (a + shift_b) % _ROWS, (a + shift_b * _MULTIPLIER + shift_c) % _ROWS


def _index(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """The candidate of these rows, int64."""
    shift_b = (b - a) % _ROWS
    shift_c = (c - a - shift_b * _MULTIPLIER) % _ROWS
    return (shift_c * _ROWS + shift_b) * _ROWS + a


def _project(shared: SharedRandomness, step: int, chunk: int, part: int, mu: np.ndarray) -> np.ndarray:
    """<mu, row> of every row of a part, float32 [2^16]; in stretches, which bounds the memory."""
    stretch = min(_ROWS, 1 << (max(1, _NORMALS_AT_ONCE // max(1, len(mu))).bit_length() - 1))
    rows = (shared.normals(step, chunk, part, first, stretch, len(mu)) for first in range(0, _ROWS, stretch))
    return np.concatenate([np.einsum("ij,j->i", part_rows, mu) for part_rows in rows])


def _triples_above(u: np.ndarray, v: np.ndarray, w: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the candidates of a weight above `threshold`, int64, and their weights."""
    a, b = _pairs_above(u, v, threshold - w.max())
    pair, c = _pairs_above(u[a] + v[b], w, threshold)
    a, b = a[pair], b[pair]
    return _index(a, b, c), u[a] + v[b] + w[c]


def _pairs_above(u: np.ndarray, v: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """The places (i, j) with u[i] + v[j] > threshold; the largest of the sums where they are more than 2^22."""
    top = float(u.max(initial=-np.inf)) + float(v.max())
    while True:
        i, j = np.flatnonzero(u > threshold - v.max()), np.flatnonzero(v > threshold - u.max(initial=-np.inf))
        j = j[np.argsort(v[j])]
        first = np.searchsorted(v[j], threshold - u[i], side="right")
        counts = len(j) - first
        total = int(counts.sum())
        if total <= _MAX_PAIRS:
            break
        threshold = threshold + 0.1 * (top - threshold) + 1e-3
    within = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(i, counts), j[np.repeat(first, counts) + within]
