"""Images to bytes and back by a trained model (Section 4.3, Algorithms 3 and 4), over a coarse reverse process.

The decoder holds x_t, and shows the x_0 that the network predicts of it. One step sends x_s, s < t, as a sample of
q(x_s | x_t, x_0), by candidates of p(x_s | x_t), which is that posterior at the predicted x_0. So p has q's covariance
whatever the run's model_var_type, and the step costs (SNR(s) - SNR(t)) |x_0 - pred_xstart|^2 / 2 nats.
"""

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tensorflow as tf
import tqdm

from diffusion_tf.compression.bitstream import StepLaw, Steps
from diffusion_tf.compression.channel import NUM_CANDIDATES, SharedRandomness, draw, kl_bits, sample_indices, select
from diffusion_tf.diffusion_utils import images_to_x, x_to_images
from diffusion_tf.distribution import over_replicas
from diffusion_tf.errors import InputError
from diffusion_tf.rng import CounterRng
from diffusion_tf.trained_model import TrainedModel

_GRID = 150  # timesteps that a coarse schedule may consist of
_CHUNK_OVERHEAD_BITS = 3.3  # of an index beyond its KL
_STEP_OVERHEAD_BITS = 0.5  # of the number of chunks
_NEGLIGIBLE_BITS = 0.01  # a step of less sends nothing
_DIMS_PER_CHUNK = 6  # at least: two in each of a candidate's parts
_SAMPLES_PER_IMAGE = 64  # of the indices' law


@dataclasses.dataclass(frozen=True)
class Table:
    """What encoder and decoder agree on beside the weights; a run's folder holds it as JSON.

    Attributes:
      checkpoint: digest of the weights.
      precision: of the network's products.
      image_shape: (H, W, C).
      chunk_bits: the KL of a chunk, at most.
      timesteps: the coarse schedule, T - 1 down to 0.
      chunk_laws, index_laws: of each step, as `StepLaw` takes them.
      residual_law: of the image minus the last prediction, modulo 256.
    """

    checkpoint: str
    precision: str
    image_shape: tuple[int, ...]
    chunk_bits: int
    timesteps: tuple[int, ...]
    chunk_laws: tuple[tuple[int, ...], ...]
    index_laws: tuple[tuple[int, ...], ...]
    residual_law: tuple[int, ...]

    def to_json(self) -> bytes:
        """The table as a file."""
        return (json.dumps(dataclasses.asdict(self)) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes, name: str) -> "Table":
        """The table of a file.

        Raises:
          InputError: it is none, and is named `name`.
        """
        try:
            table = cls(**{key: _as_tuples(value) for key, value in json.loads(data).items()})
            table.step_laws()
            return table
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{name} is no table of this version ({error}): remove it to make it anew") from error

    @property
    def digest(self) -> bytes:
        """Eight bytes that tell it from other tables, and its weights from other weights."""
        return hashlib.sha256(self.to_json()).digest()[:8]

    def step_laws(self) -> list[StepLaw]:
        """The laws of the steps' contents."""
        return [StepLaw(*laws) for laws in zip(self.chunk_laws, self.index_laws, strict=True)]


def _as_tuples(value):
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


@dataclasses.dataclass(frozen=True)
class Encoded:
    """What the steps of N images say, and what a decoder shows after 0, 1, ..., S of them.

    Attributes:
      steps: of each image its steps' indices.
      kl_bits: KL(q || p) of each step, float64 [N, S].
      pred_xstart: float32 [S + 1, N, H, W, C] in [-1, 1].
    """

    steps: list[Steps]
    kl_bits: np.ndarray
    pred_xstart: np.ndarray


class Codec:
    """Encodes and decodes images of a trained model.

    Args:
      trained: the network, and where it runs.
      table: made for it.
      batch_size: images of one call at most, over all replicas.

    Raises:
      InputError: the batch size is not divisible by the replicas.
    """

    def __init__(self, trained: TrainedModel, table: Table, batch_size: int):
        self._table = table
        predict = predictor(trained, batch_size)
        self._predict = lambda step, x_t: predict(x_t, table.timesteps[step])
        schedule = trained.diffusion.schedule
        t, s = np.array(table.timesteps[:-1]), np.array(table.timesteps[1:])
        # q(x_s | x_t, x_0): Eqs. 6-7 for a step of any length.
        abar_t, abar_s = schedule.alphas_cumprod[t], schedule.alphas_cumprod[s]
        alpha = abar_t / abar_s
        self._xstart_coef = np.sqrt(abar_s) * (1 - alpha) / (1 - abar_t)
        self._x_t_coef = np.sqrt(alpha) * (1 - abar_s) / (1 - abar_t)
        self._sigma = np.sqrt((1 - abar_s) * (1 - alpha) / (1 - abar_t))

    def encode(self, images: np.ndarray, streams: Sequence[int]) -> Encoded:
        """Encodes images uint8 [N, H, W, C], each with a stream of its own, to the end."""
        x_start = images_to_x(images).numpy()
        shared = [SharedRandomness(stream) for stream in streams]
        x_t = np.stack([random.prior_sample(x_start.shape[1:]) for random in shared])
        steps: list[Steps] = [[] for _ in images]
        kls, predictions = [], [self._predict(0, x_t)]
        with ThreadPoolExecutor() as pool:
            for step in range(len(self._sigma)):
                mu = (x_start - predictions[-1]) * (self._xstart_coef[step] / self._sigma[step])
                mu = mu.reshape(len(images), -1)
                indices = list(pool.map(lambda *args: self._select(step, *args), shared, mu))  # noqa: B023
                for image, chosen in enumerate(indices):
                    steps[image].append(chosen)
                kls.append([kl_bits(row) for row in mu])
                x_t = self._next(step, x_t, predictions[-1], shared, indices)
                predictions.append(self._predict(step + 1, x_t))
        return Encoded(steps, np.array(kls).T, np.stack(predictions))

    def decode(self, steps: Sequence[Steps], streams: Sequence[int]) -> np.ndarray:
        """What the decoder shows of images after as many steps as there are of each: float32 [N, H, W, C]."""
        shared = [SharedRandomness(stream) for stream in streams]
        x_t = np.stack([random.prior_sample(self._table.image_shape) for random in shared])
        pred_xstart = self._predict(0, x_t)
        for step in range(max(map(len, steps))):
            going_on = [image for image, sent in enumerate(steps) if len(sent) > step]
            indices = [steps[image][step] for image in going_on]
            random = [shared[image] for image in going_on]
            x_t[going_on] = self._next(step, x_t[going_on], pred_xstart[going_on], random, indices)
            pred_xstart[going_on] = self._predict(step + 1, x_t)[going_on]
        return pred_xstart

    def _select(self, step: int, shared: SharedRandomness, mu: np.ndarray) -> list[int]:
        """The indices of one image's chunks."""
        num_chunks = int(chunks_of(kl_bits(mu), self._table.chunk_bits, len(mu)))
        chunks = np.array_split(shared.rotate(step, mu), num_chunks) if num_chunks else []
        arrivals = np.random.default_rng([shared.stream, step])
        return [select(shared, step, chunk, part, arrivals) for chunk, part in enumerate(chunks)]

    def _next(
        self,
        step: int,
        x_t: np.ndarray,
        pred_xstart: np.ndarray,
        shared: Sequence[SharedRandomness],
        indices: Sequence[Sequence[int]],
    ) -> np.ndarray:
        """x_s of the images, float32 [N, H, W, C]; where nothing is sent, it is a sample of p."""
        num_dims = math.prod(x_t.shape[1:])
        noise = np.empty((len(x_t), num_dims))
        for image, chosen in enumerate(indices):
            widths = [len(part) for part in np.array_split(np.empty(num_dims), max(1, len(chosen)))]
            parts = [
                draw(shared[image], step, chunk, width, index)
                for chunk, (width, index) in enumerate(zip(widths, chosen or [0], strict=True))
            ]
            noise[image] = shared[image].rotate_back(step, np.concatenate(parts))
        mean = self._xstart_coef[step] * pred_xstart + self._x_t_coef[step] * x_t
        return (mean + self._sigma[step] * noise.reshape(x_t.shape)).astype(np.float32)


def predictor(trained: TrainedModel, batch_size: int):
    """predict(x_t, t): the x_0 that the network predicts of x_t [N <= batch_size, H, W, C], clipped, all at time t."""

    def predict(_, x_t, t):
        denoise_fn = trained.denoise_fn()
        return trained.diffusion.p_mean_variance(denoise_fn, x_t, t, clip_denoised=True).pred_xstart

    call = over_replicas(predict, trained.strategy, batch_size)
    return lambda x_t, t: call(0, x_t, np.full(len(x_t), t, np.int32)).numpy()


def chunks_of(bits, chunk_bits: int, num_dims: int) -> np.ndarray:
    """Into how many chunks steps of these KLs are cut, int of the shape of `bits`."""
    bits = np.asarray(bits)
    chunks = np.clip(np.ceil(bits / chunk_bits), 1, max(1, num_dims // _DIMS_PER_CHUNK)).astype(int)
    return np.where(bits < _NEGLIGIBLE_BITS, 0, chunks)


# --- The table ---------------------------------------------------------------------------------------------


def make_table(
    trained: TrainedModel, checkpoint: str, images: np.ndarray, *, chunk_bits: int, batch_size: int, seed: int
) -> Table:
    """Chooses the coarse schedule and the laws, by what the steps would cost for training images uint8 [N, H, W, C].

    At most 150 network evaluations an image.
    """
    last = trained.diffusion.num_timesteps - 1
    timesteps = np.unique(np.round(last * np.linspace(0.0, 1.0, _GRID) ** 2).astype(int))[::-1]
    errors, final = _predictions(trained, images, timesteps, batch_size, seed)
    abar = trained.diffusion.schedule.alphas_cumprod[timesteps]
    kl = lambda i, j: (abar[j] / (1 - abar[j]) - abar[i] / (1 - abar[i])) * errors[i] / (2.0 * math.log(2.0))
    to_chunks = lambda bits: chunks_of(bits, chunk_bits, math.prod(images.shape[1:]))

    def cost(i: int, j: int) -> float:
        bits = kl(i, j)
        return np.mean(bits + _CHUNK_OVERHEAD_BITS * to_chunks(bits)) + _STEP_OVERHEAD_BITS

    path = cheapest_path(len(timesteps), cost)
    generator = np.random.default_rng(seed)
    chunk_laws, index_laws = [], []
    for i, j in itertools.pairwise(path):
        chunks = to_chunks(kl(i, j))
        chunk_laws.append(_smooth_law(chunks))
        index_laws.append(_index_law(np.repeat(kl(i, j) / np.maximum(chunks, 1), chunks), generator))
    residual = (images - x_to_images(final).numpy()).reshape(-1)
    return Table(
        checkpoint,
        trained.preset.precision,
        tuple(trained.preset.image_shape),
        chunk_bits,
        tuple(int(t) for t in timesteps[path]),
        tuple(chunk_laws),
        tuple(index_laws),
        tuple((1 + 4 * np.bincount(residual, minlength=256)).tolist()),
    )


def cheapest_path(num_places: int, cost: Callable[[int, int], float]) -> list[int]:
    """The places 0 = i_0 < i_1 < ... < num_places - 1 of the least sum of cost(i_k, i_k+1), by dynamic programming."""
    totals, before = [0.0], [0]
    for j in range(1, num_places):
        candidates = [totals[i] + cost(i, j) for i in range(j)]
        before.append(int(np.argmin(candidates)))
        totals.append(candidates[before[-1]])
    path = [num_places - 1]
    while path[-1]:
        path.append(before[path[-1]])
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


def _smooth_law(values: np.ndarray) -> tuple[int, ...]:
    """How often 0, 1, ... twice the largest occur, with a thirtieth of each count's weight on either neighbour."""
    counts = np.bincount(values, minlength=2 * values.max() + 3)
    return tuple((1 + np.convolve(counts, [1, 30, 1], mode="same")).tolist())


def _index_law(bits: np.ndarray, generator: np.random.Generator) -> tuple[int, ...]:
    """How often an index's successor has 0, 1, ... bits after its first, for chunks of these KLs."""
    samples = sample_indices(np.repeat(bits, _SAMPLES_PER_IMAGE), generator)
    lengths = np.floor(np.log2(samples + 1.0)).astype(int)
    return tuple((1 + np.bincount(lengths, minlength=NUM_CANDIDATES.bit_length())).tolist())
