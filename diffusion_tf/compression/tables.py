"""What the encoder and the decoder of a trained model agree on: a coarse reverse process and its entropy models."""

import dataclasses
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_tf.compression import CHUNK_BITS
from diffusion_tf.compression.bitstream import VERSION, StepModel
from diffusion_tf.compression.channel import SharedRandomness, rows_for
from diffusion_tf.compression.coarse_schedule import StepCosts, cheapest_path, max_chunks, num_chunks
from diffusion_tf.data.source import ImageReader, ImageSource
from diffusion_tf.diffusion_utils import images_to_x, x_to_images
from diffusion_tf.errors import ConfigError, InputError
from diffusion_tf.progress_bar import progress_bar
from diffusion_tf.rng import CounterRng
from diffusion_tf.storage.files import check_writable, first_line, write_file
from diffusion_tf.storage.json_files import read_json
from diffusion_tf.trained_model import TrainedModel

_MAX_TABLE_BYTES = 1 << 26
_MAX_FREQUENCIES = 1 << 17  # numbers in a frequency table
_GRID = 150  # timesteps that a coarse schedule is chosen from
_LARGE_DIMS = 1024  # for larger images, every fourth timestep of the grid is measured and the rest interpolated
_MEAN_IMAGES = 256  # training images behind the mean image


@dataclasses.dataclass(frozen=True)
class Table:
    """What encoder and decoder agree on beside the weights. A run's folder holds it as JSON with these names.

    Attributes:
      checkpoint: digest of the weights.
      precision: compute dtype of the network.
      image_shape: (H, W, C).
      batch_size: images of a network call, padded; float32 sums may differ in their last bits with another.
      chunk_bits: largest KL of a chunk, in bits.
      mean_image: mean training image, [H * W * C] in [0, 255]; the prediction before anything is sent.
      timesteps: the coarse schedule, from T - 1 down to 0.
      chunk_laws: frequencies of numbers of chunks in each step, as `StepModel` takes them.
      index_laws: frequencies of the number of bits of an index in each step, as `StepModel` takes them.
      residual_law: frequencies of image minus last prediction, modulo 256.
      version: of the files that it is for.
      chunk_means: mean numbers of chunks of the steps in units of 1 / 256, as `StepModel` takes them.
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
    version: int = 1
    chunk_means: tuple[int, ...] = ()

    def to_json(self) -> bytes:
        """The contents of the table's file."""
        fields = dataclasses.asdict(self)
        if self.version == 1:  # its file names neither
            del fields["version"], fields["chunk_means"]
        return (json.dumps(fields) + "\n").encode()

    @classmethod
    def read(cls, path: str) -> "Table":
        """Reads the table in the file at `path`.

        Raises:
          InputError: the file cannot be read, or is not a table.
        """
        value = read_json(path, max_bytes=_MAX_TABLE_BYTES)
        try:
            table = cls(**{key: _as_tuples(field) for key, field in value.items()})
            table._check()
            return table
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path} is not a compression table of this version ({first_line(error)}): remove it to make a new one"
            ) from error

    def _check(self) -> None:
        """Raises ValueError or TypeError if the table's numbers are not as `make_table` makes them."""
        height, width, channels = self.image_shape
        frequencies = (*self.chunk_laws, *self.index_laws, self.residual_law)
        settings = (self.batch_size, self.chunk_bits, self.version)
        numbers = (settings, self.image_shape, self.mean_image, self.timesteps, self.chunk_means, *frequencies)
        if not all(isinstance(number, int) and 0 <= number < 2**32 for number in itertools.chain(*numbers)):
            raise ValueError("its numbers must be integers in [0, 2^32)")
        if not len(self.timesteps) - 1 == len(self.chunk_laws) == len(self.index_laws):
            raise ValueError("its laws are not those of its steps")
        if len(self.chunk_means) != (len(self.chunk_laws) if self.version > 1 else 0):
            raise ValueError("its means are not those of its steps")
        if not all(0 < len(law) <= _MAX_FREQUENCIES and sum(law) for law in frequencies):
            raise ValueError("a law is empty, or too long")
        if len(self.residual_law) != 256:
            raise ValueError("its residual_law must have 256 entries")
        if len(self.mean_image) != height * width * channels or max(self.mean_image) > 255 or not self.batch_size:
            raise ValueError("its mean image is not an image")

    @property
    def digest(self) -> bytes:
        """Eight bytes that identify the table, and with it the weights."""
        return hashlib.sha256(self.to_json()).digest()[:8]

    @property
    def num_rows(self) -> int:
        """Rows of each segment of a chunk's candidates (`rows_for`)."""
        return rows_for(self.chunk_bits)

    def shared_randomness(self, stream: int) -> SharedRandomness:
        """The random numbers of a stream."""
        return SharedRandomness(stream, stride=1 if self.version > 1 else 16)

    @property
    def first_prediction(self) -> np.ndarray:
        """The mean image, float32 [H, W, C] in [-1, 1]: the expectation of x_0 while x_T says nothing about it."""
        # Differs from Algorithm 4, which shows the network's prediction from x_T. That is far from the expectation (an
        # RMSE of 136 on the digits, against 69 of the mean image), and the first step would pay for the difference.
        return images_to_x(np.array(self.mean_image, np.uint8).reshape(self.image_shape)).numpy()

    def step_models(self) -> list[StepModel]:
        """The entropy model of each step."""
        most = max_chunks(math.prod(self.image_shape))
        laws = enumerate(zip(self.chunk_laws, self.index_laws, strict=True))
        return [StepModel(chunks, indices, most, self.chunk_means[: step + 1]) for step, (chunks, indices) in laws]

    def num_chunks(self, bits: float) -> int:
        """Number of chunks of a step with a KL of `bits`."""
        return int(num_chunks(np.array(bits), self.chunk_bits, math.prod(self.image_shape)))


class TableStore:
    """The tables of one checkpoint, one for each `chunk_bits`, as JSON files in a folder.

    Args:
      folder: folder of the files, by convention `compression` in the run's; may be gs://.
      trained: the network with the checkpoint's EMA weights.
      checkpoint_digest: digest of the checkpoint (`checkpoints.load_digest`).
      step: step of the checkpoint; part of the files' names.
      open_train: opens the training images; called only to make a table.
      batch_size: images of a network call, over all replicas. Default: the table's, or for a new table 1 to 100 for
        each replica, fewer for larger images.
      num_images: training images from which a new table is made. Default: 256 for the digits, 5 for CIFAR-10.
      seed: seed of a new table's noise.
      new_folder: folder of a new table's file; default: `folder`.
    """

    def __init__(
        self,
        folder: str,
        trained: TrainedModel,
        checkpoint_digest: str,
        step: int,
        *,
        open_train: Callable[[], ImageSource],
        batch_size: int | None = None,
        num_images: int | None = None,
        seed: int = 0,
        new_folder: str | None = None,
    ):
        num_dims = math.prod(trained.preset.image_shape)
        self.trained = trained
        self._folder, self._new_folder = folder, new_folder or folder
        self._digest, self._step = checkpoint_digest, step
        self._open_train, self._batch_size, self._seed = open_train, batch_size, seed
        # A larger image has more chunks to learn from, and takes the network more time.
        self._num_images = num_images or int(np.clip(100_000 // num_dims, 4, 256))

    def path(self, chunk_bits: int, version: int = VERSION) -> str:
        """The path of a table's file."""
        suffix = f"_v{version}" if version > 1 else ""
        name = f"step_{self._step:08d}_bits_{chunk_bits}{suffix}.json"
        there = os.path.join(self._folder, name)
        return there if tf.io.gfile.exists(there) else os.path.join(self._new_folder, name)

    def get(self, chunk_bits: int, version: int = VERSION) -> Table:
        """The table for chunks of at most `chunk_bits`, made and written if its file does not exist.

        To make it takes up to 150 network evaluations for each of `num_images` images. A table of version 1 is
        read, but not made.

        Raises:
          InputError: the file is damaged, or was made for other weights, another precision or batch size; or there is
            no table of version 1.
        """
        if chunk_bits not in CHUNK_BITS:
            raise ConfigError("chunk_bits", f"={chunk_bits} must be from {CHUNK_BITS[0]} to {CHUNK_BITS[-1]}")
        path = self.path(chunk_bits, version)
        if not tf.io.gfile.exists(path):
            if version < VERSION:
                raise InputError(
                    f"files of version {version} need the table that they were made with: {path} is missing"
                )
            check_writable(path)
            table = self._make(chunk_bits)
            write_file(path, table.to_json())
            return table
        table = Table.read(path)
        if (table.checkpoint, table.precision) != (self._digest, self.trained.preset.precision):
            raise InputError(f"{path} was made for other weights or another `precision`: remove it to make a new one")
        if self._batch_size not in (None, table.batch_size):
            raise ConfigError(
                "batch_size", f"={self._batch_size}: {path} was made for {table.batch_size}: leave `batch_size` out"
            )
        return table

    def _make(self, chunk_bits: int) -> Table:
        num_dims = math.prod(self.trained.preset.image_shape)
        replicas = self.trained.strategy.num_replicas_in_sync
        source = self._open_train()
        images = ImageReader(source)(0, min(max(_MEAN_IMAGES, self._num_images), source.num_examples))
        return make_table(
            self.trained,
            self._digest,
            images,
            num_predicted=self._num_images,
            chunk_bits=chunk_bits,
            batch_size=self._batch_size or replicas * int(np.clip(6000 // num_dims, 1, 100)),
            seed=self._seed,
        )


def predictor(trained: TrainedModel, batch_size: int) -> Callable[[np.ndarray, int], np.ndarray]:
    """predict(x_t, t): the clipped pred_xstart of x_t [N <= batch_size, H, W, C], all at timestep t.

    It raises NotFiniteError if a prediction is not finite.

    Raises:
      InputError: the batch size is not divisible by the replicas.
    """

    def predict(_: tf.Tensor, x_t: tf.Tensor, t: tf.Tensor) -> tf.Tensor:
        denoise_fn = trained.denoise_fn()
        return trained.diffusion.p_mean_variance(denoise_fn, x_t, t, clip_denoised=True).pred_xstart

    call = trained.over_replicas(predict, batch_size)

    def checked(x_t: np.ndarray, t: int) -> np.ndarray:
        pred_xstart = call(0, x_t, np.full(len(x_t), t, np.int32)).numpy()
        trained.check_finite(pred_xstart, "predictions from x_t of the batch's images", t=t)
        return pred_xstart

    return checked


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
    """Chooses the coarse schedule and the entropy models by what the steps would cost for training images.

    Args:
      trained: the network, and where it runs.
      checkpoint: digest of its weights.
      images: training images, uint8 [N, H, W, C]; the mean image is that of all of them.
      num_predicted: how many of them the network predicts: 150 evaluations each, 38 for large images.
      chunk_bits: largest KL of a chunk, in bits.
      batch_size: images of a network call, over all replicas.
      seed: seed of the noise.
    """
    last = trained.diffusion.num_timesteps - 1
    timesteps = np.unique(np.round(last * np.linspace(0.0, 1.0, _GRID) ** 2).astype(int))[::-1]
    mean_image = np.round(images.mean(axis=0)).astype(int)
    images = images[:num_predicted]
    # Errors change smoothly from one timestep to the next.
    stride = 1 if images[0].size <= _LARGE_DIMS else 4
    measured = np.unique([*range(0, len(timesteps), stride), len(timesteps) - 1])
    measured_errors, last_prediction = _predictions(trained, images, timesteps[measured], batch_size, seed)
    places = np.arange(len(timesteps))
    errors = np.stack([np.interp(places, measured, column) for column in measured_errors.T], axis=1)
    errors[0] = np.square((images - mean_image) / 127.5).sum(axis=(1, 2, 3))
    abar = trained.diffusion.schedule.alphas_cumprod[timesteps]
    costs = StepCosts(errors, abar / (1.0 - abar), chunk_bits, math.prod(images.shape[1:]), seed)
    path = cheapest_path(len(timesteps), costs.costs_into, costs.max_overhead)
    laws = costs.laws(path)
    residual = (images - x_to_images(last_prediction).numpy()).reshape(-1)
    return Table(
        checkpoint=checkpoint,
        precision=trained.preset.precision,
        image_shape=tuple(trained.preset.image_shape),
        batch_size=batch_size,
        chunk_bits=chunk_bits,
        mean_image=tuple(mean_image.reshape(-1).tolist()),
        timesteps=tuple(int(t) for t in timesteps[path]),
        chunk_laws=laws.chunk_laws,
        index_laws=laws.index_laws,
        residual_law=tuple((1 + 4 * np.bincount(residual, minlength=256)).tolist()),
        version=VERSION,
        chunk_means=laws.chunk_means,
    )


def _predictions(
    trained: TrainedModel, images: np.ndarray, timesteps: np.ndarray, batch_size: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """|x_0 - pred_xstart|^2 for x_t ~ q(x_t | x_0), float64 [K, N], and the last pred_xstart [N, H, W, C]."""
    predict = predictor(trained, batch_size)
    x_start = images_to_x(images).numpy()
    pred_xstart = np.empty_like(x_start)
    errors = np.empty((len(timesteps), len(images)))
    for i, t in enumerate(progress_bar(timesteps, unit="timestep", desc="compression table")):
        for first in range(0, len(images), batch_size):
            x = x_start[first : first + batch_size]
            noise = CounterRng(seed, int(t), first).normal("compression", x.shape)
            x_t = trained.diffusion.q_sample(x, tf.fill([len(x)], int(t)), noise)
            pred_xstart[first : first + batch_size] = predict(x_t, int(t))
        errors[i] = np.square(x_start - pred_xstart, dtype=np.float64).sum(axis=(1, 2, 3))
    return errors, pred_xstart


def _as_tuples(value: Any) -> Any:
    """JSON's lists, at any depth, as tuples."""
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value
