"""What encoder and decoder of a trained model agree on: a coarse reverse process, and how likely its contents are."""

import dataclasses
import hashlib
import itertools
import json
import math
import statistics
from collections.abc import Callable

import numpy as np
import tensorflow as tf
import tqdm

from diffusion_tf.compression.bitstream import INDEX_LENGTHS, StepLaw
from diffusion_tf.compression.channel import rows_for, sample_indices
from diffusion_tf.diffusion_utils import images_to_x, x_to_images
from diffusion_tf.errors import InputError
from diffusion_tf.rng import CounterRng
from diffusion_tf.storage.files import first_line, read_json
from diffusion_tf.trained_model import TrainedModel

_MAX_TABLE_BYTES = 1 << 26
_MAX_LAW = 1 << 17  # numbers
_GRID = 150  # timesteps that a coarse schedule may consist of
_LARGE_DIMS = 1024  # of images for whose networks each third of those timesteps is enough
_NEGLIGIBLE_BITS = 0.01  # a step of less sends nothing
_DIMS_PER_CHUNK = 6  # at least: two in each of a candidate's parts
_MAX_OVERHEAD = 0.33  # of the bits that say a number of whole steps, beyond the steps' KL
_TAIL_BITS = 1.5  # of those bits: until the last step is certain, whatever may follow
_PENALTY = 100.0  # of the search for a schedule, for each bit
_MU_STEP = 0.125  # of the lengths of mu that the laws of indices are known for
_SAMPLES = 1 << 14  # of each of those laws


@dataclasses.dataclass(frozen=True)
class Table:
    """What encoder and decoder agree on beside the weights; a run's folder holds it as JSON.

    Attributes:
      checkpoint: digest of the weights.
      precision: of the network's products.
      image_shape: (H, W, C).
      batch_size: of the network's calls, filled up: float32 sums may change in their last bits with it.
      chunk_bits: the KL of a chunk, at most.
      mean_image: of the training images, [H * W * C] in [0, 255]: what is predicted before anything is sent.
      timesteps: the coarse schedule, T - 1 down to 0.
      chunk_laws, index_laws: of each step, as `StepLaw` takes them.
      residual_law: of the image minus the last prediction, modulo 256.
    """

    checkpoint: str
    precision: str
    image_shape: tuple[int, ...]
    batch_size: int
    chunk_bits: int
    mean_image: tuple[int, ...]
    timesteps: tuple[int, ...]
    chunk_laws: tuple[tuple[int, ...], ...]
    index_laws: tuple[tuple[int, ...], ...]
    residual_law: tuple[int, ...]

    def to_json(self) -> bytes:
        """The table as a file."""
        return (json.dumps(dataclasses.asdict(self)) + "\n").encode()

    @classmethod
    def read(cls, path: str) -> "Table":
        """The table of a file.

        Raises:
          InputError: it cannot be read, or is no table.
        """
        value = read_json(path, _MAX_TABLE_BYTES)
        try:
            table = cls(**{key: _as_tuples(field) for key, field in value.items()})
            table._check()
            return table
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path} is no table of this version ({first_line(error)}): remove it to make it anew"
            ) from error

    def _check(self) -> None:
        """Raises ValueError or TypeError where the table's numbers are not such as `make_table` gives."""
        height, width, channels = self.image_shape
        laws = (*self.chunk_laws, *self.index_laws, self.residual_law)
        for numbers in (self.image_shape, self.mean_image, self.timesteps, (self.batch_size, self.chunk_bits), *laws):
            if not all(isinstance(number, int) and 0 <= number < 2**32 for number in numbers):
                raise ValueError("its numbers are whole and not negative")
        if not len(self.timesteps) - 1 == len(self.chunk_laws) == len(self.index_laws):
            raise ValueError("it has laws of other steps")
        if not all(0 < len(law) <= _MAX_LAW and sum(law) for law in laws) or len(self.residual_law) != 256:
            raise ValueError("a law is missing")
        if len(self.mean_image) != height * width * channels or max(self.mean_image) > 255 or not self.batch_size:
            raise ValueError("its image is none")

    @property
    def digest(self) -> bytes:
        """Eight bytes that tell it from other tables, and its weights from other weights."""
        return hashlib.sha256(self.to_json()).digest()[:8]

    @property
    def num_rows(self) -> int:
        """Of each part of a chunk's candidates."""
        return rows_for(self.chunk_bits)

    @property
    def first_prediction(self) -> np.ndarray:
        """The mean image, float32 [H, W, C] in [-1, 1]: the expectation of x_0 while x_T says nothing of it."""
        # Differs from Algorithm 4, which shows what the network makes of x_T. That is far from the expectation (an RMSE
        # of 136 on the digits, in place of 69), and the first step would pay for it.
        return images_to_x(np.array(self.mean_image, np.uint8).reshape(self.image_shape)).numpy()

    def step_laws(self) -> list[StepLaw]:
        """The laws of the steps' contents."""
        most = _max_chunks(math.prod(self.image_shape))
        return [StepLaw(*laws, most) for laws in zip(self.chunk_laws, self.index_laws, strict=True)]

    def chunks_of(self, bits: float) -> int:
        """Into how many chunks a step of this KL is cut."""
        return int(_chunks_of(np.array(bits), self.chunk_bits, math.prod(self.image_shape)))


def predictor(trained: TrainedModel, batch_size: int) -> Callable[[np.ndarray, int], np.ndarray]:
    """predict(x_t, t): the x_0 that the network predicts of x_t [N <= batch_size, H, W, C], clipped, all at time t.

    Raises:
      InputError: the batch size is not divisible by the replicas.
    """

    def predict(_, x_t, t):
        denoise_fn = trained.denoise_fn()
        return trained.diffusion.p_mean_variance(denoise_fn, x_t, t, clip_denoised=True).pred_xstart

    call = trained.over_replicas(predict, batch_size)
    return lambda x_t, t: call(0, x_t, np.full(len(x_t), t, np.int32)).numpy()


def make_table(
    trained: TrainedModel,
    checkpoint: str,
    images: np.ndarray,
    *,
    num_predicted: int,
    chunk_bits: int,
    batch_size: int,
    seed: int,
) -> Table:
    """Chooses the coarse schedule and the laws, by what the steps would cost for training images uint8 [N, H, W, C].

    The first `num_predicted` of them take at most 150 network evaluations each, or 50 where they are large; the mean
    image is that of all.
    """
    last = trained.diffusion.num_timesteps - 1
    timesteps = np.unique(np.round(last * np.linspace(0.0, 1.0, _GRID) ** 2).astype(int))[::-1]
    mean_image = np.round(images.mean(axis=0)).astype(int)
    images = images[:num_predicted]
    # Between neighbours errors change smoothly.
    stride = 1 if images[0].size <= _LARGE_DIMS else 3
    seen = np.unique([*range(0, len(timesteps), stride), len(timesteps) - 1])
    seen_errors, final = _predictions(trained, images, timesteps[seen], batch_size, seed)
    errors = np.stack([np.interp(np.arange(len(timesteps)), seen, column) for column in seen_errors.T], axis=1)
    errors[0] = np.square((images - mean_image) / 127.5).sum(axis=(1, 2, 3))
    abar = trained.diffusion.schedule.alphas_cumprod[timesteps]
    costs = StepCosts(errors, abar / (1.0 - abar), chunk_bits, math.prod(images.shape[1:]), seed)
    path = cheapest_path(len(timesteps), costs.costs_into, costs.max_overhead)
    laws = [costs.laws(i, j) for i, j in itertools.pairwise(path)]
    residual = (images - x_to_images(final).numpy()).reshape(-1)
    return Table(
        checkpoint,
        trained.preset.precision,
        tuple(trained.preset.image_shape),
        batch_size,
        chunk_bits,
        tuple(mean_image.reshape(-1).tolist()),
        tuple(int(t) for t in timesteps[path]),
        tuple(chunk_law for chunk_law, _ in laws),
        tuple(index_law for _, index_law in laws),
        tuple((1 + 4 * np.bincount(residual, minlength=256)).tolist()),
    )


class StepCosts:
    """What steps from a time i to a later place j of a grid of K times cost.

    Args:
      errors: |x_0 - pred_xstart|^2 of N images at these times, float64 [K, N].
      snr: at these times, float64 [K].
      chunk_bits: the KL of a chunk, at most.
      num_dims: of an image.
      seed: of the laws' samples.
    """

    def __init__(self, errors: np.ndarray, snr: np.ndarray, chunk_bits: int, num_dims: int, seed: int):
        self._errors, self._snr, self._chunk_bits, self._num_dims = errors, snr, chunk_bits, num_dims
        self._lengths_of = _index_length_laws(2.0 * chunk_bits, np.random.default_rng(seed))
        # Small chunks cost more even if all are full.
        full_chunk = float(_index_bits(self._lengths_of[_mu_place(np.array(float(chunk_bits)))]))
        self.max_overhead = max(_MAX_OVERHEAD, 1.1 * (full_chunk / chunk_bits - 1.0))

    def costs_into(self, j: int) -> tuple[np.ndarray, np.ndarray]:
        """Mean KL, and bits to send, of the steps from 0, 1, ..., j - 1 to j: float64 [j], [j]."""
        bits, chunks = self._contents(np.arange(j), j)
        counts = _histograms(chunks, np.ones_like(bits), chunks.max() + 1)
        send = _entropy(counts) + chunks.mean(axis=1) * _index_bits(self._lengths(bits, chunks))
        # Chunks that are too large for honest samples, since they cannot be more, are no bargain.
        too_much = np.maximum(0.0, bits - self._chunk_bits * _max_chunks(self._num_dims)).mean(axis=1)
        return bits.mean(axis=1), send + _PENALTY * too_much

    def laws(self, i: int, j: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """How often 0, 1, ... chunks are in a step, and how many bits an index's successor has after its first."""
        bits = self._spread(self._contents(np.array([i]), j)[0])
        chunks = _chunks_of(bits, self._chunk_bits, self._num_dims)
        counts = _histograms(chunks, np.ones_like(bits), 2 * chunks.max() + 3)[0]
        lengths = self._lengths(bits, chunks)[0]
        return _whole_numbers(2**14 * counts), _whole_numbers(2**16 * lengths)

    def _spread(self, bits: np.ndarray) -> np.ndarray:
        """KLs of a step [1, N] as those of more images may be, [1, 32 N]: a normal kernel of Silverman's width."""
        width = 1.06 * bits.std() * bits.size**-0.2 + 0.25 * bits.mean() / bits.size
        places = [statistics.NormalDist().inv_cdf((k + 0.5) / 32) for k in range(32)]
        return np.maximum(0.0, bits + width * np.array(places)[:, None]).reshape(1, -1)

    def _lengths(self, bits: np.ndarray, chunks: np.ndarray) -> np.ndarray:
        """How likely an index's successor has 0, 1, ... bits after its first in these steps, float64 [steps, 61]."""
        places = _mu_place(bits / np.maximum(chunks, 1))
        return _histograms(places, chunks, len(self._lengths_of)) @ self._lengths_of

    def _contents(self, i: np.ndarray, j: int) -> tuple[np.ndarray, np.ndarray]:
        """KLs of the steps in bits, float64 [len(i), N], and numbers of chunks."""
        bits = (self._snr[j] - self._snr[i])[:, None] * self._errors[i] / (2.0 * math.log(2.0))
        return bits, _chunks_of(bits, self._chunk_bits, self._num_dims)


def cheapest_path(
    num_places: int, costs_into: Callable[[int], tuple[np.ndarray, np.ndarray]], max_overhead: float
) -> list[int]:
    """The places 0 = i_0 < i_1 < ... < num_places - 1 of the fewest bits, by dynamic programming.

    Paths are avoided by which some prefix takes more than 1 + max_overhead times its KL. What came before a place is
    kept for its cheapest path alone, so that this is no exact minimum.

    Args:
      num_places: how many there are.
      costs_into: (KL, bits) of the steps from 0, 1, ..., j - 1 to j.
      max_overhead: of a prefix.
    """
    scores, kls, bits, before = np.zeros((4, num_places))
    for j in range(1, num_places):
        step_kl, step_bits = costs_into(j)
        kl, total = kls[:j] + step_kl, bits[:j] + step_bits
        excess = total + _TAIL_BITS * (total > _NEGLIGIBLE_BITS) - (1.0 + max_overhead) * kl
        score = scores[:j] + step_bits + _PENALTY * np.maximum(0.0, excess)
        i = int(np.argmin(score))
        scores[j], kls[j], bits[j], before[j] = score[i], kl[i], total[i], i
    path = [num_places - 1]
    while path[-1]:
        path.append(int(before[path[-1]]))
    return path[::-1]


def _predictions(
    trained: TrainedModel, images: np.ndarray, timesteps: np.ndarray, batch_size: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """|x_0 - pred_xstart|^2 of x_t ~ q(x_t | x_0), float64 [K, N]; and the last pred_xstart [N, H, W, C]."""
    predict = predictor(trained, batch_size)
    x_start = images_to_x(images).numpy()
    pred_xstart = np.empty_like(x_start)
    errors = np.empty((len(timesteps), len(images)))
    for i, t in enumerate(tqdm.tqdm(timesteps, unit="timestep", desc="compression table")):
        for first in range(0, len(images), batch_size):
            x = x_start[first : first + batch_size]
            noise = CounterRng(seed, int(t), first).normal("compression", x.shape)
            x_t = trained.diffusion.q_sample(x, tf.fill([len(x)], int(t)), noise)
            pred_xstart[first : first + batch_size] = predict(x_t, int(t))
        errors[i] = np.square(x_start - pred_xstart, dtype=np.float64).sum(axis=(1, 2, 3))
    return errors, pred_xstart


def _chunks_of(bits: np.ndarray, chunk_bits: int, num_dims: int) -> np.ndarray:
    chunks = np.clip(np.ceil(bits / chunk_bits), 1, _max_chunks(num_dims)).astype(int)
    return np.where(bits < _NEGLIGIBLE_BITS, 0, chunks)


def _max_chunks(num_dims: int) -> int:
    return max(1, num_dims // _DIMS_PER_CHUNK)


def _index_length_laws(max_bits: float, generator: np.random.Generator) -> np.ndarray:
    """How likely an index's successor has 0, 1, ... bits after its first, for |mu| = 0, 0.125, ...: [M, 61]."""
    mu = np.arange(0.0, math.sqrt(2.0 * math.log(2.0) * max_bits) + _MU_STEP, _MU_STEP)
    bits = np.repeat(mu**2 / (2.0 * math.log(2.0)), _SAMPLES).reshape(len(mu), _SAMPLES)
    indices = np.minimum(sample_indices(bits, generator), 2.0**60 - 1.0)
    lengths = np.floor(np.log2(indices + 1.0)).astype(int)
    return _histograms(lengths, np.ones_like(bits), INDEX_LENGTHS)


def _mu_place(bits: np.ndarray) -> np.ndarray:
    """The law that is nearest to chunks of these KLs."""
    return np.round(np.sqrt(2.0 * math.log(2.0) * bits) / _MU_STEP).astype(int)


def _index_bits(lengths: np.ndarray) -> np.ndarray:
    """What an index costs whose successor has so many bits after its first with these probabilities."""
    return _entropy(lengths) + lengths @ np.arange(INDEX_LENGTHS)


def _histograms(values: np.ndarray, weights: np.ndarray, size: int) -> np.ndarray:
    """How likely 0, 1, ..., size - 1 (and more) are in each row of `values`: float64 [rows, size]."""
    places = np.arange(len(values))[:, None] * size + np.minimum(values, size - 1)
    counts = np.bincount(places.reshape(-1), weights.reshape(-1), minlength=len(values) * size).reshape(-1, size)
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1e-12)


def _entropy(probabilities: np.ndarray) -> np.ndarray:
    """In bits, of each row."""
    return -np.sum(probabilities * np.log2(np.maximum(probabilities, 1e-12)), axis=-1)


def _whole_numbers(law: np.ndarray) -> tuple[int, ...]:
    return tuple((1 + np.round(law).astype(int)).tolist())


def _as_tuples(value):
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value
