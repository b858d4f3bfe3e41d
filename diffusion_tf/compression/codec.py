"""Images to bytes and back by a trained model (Section 4.3, Algorithms 3 and 4), over a coarse reverse process.

The decoder holds x_t, and shows the x_0 that the network predicts of it. One step sends x_s, s < t, as a sample of
q(x_s | x_t, x_0), by candidates of p(x_s | x_t), which is that posterior at the predicted x_0. So p has q's covariance
whatever the run's model_var_type, and the step costs (SNR(s) - SNR(t)) |x_0 - pred_xstart|^2 / 2 nats.
"""

import dataclasses
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from diffusion_tf.compression.bitstream import Steps
from diffusion_tf.compression.channel import SharedRandomness, draw, kl_bits, select
from diffusion_tf.compression.table import Table, predictor
from diffusion_tf.diffusion_utils import images_to_x
from diffusion_tf.trained_model import TrainedModel


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
      table: made for it; images are given in its batch size at most.

    Raises:
      InputError: the table's batch size is not divisible by the replicas.
    """

    def __init__(self, trained: TrainedModel, table: Table):
        self._table = table
        self._predict_of = predictor(trained, table.batch_size)
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
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for step in range(len(self._sigma)):
                mu = (x_start - predictions[-1]) * (self._xstart_coef[step] / self._sigma[step])
                mu = mu.reshape(len(images), -1)
                indices = self._select(step, shared, mu, pool)
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

    def _predict(self, step: int, x_t: np.ndarray) -> np.ndarray:
        """The x_0 that is shown after so many steps."""
        if not step:
            return np.broadcast_to(self._table.first_prediction, x_t.shape).copy()
        return self._predict_of(x_t, self._table.timesteps[step])

    def _select(
        self, step: int, shared: Sequence[SharedRandomness], mu: np.ndarray, pool: ThreadPoolExecutor
    ) -> list[list[int]]:
        """The indices of each image's chunks, all searched at once."""

        def search(chunk: int, part: np.ndarray, random: SharedRandomness) -> int:
            arrivals = np.random.default_rng([random.stream, step, chunk])
            return select(random, step, chunk, part, self._table.num_rows, arrivals)

        searches = []
        for random, row in zip(shared, mu, strict=True):
            num_chunks = self._table.chunks_of(kl_bits(row))
            chunks = np.array_split(random.rotate(step, row), num_chunks) if num_chunks else []
            searches.append([pool.submit(search, chunk, part, random) for chunk, part in enumerate(chunks)])
        return [[found.result() for found in image] for image in searches]

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
                draw(shared[image], step, chunk, width, index, self._table.num_rows)
                for chunk, (width, index) in enumerate(zip(widths, chosen or [0], strict=True))
            ]
            noise[image] = shared[image].rotate_back(step, np.concatenate(parts))
        mean = self._xstart_coef[step] * pred_xstart + self._x_t_coef[step] * x_t
        return (mean + self._sigma[step] * noise.reshape(x_t.shape)).astype(np.float32)
