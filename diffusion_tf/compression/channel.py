"""Reverse channel coding: a sample of q for about KL(q || p) bits, which Algorithms 3 and 4 take for granted.

Both sides can draw the same candidates from p. The encoder names one, so that what the decoder draws is distributed as
q: the Poisson functional representation (Li & El Gamal 2018). In units of their common standard deviation p is N(0, I)
and q is N(mu, I), and a candidate z has the weight r(z) = exp(<mu, z> - |mu|^2 / 2). If z_0, z_1, ... arrive at the
times T_0 < T_1 < ... of a Poisson process, the one with the least T / r is a sample of q. Early ones win more often, so
that naming its place costs about I + 3.5 bits, I = |mu|^2 / (2 ln 2).

Since log r has a standard deviation of |mu|, an honest sample of 12 bits takes some 2^25 candidates, and one of 20 bits
2^48. They are triples: the dimensions have three parts, each with R rows of normal numbers, and a candidate is one row
of each. So the weights of R^3 candidates are sums of three terms, and those which can still win are found by sorting.
All dimensions of a step are mixed first by a random rotation, so that the parts have equal shares of mu. The weights of
a part's rows have a relative variance of exp(|mu|^2 / 3) / R, which is to be far below 1: see `rows_for`.
"""

import functools
import math
import statistics
from collections.abc import Sequence

import numpy as np

_PARTS = 3
_FIRST_SCANNED = 16  # times R candidates are looked at one by one
_MAX_SCANNED = 1 << 30
_PIECE = 1 << 15  # candidates looked at together
_ARRIVALS = 1 << 16
_MAX_PAIRS = 1 << 22
_BLOCK = 16  # normal numbers to one step of the Philox counter, four words of 64 bits
_SIGNS, _PRIOR = 2**32 - 1, 2**32 - 2  # in place of a chunk's number


def rows_for(chunk_bits: int) -> int:
    """R for chunks of so many bits at most: a relative variance of 0.4%, 0.6%, 1% (20 bits) or 6% (24) for the largest.

    By simulation a sample's projection on mu is then short by 0.01 to 0.03 of its standard deviation up to 16 bits, by
    0.06 +- 0.05 for 20, and by 0.2 +- 0.06 for a chunk of all of 24 bits.
    """
    return 1 << (16 if chunk_bits <= 12 else 18 if chunk_bits <= 16 else 20)


class SharedRandomness:
    """The random numbers of one stream, a function of (stream, step, chunk, candidate): Philox4x64's raw words.

    NumPy promises that those never change. A normal number is a 16-bit word's place in a table.

    Args:
      stream: int in [0, 2^64).
    """

    def __init__(self, stream: int):
        self.stream = stream

    def blocks(self, step: int, chunk: int, part: int, first: int, count: int) -> np.ndarray:
        """Blocks first, first + 1, ... of a part of a chunk, float32 [count, 16]: row r starts with block r.

        A row of more than 16 dimensions shares its later blocks with the rows that follow, where they meet other
        shares of mu: their weights have little to do with each other, and the numbers to draw do not grow with mu.
        """
        words = self._words(step, chunk, first, part, count * _BLOCK // 4)
        return _quantiles().take(words.view("<u2"), mode="clip").reshape(count, _BLOCK)

    def row(self, step: int, chunk: int, part: int, row: int, width: int) -> np.ndarray:
        """A row, float32 [width]."""
        return self.blocks(step, chunk, part, row, -(-width // _BLOCK)).reshape(-1)[:width]

    def prior_sample(self, shape: Sequence[int]) -> np.ndarray:
        """x_T, float32 of `shape`, from N(0, I)."""
        return self.row(0, _PRIOR, 0, 0, math.prod(shape)).reshape(shape)

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


def draw(shared: SharedRandomness, step: int, chunk: int, num_dims: int, index: int, num_rows: int) -> np.ndarray:
    """Candidate `index` of a chunk, float32 [num_dims]: what the decoder does."""
    widths = [len(part) for part in np.array_split(np.empty(num_dims), _PARTS)]
    rows = _rows(index, num_rows)
    return np.concatenate([shared.row(step, chunk, part, rows[part], width) for part, width in enumerate(widths)])


def select(
    shared: SharedRandomness, step: int, chunk: int, mu: np.ndarray, num_rows: int, arrivals: np.random.Generator
) -> int:
    """The index of a candidate that is distributed as N(mu, I): what the encoder does.

    Args:
      shared: the random numbers of candidates.
      step: which step of the reverse process.
      chunk: which chunk of it.
      mu: float [num_dims]; of more bits than `num_rows` is for, the sample is noticeably nearer to p than q is.
      num_rows: R, a power of 2.
      arrivals: the encoder's own randomness, of which the decoder needs to know nothing.
    """
    parts = enumerate(np.array_split(mu.astype(np.float32), _PARTS))
    u, v, w = (_project(shared, step, chunk, part, share, num_rows) for part, share in parts)
    # The first 2^16 arrive one by one. After them T_k is k to 0.4%.
    times = np.arange(num_rows, dtype=np.float64)
    times[:_ARRIVALS] = np.cumsum(arrivals.standard_exponential(_ARRIVALS))
    score = u + v + w - np.log(times)
    index = int(np.argmax(score))
    best = float(score[index])
    # The next ones are looked at in their order, until few pairs of rows are left that some third row can help to win.
    scanned, until = num_rows, _FIRST_SCANNED * num_rows
    while True:
        index, best = _scan(u, v, w, range(scanned, until, _PIECE), index, best)
        scanned, until = until, 2 * until
        threshold = best + math.log(scanned)
        if until > _MAX_SCANNED or _count_above(u, v, threshold - w.max()) <= _MAX_PAIRS:
            break
    # Of the rest, only such can win as have a weight that makes up for T. The first R^2 have each pair of rows once.
    a, b = _pairs_above(u, v, threshold - w.max())
    weight = u[a] + v[b] + w[_third_row(a, b, num_rows)]
    above = weight > threshold
    early = ((b[above] - a[above]) % num_rows) * num_rows + a[above]
    late, late_weight = _triples_above(u, v, w, best + 2.0 * math.log(num_rows))
    for candidates, weights in ((early, weight[above]), (late, late_weight)):
        score = np.where(candidates >= scanned, weights - np.log(np.maximum(candidates, 1)), -np.inf)
        if len(score) and score.max() > best:
            best, index = float(score.max()), int(candidates[np.argmax(score)])
    return index


def _scan(u: np.ndarray, v: np.ndarray, w: np.ndarray, pieces: range, index: int, best: float) -> tuple[int, float]:
    """The best candidate of pieces that begin there, or the one given, and its score."""
    v_on, w_on = np.concatenate([v, v[:_PIECE]]), np.concatenate([w, w[:_PIECE]])
    weight = np.empty(_PIECE, np.float32)
    for first in pieces:
        a, b, c = _rows(first, len(u))
        np.add(u[a : a + _PIECE], v_on[b : b + _PIECE], out=weight)
        np.add(weight, w_on[c : c + _PIECE], out=weight)
        if weight.max() - math.log(first) > best:
            score = weight - np.log(np.arange(first, first + _PIECE))
            if score.max() > best:
                best, index = float(score.max()), first + int(np.argmax(score))
    return index, best


def sample_indices(bits: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Indices as `select` gives them for chunks of these bits, by their law rather than by a search; float64.

    z ~ q wins at T = tau r with tau ~ Exp(1). Before it came all arrivals (t, z') with t < T and t / r' > tau: their
    number is Poisson's, of mean tau (r P_p(r' < r) - P_q(r' < r)).
    """
    mu = np.sqrt(2.0 * math.log(2.0) * np.asarray(bits, np.float64))
    z = mu + generator.standard_normal(mu.shape)
    cdf = np.vectorize(statistics.NormalDist().cdf, otypes=[np.float64])
    earlier = generator.standard_exponential(mu.shape) * (np.exp(mu * z - mu**2 / 2) * cdf(z) - cdf(z - mu))
    return generator.poisson(np.clip(earlier, 0.0, 1e18)).astype(np.float64)


def _rows(index: int, num_rows: int) -> tuple[int, int, int]:
    """The rows of a candidate. Each R candidates in a row have each row once, beside ever others."""
    shift, a = divmod(index, num_rows)
    shift_c, shift_b = divmod(shift, num_rows)
    b = (a + shift_b) % num_rows
    return a, b, (_third_row(a, b, num_rows) + shift_c) % num_rows


def _third_row(a, b, num_rows: int):
    """That beside two others in the first R^2 candidates, each of which has a pair of them; whole numbers or arrays."""
    return (a + (b - a) * _multiplier(num_rows)) & (num_rows - 1)


def _index(a: np.ndarray, b: np.ndarray, c: np.ndarray, num_rows: int) -> np.ndarray:
    """The candidate of these rows, int64."""
    shift_b, shift_c = (b - a) % num_rows, (c - _third_row(a, b, num_rows)) % num_rows
    return (shift_c * num_rows + shift_b) * num_rows + a


def _multiplier(num_rows: int) -> int:
    """Odd, and no simple fraction of R: the golden section of it."""
    return round(num_rows * (math.sqrt(5.0) - 1.0) / 2.0) | 1


def _project(shared: SharedRandomness, step: int, chunk: int, part: int, mu: np.ndarray, num_rows: int) -> np.ndarray:
    """<mu, row> of every row of a part, float32 [R]; in stretches, which bounds the memory."""
    shares = np.pad(mu, (0, -len(mu) % _BLOCK)).reshape(-1, _BLOCK)
    stretch = min(num_rows, max(1 << 10, (1 << 18) >> (len(shares) - 1).bit_length()))
    projections = []
    for first in range(0, num_rows, stretch):
        blocks = shared.blocks(step, chunk, part, first, stretch + len(shares) - 1)
        products = shares @ blocks.T
        projections.append(sum(products[i, i : i + stretch] for i in range(len(shares))))
    return np.concatenate(projections)


def _triples_above(u: np.ndarray, v: np.ndarray, w: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the candidates of a weight above `threshold`, int64, and their weights."""
    a, b = _pairs_above(u, v, threshold - w.max())
    pair, c = _pairs_above(u[a] + v[b], w, threshold)
    a, b = a[pair], b[pair]
    return _index(a, b, c, len(u)), u[a] + v[b] + w[c]


def _pairs_above(u: np.ndarray, v: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """The places (i, j) with u[i] + v[j] > threshold; the largest of the sums where they are more than 2^22."""
    top = float(u.max(initial=-np.inf)) + float(v.max())
    while _count_above(u, v, threshold) > _MAX_PAIRS:
        threshold = threshold + 0.1 * (top - threshold) + 1e-3
    i, j = _can_be_above(u, v, threshold)
    j = j[np.argsort(v[j])]
    first = np.searchsorted(v[j], threshold - u[i], side="right")
    counts = len(j) - first
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(i, counts), j[np.repeat(first, counts) + within]


def _count_above(u: np.ndarray, v: np.ndarray, threshold: float) -> int:
    """How many pairs are above."""
    i, j = _can_be_above(u, v, threshold)
    return len(i) * len(j) - int(np.searchsorted(np.sort(v[j]), np.sort(threshold - u[i]), side="right").sum())


def _can_be_above(u: np.ndarray, v: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Places in u and v whose values are above with the other's largest."""
    return np.flatnonzero(u > threshold - v.max()), np.flatnonzero(v > threshold - u.max(initial=-np.inf))
