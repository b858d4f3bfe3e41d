"""Images to chunk indices and back (Section 4.3, Algorithms 3 and 4), over a coarse reverse process.

The decoder holds x_t and shows the network's pred_xstart. A step sends x_s, s < t, as a sample of q(x_s | x_t, x_0),
chosen among candidates from p(x_s | x_t), which is that posterior with pred_xstart in place of x_0. So p has the
covariance of q whatever the run's model_var_type, and the step costs (SNR(s) - SNR(t)) |x_0 - pred_xstart|^2 / 2 nats.
"""

import dataclasses
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from diffusion_tf.compression.bitstream import Steps
from diffusion_tf.compression.channel import SharedRandomness, candidate, kl_bits, select
from diffusion_tf.compression.tables import Table, predictor
from diffusion_tf.diffusion_utils import images_to_x
from diffusion_tf.schedules import posterior
from diffusion_tf.trained_model import TrainedModel


@dataclasses.dataclass(frozen=True)
class Encoded:
    """The indices of N images, and what a decoder shows after 0, 1, ..., S steps.

    Attributes:
      steps: the chunk indices of each step of each image.
      kl_bits: KL(q || p) of each step in bits, float64 [N, S].
      pred_xstart: float32 [S + 1, N, H, W, C] in [-1, 1].
    """

    steps: list[Steps]
    kl_bits: np.ndarray
    pred_xstart: np.ndarray


class Codec:
    """Encodes and decodes images with a trained model.

    Args:
      trained: the network, and where it runs.
      table: a table made for it; a call takes at most `table.batch_size` images.

    Raises:
      InputError: the table's batch size is not divisible by the replicas.
    """

    def __init__(self, trained: TrainedModel, table: Table):
        self.table = table
        self._predict_xstart = predictor(trained, table.batch_size)
        schedule = trained.diffusion.schedule
        t, s = np.array(table.timesteps[:-1]), np.array(table.timesteps[1:])
        abar_t, abar_s = schedule.alphas_cumprod[t], schedule.alphas_cumprod[s]
        q = posterior(abar_t / abar_s, 1 - abar_t / abar_s, abar_t, abar_s)  # q(x_s | x_t, x_0)
        self._xstart_coef, self._x_t_coef, self._sigma = q.mean_coef1, q.mean_coef2, np.sqrt(q.variance)

    def encode(self, images: np.ndarray, streams: Sequence[int]) -> Encoded:
        """Encodes images uint8 [N, H, W, C] up to the last step, each with its own stream of random numbers."""
        x_start = images_to_x(images).numpy()
        shared = [self.table.shared_randomness(stream) for stream in streams]
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
        """pred_xstart of images after the given steps, which may differ in number: float32 [N, H, W, C]."""
        shared = [self.table.shared_randomness(stream) for stream in streams]
        x_t = np.stack([random.prior_sample(self.table.image_shape) for random in shared])
        pred_xstart = self._predict(0, x_t)
        for step in range(max(map(len, steps))):
            active = [image for image, sent in enumerate(steps) if len(sent) > step]
            indices = [steps[image][step] for image in active]
            random = [shared[image] for image in active]
            x_t[active] = self._next(step, x_t[active], pred_xstart[active], random, indices)
            pred_xstart[active] = self._predict(step + 1, x_t)[active]
        return pred_xstart

    def _predict(self, step: int, x_t: np.ndarray) -> np.ndarray:
        """What the decoder shows after `step` steps, float32 [N, H, W, C]."""
        if not step:
            return np.broadcast_to(self.table.first_prediction, x_t.shape).copy()
        return self._predict_xstart(x_t, self.table.timesteps[step])

    def _select(
        self, step: int, shared: Sequence[SharedRandomness], mu: np.ndarray, pool: ThreadPoolExecutor
    ) -> list[list[int]]:
        """The chunk indices of each image; the chunks are searched in parallel.

        Args:
          step: the step of the coarse reverse process.
          shared: the random numbers of each image.
          mu: mean of q relative to p, in units of sigma, [N, num_dims].
          pool: the threads that search.
        """

        def search(chunk: int, mu_chunk: np.ndarray, random: SharedRandomness) -> int:
            arrivals = np.random.default_rng([random.stream, step, chunk])
            return select(random, step, chunk, mu_chunk, self.table.num_rows, arrivals)

        searches = []
        for random, row in zip(shared, mu, strict=True):
            num_chunks = self.table.num_chunks(kl_bits(row))
            chunks = np.array_split(random.rotate(step, row), num_chunks) if num_chunks else []
            searches.append([pool.submit(search, chunk, mu_chunk, random) for chunk, mu_chunk in enumerate(chunks)])
        return [[found.result() for found in image] for image in searches]

    def _next(
        self,
        step: int,
        x_t: np.ndarray,
        pred_xstart: np.ndarray,
        shared: Sequence[SharedRandomness],
        indices: Sequence[Sequence[int]],
    ) -> np.ndarray:
        """x_s of the images, float32 [N, H, W, C]; a sample of p for an image that sends no chunk.

        Args:
          step: the step of the coarse reverse process.
          x_t: float32 [N, H, W, C].
          pred_xstart: the network's prediction from x_t, [N, H, W, C].
          shared: the random numbers of each image.
          indices: the chunk indices of each image.
        """
        num_dims = math.prod(x_t.shape[1:])
        noise = np.empty((len(x_t), num_dims))
        for image, chosen in enumerate(indices):
            widths = [len(dims) for dims in np.array_split(np.empty(num_dims), max(1, len(chosen)))]
            chunks = [
                candidate(shared[image], step, chunk, width, index, self.table.num_rows)
                for chunk, (width, index) in enumerate(zip(widths, chosen or [0], strict=True))
            ]
            noise[image] = shared[image].rotate_back(step, np.concatenate(chunks))
        mean = self._xstart_coef[step] * pred_xstart + self._x_t_coef[step] * x_t
        return (mean + self._sigma[step] * noise.reshape(x_t.shape)).astype(np.float32)
