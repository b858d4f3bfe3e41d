"""Examines a trained run: makes the measurements that `diagnosis` judges."""

import dataclasses
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_tf.calibration import Calibration, measure_calibration
from diffusion_tf.conditioning import UNGUIDED
from diffusion_tf.diffusion_utils import x_to_images
from diffusion_tf.evaluation import diagnosis
from diffusion_tf.evaluation.denoising import Network, Setup, linear_loss, measure_losses, spectrum, spread_timesteps
from diffusion_tf.evaluation.diagnosis import Finding, PictureStatistics, picture_statistics
from diffusion_tf.evaluation.suspicions import compare_setups
from diffusion_tf.progress_bar import progress_bar
from diffusion_tf.samplers import Sampler, sample_noise, table_steps
from diffusion_tf.solvers import SamplerSettings, ancestral_table, ddim_table, timesteps
from diffusion_tf.trained_model import TrainedModel

_TIMESTEPS = 10  # at which the loss is measured
_FEW_TIMESTEPS, _FEW_IMAGES = 6, 16  # for the order of channels, and for what else it was trained on
_DRIFT_FROM = (0.25, 0.5, 0.75)  # fractions of T


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Training pictures and what the best linear denoiser knows about them.

    Attributes:
      images: uint8 [M, H, W, C].
      labels: the label of each, int32 [M]; -1 is none.
      variances: `denoising.spectrum` of the images in [-1, 1].
    """

    images: np.ndarray
    labels: np.ndarray
    variances: np.ndarray

    @classmethod
    def of(cls, images: np.ndarray, labels: np.ndarray) -> "Pictures":
        """The pictures with their spectrum."""
        return cls(images, labels, spectrum(to_x(images)))


def to_x(images: np.ndarray) -> np.ndarray:
    """Images uint8 as float32 in [-1, 1]."""
    return images.astype(np.float32) / 127.5 - 1.0


class Checkup:
    """Measures a trained network on training pictures.

    Args:
      trained: the network with its EMA weights.
      pictures: training pictures.
      num_images: how many of the pictures the network denoises at each timestep.
      num_samples: how many samples each sampler draws.
      steps: steps of Algorithm 2.
      batch_size: images of one call, over all replicas.
      seed: of the noise.

    Attributes:
      trained: as given.
      setup: what the run's configuration says that the network was trained on.
      timesteps: where the loss is measured, ascending, int [K].
    """

    def __init__(
        self,
        trained: TrainedModel,
        pictures: Pictures,
        *,
        num_images: int,
        num_samples: int,
        steps: int,
        batch_size: int,
        seed: int,
    ):
        self.trained, self.pictures = trained, pictures
        self._num_images, self._num_samples = min(num_images, len(pictures.images)), num_samples
        self._batch_size, self._seed = batch_size, seed
        diffusion = trained.diffusion
        self.setup = Setup(diffusion.schedule, diffusion.model_mean_type)
        self.timesteps = spread_timesteps(diffusion.num_timesteps, _TIMESTEPS)
        ts = timesteps(diffusion.schedule, steps, "trailing")
        if diffusion.model_var_type == "learned":  # of single steps only
            self._table = ddim_table(diffusion.schedule, ts, eta=1.0)
        else:
            self._table = ancestral_table(diffusion.schedule, ts, diffusion.model_var_type)

        def walk(first: tf.Tensor, x_t: tf.Tensor, labels: tf.Tensor, start: tf.Tensor, stop: tf.Tensor) -> Any:
            noise_fn = sample_noise(seed, first, x_t.shape)
            denoise_fn = trained.denoise_fn(labels)
            return table_steps(diffusion, denoise_fn, noise_fn, self._table, x_t, tf.zeros_like(x_t), start[0], stop[0])

        self._walk = trained.over_replicas(walk, batch_size)

    # --- Loss --------------------------------------------------------------------------------------------------

    @property
    def linear(self) -> np.ndarray:
        """The loss of the best linear denoiser at `timesteps`, [K]."""
        return linear_loss(self.pictures.variances, self.setup.schedule.alphas_cumprod[self.timesteps])

    def calibration(self, trained: TrainedModel) -> Calibration:
        """Loss and calibration at `timesteps` of the network with these weights."""
        return measure_calibration(
            trained,
            self.pictures.images[: self._num_images],
            labels=self.pictures.labels[: self._num_images],
            timesteps=self.timesteps.tolist(),
            seed=self._seed,
            batch_size=self._batch_size,
        )

    def loss_findings(self, measured: Calibration) -> list[Finding]:
        """What the loss tells about the data, the target and the process that the network was trained on."""
        recorded = diagnosis.fit(measured.loss, self.timesteps, self.setup, self.pictures.variances)
        if not diagnosis.is_poor(recorded) or diagnosis.is_untrained(measured):
            return diagnosis.explain_loss(recorded, measured, [])
        network, x_start, noise = self._network(_FEW_IMAGES)
        compared = compare_setups(network, self.trained.preset, self.setup, x_start, noise, self.pictures.variances)
        bar = progress_bar(compared, unit="setup", desc="what else the network was trained on")
        return diagnosis.explain_loss(recorded, measured, list(bar))

    def channel_findings(self) -> list[Finding]:
        """Whether the network knows the pictures with their channels reversed."""
        if self.trained.preset.channels != 3:
            return []
        network, x_start, noise = self._network(self._num_images)
        ts = spread_timesteps(self.setup.schedule.num_timesteps, _FEW_TIMESTEPS)
        orders = (self.setup, dataclasses.replace(self.setup, reversed_channels=True))
        losses = [
            measure_losses(network, setup, x_start, noise, ts)
            for setup in progress_bar(orders, unit="order", desc="channel order")
        ]
        return diagnosis.check_channel_order(*losses)

    def _network(self, count: int) -> tuple[Network, np.ndarray, np.ndarray]:
        """The network as a function of NumPy arrays for the first pictures, and these as x_start with their noise."""
        count, channels = min(count, self._num_images), self.trained.preset.channels
        x_start, labels = to_x(self.pictures.images[:count]), self.pictures.labels[:count]
        noise = np.random.default_rng(self._seed).standard_normal(x_start.shape, dtype=np.float32)
        call = self.trained.over_replicas(
            lambda _, x_t, t, labels: self.trained.denoise_fn(labels)(x_t, t)[..., :channels], self._batch_size
        )

        def network(x_t: np.ndarray, t: np.ndarray) -> np.ndarray:
            outputs = []
            for first in range(0, count, self._batch_size):
                batch = slice(first, first + self._batch_size)
                outputs.append(call(first, x_t[batch], t[batch], labels[batch]).numpy())
            return np.concatenate(outputs).astype(np.float32)

        return network, x_start, noise

    # --- Samples -----------------------------------------------------------------------------------------------

    def drift(self) -> tuple[np.ndarray, np.ndarray]:
        """How far Algorithm 2 from x_t leads from the x_0 that the network predicts there, beside how far x_0 is.

        Returns:
          The timesteps, ascending, int [K].
          E[(sampled x_0 - predicted x_0)^2] / E[(x_0 - predicted x_0)^2] [K]: 1 if the sampled x_0 has the true
          posterior distribution of x_0 given x_t.
        """
        ts = self._table.timesteps
        starts = sorted({int(np.abs(ts - f * self.setup.schedule.num_timesteps).argmin()) for f in _DRIFT_FROM})
        count = min(self._num_samples, len(self.pictures.images))
        x_start, labels = to_x(self.pictures.images[:count]), self.pictures.labels[:count]
        noise, ratios = self._noise(count), []
        for start in progress_bar(starts, unit="timestep", desc="drift"):
            signal = self.setup.schedule.sqrt_alphas_cumprod[ts[start]]
            sigma = self.setup.schedule.sqrt_one_minus_alphas_cumprod[ts[start]]
            x_t = (signal * x_start + sigma * noise).astype(np.float32)
            _, predicted = self._walked(x_t, labels, start, start + 1)
            sampled, _ = self._walked(x_t, labels, start, len(ts))
            ratios.append(((sampled - predicted) ** 2).mean() / ((x_start - predicted) ** 2).mean())
        return ts[starts][::-1].copy(), np.array(ratios[::-1], np.float64)

    def algorithm_2(self) -> np.ndarray:
        """Samples of Algorithm 2, uint8 [num_samples, H, W, C]."""
        labels = UNGUIDED.resolve(self.trained.preset).of_images(0, self._num_samples)
        x, _ = self._walked(self._noise(self._num_samples), labels, 0, len(self._table.timesteps), "Algorithm 2")
        return x_to_images(tf.constant(x)).numpy()

    def samples(self, settings: SamplerSettings) -> np.ndarray:
        """Samples of another sampler from the same x_T, uint8 [num_samples, H, W, C]."""
        sampler = Sampler(self.trained, batch_size=self._batch_size, seed=self._seed, settings=settings)
        return sampler.draw(self._num_samples)

    def _noise(self, count: int) -> np.ndarray:
        """x_T of the samples, as `Sampler` has it."""
        shape = (count, *self.trained.preset.image_shape)
        return sample_noise(self._seed, tf.constant(0), shape)(tf.constant(self.setup.schedule.num_timesteps)).numpy()

    def _walked(
        self, x_t: np.ndarray, labels: np.ndarray, start: int, stop: int, what: str = ""
    ) -> tuple[np.ndarray, np.ndarray]:
        """Takes the steps start, ..., stop - 1 of Algorithm 2: x and the predicted x_0; `what` names a progress bar."""
        results = []
        firsts = range(0, len(x_t), self._batch_size)
        for first in progress_bar(firsts, unit="batch", desc=what) if what else firsts:
            batch = slice(first, first + self._batch_size)
            steps = (np.full(len(x_t[batch]), i, np.int32) for i in (start, stop))
            x, predicted = self._walk(first, x_t[batch], np.asarray(labels, np.int32)[batch], *steps)
            self.trained.check_finite(x, "samples", first=first)
            results.append((x.numpy(), predicted.numpy()))
        x, predicted = (np.concatenate(arrays) for arrays in zip(*results, strict=True))
        return x, predicted


def statistics(images: dict[str, np.ndarray]) -> dict[str, PictureStatistics]:
    """The statistics of sets of images uint8 [N, H, W, C], by their names."""
    return {name: picture_statistics(values) for name, values in images.items()}
