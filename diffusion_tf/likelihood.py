"""Bits/dim by the variational bound (Eq. 5), and rate-distortion (Section 4.3), over a set of images.

At each t an independent x_t ~ q(x_t | x_0) is drawn. Its term of the bound is what the network's p(x_{t-1} | x_t)
costs; the x_0 that the network predicts from it is what a decoder that holds x_t would show.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from diffusion_tf.data.source import ImageReader, ImageSource, identity
from diffusion_tf.diffusion_utils import DenoiseFn, GaussianDiffusion, images_to_x, mean_flat
from diffusion_tf.errors import InputError
from diffusion_tf.presets import Preset
from diffusion_tf.rng import CounterRng
from diffusion_tf.runtime.replicas import per_replica_batch_size
from diffusion_tf.schedules import NoiseSchedule
from diffusion_tf.storage import checkpoints
from diffusion_tf.storage.files import Arrays
from diffusion_tf.storage.resumable import ResumableBatches
from diffusion_tf.trained_model import TrainedModel


class BoundTerms(NamedTuple):
    """Of each image: the bound's terms [B, K] at K timesteps and L_T [B] in bits/dim, the MSE of pred_xstart [B, K]."""

    terms_bpd: tf.Tensor
    prior_bpd: tf.Tensor
    mse: tf.Tensor


def calc_bpd_loop(
    diffusion: GaussianDiffusion,
    denoise_fn: DenoiseFn,
    x_start: tf.Tensor,
    noise_fn: Callable[[tf.Tensor], tf.Tensor],
    timesteps_fn: Callable[[tf.Tensor], tf.Tensor],
    num_terms: int,
    *,
    clip_denoised: bool = True,
) -> BoundTerms:
    """Terms of the bound (Eq. 5) at `num_terms` timesteps: a graph loop of as many network evaluations.

    Args:
      diffusion: the process.
      denoise_fn: the network.
      x_start: float32 [B, H, W, C].
      noise_fn: noise_fn(k) is the standard normal noise [B, H, W, C] of x_t in round k.
      timesteps_fn: timesteps_fn(k) is the timestep int32 [B] of round k.
      num_terms: K, the rounds.
      clip_denoised: clips the predicted x_0 to [-1, 1], as the authors do here.
    """

    def body(k, terms, mse):
        t = timesteps_fn(k)
        x_t = diffusion.q_sample(x_start, t, noise_fn(k))
        term, pred_xstart = diffusion.vb_terms_bpd(denoise_fn, x_start, x_t, t, clip_denoised=clip_denoised)
        error = mean_flat(tf.math.squared_difference(pred_xstart, x_start))
        return k + 1, terms.write(k, term), mse.write(k, error)

    shape = [x_start.shape[0]]
    empty = [tf.TensorArray(tf.float32, num_terms, element_shape=shape) for _ in range(2)]
    _, terms, mse = tf.while_loop(lambda k, *_: k < num_terms, body, (tf.constant(0), *empty))
    return BoundTerms(tf.transpose(terms.stack()), diffusion.prior_bpd(x_start), tf.transpose(mse.stack()))


class BoundEvaluator:
    """Evaluates the bound's terms of uint8 images, each a function of the seed and the image's index.

    Args:
      trained: the network, its weights, and where to run; every replica computes its share of each batch.
      batch_size: images of one call, over all replicas.
      seed: int in [0, 2^32).
      num_timesteps_estimate: evaluate L_0 and this many further terms only, one in each of as many equal stretches of
        t = 1 ... T - 1, drawn for each image; None: all T.

    Raises:
      InputError: the batch size is not divisible by the replicas.
    """

    def __init__(self, trained: TrainedModel, *, batch_size: int, seed: int, num_timesteps_estimate: int | None = None):
        last, stretches = trained.diffusion.num_timesteps - 1, num_timesteps_estimate
        per_replica = per_replica_batch_size(batch_size, trained.strategy)

        def evaluate(first_image, images):
            def noise_fn(k):
                return CounterRng(seed, k, first_image).normal("likelihood", images.shape)

            def timesteps_fn(k):
                if stretches is None:
                    return tf.fill([per_replica], k)
                u = CounterRng(seed, k, first_image).uniform("likelihood/t", (per_replica,))
                position = (tf.cast(k - 1, tf.float32) + u) * (last / stretches)
                return tf.where(k == 0, 0, 1 + tf.minimum(tf.cast(position, tf.int32), last - 1))

            num_terms = last + 1 if stretches is None else stretches + 1
            return calc_bpd_loop(
                trained.diffusion, trained.denoise_fn(), images_to_x(images), noise_fn, timesteps_fn, num_terms
            )

        self._evaluate = trained.over_replicas(evaluate, batch_size)

    def __call__(self, first_image: int, images: np.ndarray) -> BoundTerms:
        """The terms of images uint8 [n <= batch_size, H, W, C], of which the first has index `first_image`."""
        return BoundTerms(*(value.numpy() for value in self._evaluate(first_image, images)))


@dataclasses.dataclass(frozen=True)
class Bound:
    """The bound of N images in bits/dim, and what it is made of; all float64.

    Attributes:
      prior_bpd: L_T [N].
      middle_bpd: L_1 + ... + L_{T-1} [N], or an unbiased estimate of it.
      decoder_bpd: L_0 [N], of the discrete decoder.
      mean_square: of x_0 over the dimensions [N].
      terms_bpd: means over the images of L_0 ... L_{T-1} [T]; None where they were estimated.
      terms_standard_error: of `terms_bpd` [T], or None.
      mse: mean squared error of the x_0 predicted at each t [T], images in [-1, 1]; or None.
    """

    prior_bpd: np.ndarray
    middle_bpd: np.ndarray
    decoder_bpd: np.ndarray
    mean_square: np.ndarray
    terms_bpd: np.ndarray | None = None
    terms_standard_error: np.ndarray | None = None
    mse: np.ndarray | None = None

    @property
    def total_bpd(self) -> np.ndarray:
        """The bound of each image [N]: L_T + ... + L_0."""
        return self.prior_bpd + self.middle_bpd + self.decoder_bpd


def mean_and_standard_error(values: np.ndarray) -> tuple[float, float]:
    """The mean of independent values [N], and its standard error (NaN where N is 1)."""
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), float(error)


def measure_bound(
    strategy: tf.distribute.Strategy,
    preset: Preset,
    checkpoint: str,
    source: ImageSource,
    *,
    num_images: int,
    batch_size: int,
    seed: int,
    partial: str,
    num_timesteps_estimate: int | None = None,
) -> Bound:
    """The bound of the first `num_images` of `source` by a checkpoint's EMA weights; shows progress.

    T network evaluations an image, or `num_timesteps_estimate` + 1. Each batch is kept in the folder `partial`, so that
    an interrupted measurement goes on, and a finished one is read back.

    Raises:
      InputError: the checkpoint does not fit, or the batch size is not divisible by the replicas.
    """
    trained = TrainedModel.from_checkpoint(preset, strategy, checkpoint)
    evaluator = BoundEvaluator(trained, batch_size=batch_size, seed=seed, num_timesteps_estimate=num_timesteps_estimate)
    description = {
        "measurement": "bound",
        "checkpoint": checkpoints.load_digest(checkpoint),
        **identity(source),
        "seed": seed,
        "num_timesteps_estimate": num_timesteps_estimate,
    }
    parts = ResumableBatches(partial, description, num_examples=num_images, batch_size=batch_size)
    reader = ImageReader(source)
    weight = 1.0 if num_timesteps_estimate is None else (preset.num_timesteps - 1) / num_timesteps_estimate

    def compute(first: int, count: int) -> Arrays:
        images = reader(first, count)
        bound = evaluator(first, images)
        terms = bound.terms_bpd.astype(np.float64)
        if not (np.isfinite(terms).all() and np.isfinite(bound.mse).all()):
            raise InputError(f"the bound of images {first} to {first + count - 1} of {source.name} is not finite")
        return {
            "prior_bpd": bound.prior_bpd.astype(np.float64),
            "middle_bpd": weight * terms[:, 1:].sum(axis=1),
            "decoder_bpd": terms[:, 0],
            "mean_square": np.square(images / 127.5 - 1.0).mean(axis=(1, 2, 3)),
            "terms_sum": terms.sum(axis=0),
            "squares_sum": np.square(terms).sum(axis=0),
            "mse_sum": bound.mse.sum(axis=0, dtype=np.float64),
        }

    return _join(list(parts.compute(compute, "bits/dim")), estimated=num_timesteps_estimate is not None)


def _join(parts: Sequence[Arrays], *, estimated: bool) -> Bound:
    names = ("prior_bpd", "middle_bpd", "decoder_bpd", "mean_square")
    per_image = {name: np.concatenate([part[name] for part in parts]) for name in names}
    if estimated:
        return Bound(**per_image)
    count = len(per_image["prior_bpd"])
    terms, squares, mse = (
        np.sum([part[name] for part in parts], axis=0) / count for name in ("terms_sum", "squares_sum", "mse_sum")
    )
    variance = np.maximum(squares - np.square(terms), 0.0)
    error = np.sqrt(variance / (count - 1)) if count > 1 else np.full_like(terms, np.nan)
    return Bound(**per_image, terms_bpd=terms, terms_standard_error=error, mse=mse)


def rate_distortion(bound: Bound) -> tuple[np.ndarray, np.ndarray]:
    """Progressive lossy compression (Section 4.3, Table 4, Figure 5): entry t belongs to a decoder that holds x_t.

    Returns:
      The rate [T] in bits/dim: the bound read from x_T down (Eq. 26), L_T and every term that led to x_t. At t = 0
      all is paid but L_0.
      The distortion [T] of the predicted x_0: root mean squared error on [0, 255].
    """
    assert bound.terms_bpd is not None and bound.mse is not None
    to_come = np.append(np.cumsum(bound.terms_bpd[:0:-1])[::-1], 0.0)
    return bound.prior_bpd.mean() + to_come, 127.5 * np.sqrt(bound.mse)


def appendix_c(schedule: NoiseSchedule, mean_square: float) -> dict[str, float]:
    """What Appendix C claims of the schedule, as numbers.

    Args:
      schedule: the schedule.
      mean_square: mean of x_0^2 over images and dimensions.

    Returns:
      `unit_variance_error`: how far the variance of unit-variance data strays from 1 on the way to x_T.
      `unscaled_prior_bits_per_dim`: L_T of a process that adds the same noise without scaling the signal down, as NCSN
        does, against the normal of the noise's own variance.
      `sampler_scale_error`: how far the sampler's factors of x_t and of eps, from its tables, lie from those of
        Algorithm 2, 1 / sqrt(1 - beta) and beta / sqrt((1 - alphas_cumprod)(1 - beta)); relative.
    """
    betas = schedule.betas
    variance = schedule.sqrt_alphas_cumprod**2 + schedule.sqrt_one_minus_alphas_cumprod**2
    step = schedule.posterior_mean_coef1 * schedule.sqrt_recip_alphas_cumprod + schedule.posterior_mean_coef2
    noise = schedule.posterior_mean_coef1 * schedule.sqrt_recipm1_alphas_cumprod
    expected_noise = betas / np.sqrt((1.0 - schedule.alphas_cumprod) * (1.0 - betas))
    return {
        "unit_variance_error": float(np.abs(variance - 1.0).max()),
        "unscaled_prior_bits_per_dim": mean_square / (2.0 * betas.sum() * math.log(2.0)),
        "sampler_scale_error": float(
            max(np.abs(step * np.sqrt(1.0 - betas) - 1.0).max(), np.abs(noise / expected_noise - 1.0).max())
        ),
    }
