"""Bits/dim by the variational bound (Eq. 5), and rate-distortion (Section 4.3).

For each t, x_t is an independent sample of q(x_t | x_0). The term of the bound at t is the cost of coding with the
network's p(x_{t-1} | x_t). The x_0 that the network predicts from x_t is what a decoder that holds x_t shows.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from numpy.typing import ArrayLike

from diffusion_tf.conditioning import NO_LABEL, labels_of_images
from diffusion_tf.diffusion_utils import DenoiseFn, GaussianDiffusion, images_to_x, mean_flat
from diffusion_tf.progress_bar import progress_bar
from diffusion_tf.rng import CounterRng
from diffusion_tf.runtime.replicas import per_replica_batch_size
from diffusion_tf.schedules import NoiseSchedule
from diffusion_tf.storage.files import Arrays
from diffusion_tf.storage.resumable import ResumableBatches
from diffusion_tf.trained_model import TrainedModel

_IMAGES_READ = 256  # at once, to count levels
_LEAST_SIGNAL = 1e-6  # of alphas_cumprod: beyond it the terms of the bound are near 0, and the log SNR may be infinite
_UNIFORM_SHARE = 0.1  # of the timesteps that an estimate draws: no term gets a large weight

# --- Terms of a batch ------------------------------------------------------------------------------------------


class BoundTerms(NamedTuple):
    """Terms of the bound at K timesteps for B images.

    Attributes:
      terms_bpd: float32 [B, K], each image's terms in bits/dim.
      prior_bpd: float32 [B], L_T in bits/dim.
      mse: float32 [B, K], mean squared error of pred_xstart at each timestep.
    """

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
      noise_fn: noise_fn(k) is the standard normal noise [B, H, W, C] that gives x_t in round k.
      timesteps_fn: timesteps_fn(k) is the timestep of each image in round k, int32 [B].
      num_terms: K, the number of rounds.
      clip_denoised: clip the predicted x_0 to [-1, 1], as the authors do here.
    """

    def body(k: tf.Tensor, terms: tf.TensorArray, mse: tf.TensorArray) -> tuple[tf.Tensor, ...]:
        t = timesteps_fn(k)
        x_t = diffusion.q_sample(x_start, t, noise_fn(k))
        term, pred_xstart = diffusion.vb_terms_bpd(denoise_fn, x_start, x_t, t, clip_denoised=clip_denoised)
        error = mean_flat(tf.math.squared_difference(pred_xstart, x_start))
        return k + 1, terms.write(k, term), mse.write(k, error)

    shape = [x_start.shape[0]]
    empty = [tf.TensorArray(tf.float32, num_terms, element_shape=shape) for _ in range(2)]
    _, terms, mse = tf.while_loop(lambda k, *_: k < num_terms, body, (tf.constant(0), *empty))
    return BoundTerms(tf.transpose(terms.stack()), diffusion.prior_bpd(x_start), tf.transpose(mse.stack()))


class TimestepStrata:
    """Draws timesteps of the bound by strata of the log signal-to-noise ratio.

    L_t is about the change of log SNR in step t times the mean squared error of the predicted noise over 2, and that
    error is of the same order at all t. Strata of equal log SNR therefore estimate the sum well, where strata of equal
    t miss the first few steps, which have most of it (Kingma et al. 2021, Section 4).

    Args:
      schedule: the schedule.
    """

    def __init__(self, schedule: NoiseSchedule):
        signal = np.maximum(schedule.alphas_cumprod, _LEAST_SIGNAL)
        share = -np.diff(np.log(signal / (1.0 - schedule.alphas_cumprod)))
        share = (1.0 - _UNIFORM_SHARE) * share / share.sum() + _UNIFORM_SHARE / len(share)
        self._ends = tf.constant(np.cumsum(share)[:-1], tf.float32)
        self._share = tf.constant(share, tf.float32)

    def draw(self, u: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Timestep 0, and one of 1, ..., T - 1 in each of K strata.

        Args:
          u: float32 [B, K], uniform in [0, 1).

        Returns:
          The timesteps int32 [B, K + 1], and the weights float32 [B, K + 1]: the sum over k of weights[:, k] times the
          term at timesteps[:, k] has the sum of all T terms as its expectation.
        """
        num_strata = u.shape[1]
        position = (tf.range(num_strata, dtype=tf.float32) + u) / num_strata
        index = tf.reduce_sum(tf.cast(position[:, :, None] >= self._ends, tf.int32), axis=-1)
        weights = 1.0 / (num_strata * tf.gather(self._share, index))
        return tf.pad(1 + index, [[0, 0], [1, 0]]), tf.pad(weights, [[0, 0], [1, 0]], constant_values=1.0)


class BoundEvaluator:
    """Evaluates terms of the bound; those of image i depend on the seed and i only.

    Args:
      trained: the network, its weights, and where to run; each replica computes its share of every batch.
      batch_size: images of one call, over all replicas.
      seed: int in [0, 2^32).
      num_timesteps_estimate: K. Besides L_0, evaluate K terms of each image, at timesteps that `TimestepStrata` draws,
        and multiply each by its weight. None: all T terms.

    Raises:
      ConfigError: the batch size is not divisible by the replicas.
    """

    def __init__(self, trained: TrainedModel, *, batch_size: int, seed: int, num_timesteps_estimate: int | None = None):
        num_terms = num_timesteps_estimate
        self._trained, self._terms_are_timesteps = trained, num_terms is None
        per_replica = per_replica_batch_size(batch_size, trained.strategy)

        def evaluate(first_image: tf.Tensor, images: tf.Tensor, labels: tf.Tensor) -> BoundTerms:
            def noise_fn(k: tf.Tensor) -> tf.Tensor:
                return CounterRng(seed, k, first_image).normal("likelihood", images.shape)

            def bound_at(timesteps_fn: Callable[[tf.Tensor], tf.Tensor], num_terms: int) -> BoundTerms:
                denoise_fn = trained.denoise_fn(labels)
                x_start = images_to_x(images)
                return calc_bpd_loop(trained.diffusion, denoise_fn, x_start, noise_fn, timesteps_fn, num_terms)

            if num_terms is None:
                return bound_at(lambda k: tf.fill([per_replica], k), trained.diffusion.num_timesteps)
            u = CounterRng(seed, 0, first_image).uniform("likelihood/t", (per_replica, num_terms))
            timesteps, weights = TimestepStrata(trained.diffusion.schedule).draw(u)
            bound = bound_at(lambda k: timesteps[:, k], num_terms + 1)
            return bound._replace(terms_bpd=weights * bound.terms_bpd)

        self._evaluate = trained.over_replicas(evaluate, batch_size)

    def __call__(self, first_image: int, images: np.ndarray, labels: ArrayLike = NO_LABEL) -> BoundTerms:
        """The terms of images uint8 [n, H, W, C], n <= batch_size.

        Args:
          first_image: the index of images[0].
          images: the images.
          labels: the label of each image, int or int [n]; -1 is none.

        Raises:
          NotFiniteError: a term or an error of an image is not finite.
        """
        values = self._evaluate(first_image, images, labels_of_images(labels, len(images)))
        bound = BoundTerms(*(value.numpy() for value in values))
        finite = np.isfinite(bound.terms_bpd) & np.isfinite(bound.mse)
        if not finite.all():
            # The highest t, where sampling would meet it first.
            t = int(np.flatnonzero(~finite.all(axis=0)).max()) if self._terms_are_timesteps else None
            self._trained.check_finite(finite.all(axis=1), "the bounds of images", first=first_image, t=t)
        return bound


# --- The bound of a set of images ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Bound:
    """The bound of N images in bits/dim, and its parts; all arrays are float64.

    Attributes:
      prior_bpd: L_T [N].
      middle_bpd: L_1 + ... + L_{T-1} [N], or an unbiased estimate of it.
      decoder_bpd: L_0 [N], of the discrete decoder.
      mean_square: mean of x_0^2 over the dimensions [N].
      terms_bpd: L_0, ..., L_{T-1}, averaged over the images [T]; None if they were estimated.
      terms_standard_error: standard errors of `terms_bpd` [T], or None.
      mse: mean squared error of the x_0 predicted at each t [T], for images in [-1, 1]; or None.
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
    """Mean and standard error of independent values [N]; the error is NaN if N = 1."""
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), float(error)


def bound_of_images(
    trained: TrainedModel,
    images: np.ndarray,
    *,
    batch_size: int,
    seed: int,
    labels: ArrayLike = NO_LABEL,
    num_timesteps_estimate: int | None = None,
) -> Bound:
    """The bound of images (Eq. 5), with a progress bar.

    T network evaluations for each image, or `num_timesteps_estimate` + 1.

    Args:
      trained: the network, its weights, and where to run.
      images: uint8 [N, H, W, C].
      batch_size: images of one call, over all replicas.
      seed: seed of the noise, int in [0, 2^32).
      labels: the label of each image, int or int [N], for the bound of log p(x_0 | label); -1 is none.
      num_timesteps_estimate: estimate the terms L_1, ..., L_{T-1} from this many of them; None: evaluate all.

    Raises:
      ConfigError: the batch size is not divisible by the replicas.
      NotFiniteError: the bound of an image is not finite.
    """
    evaluator = BoundEvaluator(trained, batch_size=batch_size, seed=seed, num_timesteps_estimate=num_timesteps_estimate)
    firsts = progress_bar(range(0, len(images), batch_size), unit="batch", desc="bits/dim")
    of_images = labels_of_images(labels, len(images))
    batches = [
        _batch_bound(evaluator, first, *(array[first : first + batch_size] for array in (images, of_images)))
        for first in firsts
    ]
    return _combine(batches, estimated=num_timesteps_estimate is not None)


def measure_bound(
    trained: TrainedModel,
    read_images: Callable[[int, int], np.ndarray],
    *,
    num_images: int,
    batch_size: int,
    seed: int,
    partial: str,
    subject: Mapping[str, Any],
    read_labels: Callable[[int, int], np.ndarray] | None = None,
    num_timesteps_estimate: int | None = None,
) -> Bound:
    """`bound_of_images` for many images: reads them batch by batch, and can be interrupted.

    The results of each batch are kept in a folder. An interrupted measurement continues from there; a finished one is
    read back.

    Args:
      trained: the network, its weights, and where to run.
      read_images: read_images(first, count) is images first, ..., first + count - 1, uint8 [count, H, W, C].
      num_images: N.
      batch_size: images of one call, over all replicas.
      seed: seed of the noise, int in [0, 2^32).
      partial: the folder for the results of all interrupted measurements; may be gs://.
      subject: what identifies the weights and the images, in a form that JSON can hold.
      read_labels: reads the labels of these images, int32 [count], for the bound of log p(x_0 | label).
      num_timesteps_estimate: as in `bound_of_images`.

    Raises:
      ConfigError: the batch size is not divisible by the replicas.
      NotFiniteError: the bound of an image is not finite.
    """
    evaluator = BoundEvaluator(trained, batch_size=batch_size, seed=seed, num_timesteps_estimate=num_timesteps_estimate)
    description = {
        "measurement": "bound",
        **subject,
        "precision": trained.preset.precision,
        "seed": seed,
        "num_timesteps_estimate": num_timesteps_estimate,
        **({} if num_timesteps_estimate is None else {"strata": "log_snr"}),
        **({"given": "labels"} if read_labels else {}),
    }
    kept = ResumableBatches(partial, description, num_examples=num_images, batch_size=batch_size)

    def bound_of(first: int, count: int) -> Arrays:
        labels = read_labels(first, count) if read_labels else NO_LABEL
        return _batch_bound(evaluator, first, read_images(first, count), labels)

    batches = list(kept.compute(bound_of, "bits/dim"))
    return _combine(batches, estimated=num_timesteps_estimate is not None)


def _batch_bound(evaluator: BoundEvaluator, first: int, images: np.ndarray, labels: ArrayLike) -> Arrays:
    """What `_combine` needs of a batch: values [n] of each image, and sums [K] over the images."""
    bound = evaluator(first, images, labels)
    terms = bound.terms_bpd.astype(np.float64)
    return {
        "prior_bpd": bound.prior_bpd.astype(np.float64),
        "middle_bpd": terms[:, 1:].sum(axis=1),
        "decoder_bpd": terms[:, 0],
        "mean_square": np.square(images / 127.5 - 1.0).mean(axis=(1, 2, 3)),
        "terms_sum": terms.sum(axis=0),
        "squares_sum": np.square(terms).sum(axis=0),
        "mse_sum": bound.mse.sum(axis=0, dtype=np.float64),
    }


def _combine(batches: Sequence[Arrays], *, estimated: bool) -> Bound:
    names = ("prior_bpd", "middle_bpd", "decoder_bpd", "mean_square")
    per_image = {name: np.concatenate([batch[name] for batch in batches]) for name in names}
    if estimated:
        return Bound(**per_image)
    count = len(per_image["prior_bpd"])
    terms, squares, mse = (
        np.sum([batch[name] for batch in batches], axis=0) / count for name in ("terms_sum", "squares_sum", "mse_sum")
    )
    variance = np.maximum(squares - np.square(terms), 0.0)
    error = np.sqrt(variance / (count - 1)) if count > 1 else np.full_like(terms, np.nan)
    return Bound(**per_image, terms_bpd=terms, terms_standard_error=error, mse=mse)


# --- What follows from the bound and the schedule --------------------------------------------------------------


def count_levels(read_images: Callable[[int, int], np.ndarray], num_images: int) -> int:
    """How many of the 256 levels occur in images 0, ..., num_images - 1; `read_images` as for `measure_bound`."""
    found = np.zeros(256, bool)
    for first in range(0, num_images, _IMAGES_READ):
        found[np.unique(read_images(first, min(_IMAGES_READ, num_images - first)))] = True
    return int(found.sum())


def describe_levels(levels: int) -> str:
    """What to know about the bound of images in which `levels` of the 256 levels occur."""
    return (
        f"the images have {levels} of the 256 levels: a code of equal length for each of these takes log2({levels}) ="
        f" {math.log2(levels):.2f} bits/dim, while the model's decoder spends probability on all 256"
    )


def rate_distortion(bound: Bound) -> tuple[np.ndarray, np.ndarray]:
    """Rate and distortion of progressive lossy compression (Section 4.3, Table 4, Figure 5).

    Entry t belongs to a decoder that holds x_t.

    Returns:
      The rate [T] in bits/dim: L_T and every term that led to x_t (Eq. 26). At t = 0 it is the bound without L_0.
      The distortion [T] of the predicted x_0: root mean squared error on [0, 255].
    """
    assert bound.terms_bpd is not None and bound.mse is not None
    to_come = np.append(np.cumsum(bound.terms_bpd[:0:-1])[::-1], 0.0)
    return bound.prior_bpd.mean() + to_come, 127.5 * np.sqrt(bound.mse)


def appendix_c(schedule: NoiseSchedule, mean_square: float) -> dict[str, float]:
    """The claims of Appendix C about the schedule, as numbers.

    Args:
      schedule: the schedule.
      mean_square: mean of x_0^2 over images and dimensions.

    Returns:
      `unit_variance_error`: maximum deviation from 1 of the variance of x_t, over all t, for data of unit variance.
      `unscaled_prior_bits_per_dim`: L_T of a process that adds the same noise but does not scale the signal down, as
        in NCSN; the prior has the variance of that noise.
      `sampler_scale_error`: maximum relative deviation of the sampler's coefficients of x_t and eps, computed from its
        tables, from those of Algorithm 2: 1 / sqrt(1 - beta) and beta / sqrt((1 - alphas_cumprod)(1 - beta)).
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
