"""The mathematics of the paper: forward process q, reverse process p, losses and the terms of the bound.

Everything here is a pure function of float32 tensors. Shapes and names are the same throughout:

  x_start, x_t, noise: float32 [B, H, W, C]. x_start is x_0, the image, in [-1, 1].
  t: int32 [B] in [0, T). Index t is the paper's step t + 1, so x_t here is the paper's x_{t+1}.
  denoise_fn(x_t, t): the network. Returns [B, H, W, C], or [B, H, W, 2C] if it learns the variance.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from numpy.typing import ArrayLike

from diffusion_tf.errors import ConfigError, NotFiniteError
from diffusion_tf.presets import CHOICES, Preset
from diffusion_tf.schedules import NoiseSchedule, get_beta_schedule

DenoiseFn = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]

_DYNAMIC_PERCENTILE = 0.995  # of Imagen's thresholds; diffusers' default too
_NAMED = 3  # examples that an error names
_LOGIT_SLOPE, _LOGIT_CUBIC = 2.0 * math.sqrt(2.0 / math.pi), 0.044715  # of the approximate normal CDF
_MIN_LOG_LIKELIHOOD = math.log(1e-12)
_MAX_DEVIATIONS = 20.0  # beyond 7 standard deviations a level has the least likelihood
_MAX_LOG_SCALE = 60.0  # in absolute value: exp(60) and its products are float32 numbers


def images_to_x(images: tf.Tensor) -> tf.Tensor:
    """Scales uint8 images to float32 in [-1, 1]."""
    return tf.cast(images, tf.float32) / 127.5 - 1.0


def x_to_pixels(x: tf.Tensor) -> tf.Tensor:
    """Clips x to [-1, 1] and scales it to float32 in [0, 255], without rounding."""
    return (tf.clip_by_value(x, -1.0, 1.0) + 1.0) * 127.5


def x_to_images(x: tf.Tensor) -> tf.Tensor:
    """Clips x to [-1, 1] and rounds it to uint8, outside of programs.

    Raises:
      NotFiniteError: x holds NaN, which would become black, or infinity.
    """
    check_finite(x, "images")
    return tf.cast(tf.round(x_to_pixels(x)), tf.uint8)


def check_finite(values: ArrayLike, what: str, *, first: int = 0, why: str = "") -> None:
    """Checks the results [N, ...] of examples first, first + 1, ..., outside of programs.

    Args:
      values: the results; or whether each of them is finite, bool [N].
      what: what they are, in the plural.
      first: index of the first example.
      why: the end of the message: where and why they may not be finite, and what to do.

    Raises:
      NotFiniteError: some are NaN or infinite; the message says which.
    """
    values = np.asarray(values)
    finite = values if values.dtype == bool else np.isfinite(values).reshape(len(values), -1).all(axis=1)
    if not finite.all():
        wrong = [str(first + i) for i in np.flatnonzero(~finite)]
        named = ", ".join(wrong if len(wrong) <= _NAMED else [*wrong[:_NAMED], f"... ({len(wrong)} in all)"])
        raise NotFiniteError(f"{what} {named} hold NaN or infinity{why}")


def mean_flat(x: tf.Tensor) -> tf.Tensor:
    """Mean over all axes but the first: [B, ...] -> [B]."""
    return tf.reduce_mean(x, axis=list(range(1, len(x.shape))))


def normal_kl(mean1: tf.Tensor, logvar1: tf.Tensor, mean2: tf.Tensor, logvar2: tf.Tensor) -> tf.Tensor:
    """KL divergence of two Gaussians in nats, for each dimension.

    Args:
      mean1: mean of the first Gaussian; the shapes of all arguments broadcast.
      logvar1: logarithm of its variance.
      mean2: mean of the second Gaussian.
      logvar2: logarithm of its variance.
    """
    squared = tf.math.squared_difference(mean1, mean2) * tf.exp(-logvar2)
    return 0.5 * (-1.0 + logvar2 - logvar1 + tf.exp(logvar1 - logvar2) + squared)


def approx_standard_normal_logit(x: tf.Tensor) -> tf.Tensor:
    """log(p / (1 - p)), where p is the tanh approximation of the standard normal CDF, within 2e-4 of the exact CDF."""
    return _LOGIT_SLOPE * (x + _LOGIT_CUBIC * x**3)


def discretized_gaussian_log_likelihood(x: tf.Tensor, *, means: tf.Tensor, log_scales: tf.Tensor) -> tf.Tensor:
    """Log-likelihood log p(x_0 | x_1) of the discrete decoder in nats, for each dimension (Eq. 13).

    Args:
      x: float32 images of the 256 levels k / 127.5 - 1. The bins of the first and last level extend to infinity.
      means: means of the decoder; shapes broadcast.
      log_scales: logarithms of its standard deviations.

    Returns:
      Log-likelihoods, at least log(1e-12), in the broadcast shape.
    """
    # Differs from Eq. 13, as the authors' code does: a tanh approximation replaces the exact normal CDF. Differs from
    # their code, which subtracts two CDFs: in float32 that leaves nothing of a probability below 1e-7. With logits
    # a > b of the bin's edges, sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)).
    centered = x - means
    inv_std = tf.exp(_limited(-log_scales, _MAX_LOG_SCALE))
    upper = _limited(inv_std * (centered + 1.0 / 255.0), _MAX_DEVIATIONS)
    lower = _limited(inv_std * (centered - 1.0 / 255.0), _MAX_DEVIATIONS)
    width = _limited(inv_std * (2.0 / 255.0), _MAX_DEVIATIONS)
    # a - b, factored: it keeps its digits where a and b are large.
    gap = _LOGIT_SLOPE * width * (1.0 + _LOGIT_CUBIC * (upper**2 + upper * lower + lower**2))
    below = tf.math.log_sigmoid(approx_standard_normal_logit(upper))
    above = tf.math.log_sigmoid(-approx_standard_normal_logit(lower))
    inside = below + above + tf.math.log(-tf.math.expm1(-gap))
    log_likelihood = tf.where(x < -0.999, below, tf.where(x > 0.999, above, inside))
    return tf.where(log_likelihood < _MIN_LOG_LIKELIHOOD, _MIN_LOG_LIKELIHOOD, log_likelihood)


def _limited(x: tf.Tensor, limit: float) -> tf.Tensor:
    """Limits x to [-limit, limit], with gradient 0 beyond. NaN stays NaN, unlike in a clip by XLA on a CPU."""
    return tf.where(tf.abs(x) > limit, limit * tf.sign(x), x)


class PMeanVariance(NamedTuple):
    """p(x_{t-1} | x_t) and the x_0 that the network predicts, each float32 [B, H, W, C]."""

    mean: tf.Tensor
    variance: tf.Tensor
    log_variance: tf.Tensor
    pred_xstart: tf.Tensor


class GaussianDiffusion:
    """The forward process of `schedule` and the reverse process that a network parameterises.

    Args:
      schedule: the tables of betas [T].
      model_mean_type: what the network predicts: `eps` (Eq. 11), `xstart` (x_0) or `xprev` (the mean of x_{t-1}).
      model_var_type: variance of p(x_{t-1} | x_t) (Section 3.2): `fixedlarge` is beta_t, `fixedsmall` is the
        posterior's variance, and `learned` takes its logarithm from the second half of the output's channels.
      loss_type: `mse` is L_simple (Eq. 14); `kl` is the term of the bound at a random t (Eq. 5).
      shows_overflow: whether a predicted x_0 that is not finite becomes NaN where it is clipped. A clip hides it: it
        maps infinity to 1, and XLA on a CPU maps NaN to -1. Exported programs do without.

    Raises:
      ConfigError: a type is unknown, or the types do not fit together.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        *,
        model_mean_type: str,
        model_var_type: str,
        loss_type: str,
        shows_overflow: bool = False,
    ):
        given = {"model_mean_type": model_mean_type, "model_var_type": model_var_type, "loss_type": loss_type}
        for name, value in given.items():
            if value not in CHOICES[name]:
                raise ConfigError(name, f"={value}: choose one of {', '.join(CHOICES[name])}")
        if loss_type == "mse" and model_var_type == "learned":
            raise ConfigError("loss_type", "=mse gives a learned variance no gradient: use `loss_type=kl`")
        if model_mean_type == "eps" and schedule.alphas_cumprod[-1] == 0.0:
            raise ConfigError(
                "model_mean_type",
                "=eps cannot recover x_0 if alphas_cumprod ends at 0, as with `beta_schedule=jsd`: use xstart or xprev",
            )
        self.schedule = schedule
        self.num_timesteps = schedule.num_timesteps
        self.model_mean_type = model_mean_type
        self.model_var_type = model_var_type
        self.loss_type = loss_type
        self._shows_overflow = shows_overflow

    @classmethod
    def from_preset(cls, preset: Preset, *, shows_overflow: bool = False) -> "GaussianDiffusion":
        """The diffusion process of `preset`."""
        betas = get_beta_schedule(
            preset.beta_schedule,
            beta_start=preset.beta_start,
            beta_end=preset.beta_end,
            num_timesteps=preset.num_timesteps,
        )
        return cls(
            NoiseSchedule(betas),
            model_mean_type=preset.model_mean_type,
            model_var_type=preset.model_var_type,
            loss_type=preset.loss_type,
            shows_overflow=shows_overflow,
        )

    @staticmethod
    def _extract(table: np.ndarray, t: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
        """table[t] as float32 [B, 1, ..., 1], which broadcasts against x [B, ...]."""
        values = tf.gather(tf.constant(table, tf.float32), t)
        return tf.reshape(values, [-1] + [1] * (len(x.shape) - 1))

    # --- The forward process -------------------------------------------------------------------------------

    def q_mean_variance(self, x_start: tf.Tensor, t: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Mean [B, H, W, C], variance and log-variance [B, 1, 1, 1] of q(x_t | x_0) (Eq. 4)."""
        mean = self._extract(self.schedule.sqrt_alphas_cumprod, t, x_start) * x_start
        variance = self._extract(1.0 - self.schedule.alphas_cumprod, t, x_start)
        log_variance = self._extract(self.schedule.log_one_minus_alphas_cumprod, t, x_start)
        return mean, variance, log_variance

    def q_sample(self, x_start: tf.Tensor, t: tf.Tensor, noise: tf.Tensor) -> tf.Tensor:
        """Diffuses x_start to x_t ~ q(x_t | x_0) with standard normal `noise` (Eq. 4)."""
        return (
            self._extract(self.schedule.sqrt_alphas_cumprod, t, x_start) * x_start
            + self._extract(self.schedule.sqrt_one_minus_alphas_cumprod, t, x_start) * noise
        )

    def q_posterior(self, x_start: tf.Tensor, x_t: tf.Tensor, t: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Mean [B, H, W, C], variance and log-variance [B, 1, 1, 1] of q(x_{t-1} | x_t, x_0) (Eqs. 6-7).

        The log-variance is clipped: at t = 0, where the variance is 0, it is that of t = 1.
        """
        mean = (
            self._extract(self.schedule.posterior_mean_coef1, t, x_t) * x_start
            + self._extract(self.schedule.posterior_mean_coef2, t, x_t) * x_t
        )
        variance = self._extract(self.schedule.posterior_variance, t, x_t)
        log_variance_clipped = self._extract(self.schedule.posterior_log_variance_clipped, t, x_t)
        return mean, variance, log_variance_clipped

    # --- The reverse process -------------------------------------------------------------------------------

    def predict_xstart_from_eps(self, x_t: tf.Tensor, t: tf.Tensor, eps: tf.Tensor) -> tf.Tensor:
        """x_0 from the predicted noise (Eq. 15)."""
        return (
            self._extract(self.schedule.sqrt_recip_alphas_cumprod, t, x_t) * x_t
            - self._extract(self.schedule.sqrt_recipm1_alphas_cumprod, t, x_t) * eps
        )

    def predict_xstart_from_xprev(self, x_t: tf.Tensor, t: tf.Tensor, xprev: tf.Tensor) -> tf.Tensor:
        """x_0 from the predicted posterior mean (Eq. 7 solved for x_0)."""
        coef1, coef2 = self.schedule.posterior_mean_coef1, self.schedule.posterior_mean_coef2
        return self._extract(1.0 / coef1, t, x_t) * xprev - self._extract(coef2 / coef1, t, x_t) * x_t

    def clip_xstart(self, pred_xstart: tf.Tensor, *, dynamic: bool = False) -> tf.Tensor:
        """Limits a predicted x_0 [B, H, W, C] to [-1, 1].

        Args:
          pred_xstart: the prediction.
          dynamic: dynamic thresholding (Saharia et al. 2022, Section 2.3): clip each image to [-s, s] and divide it by
            s, the 99.5th percentile of its absolute values, where that exceeds 1.
        """
        clipped = tf.clip_by_value(pred_xstart, -1.0, 1.0)
        if dynamic:
            values = tf.reshape(tf.abs(pred_xstart), [pred_xstart.shape[0], -1])
            above = 1 + round((values.shape[1] - 1) * (1.0 - _DYNAMIC_PERCENTILE))
            limit = tf.reshape(tf.maximum(tf.math.top_k(values, above).values[:, -1], 1.0), [-1, 1, 1, 1])
            clipped = tf.clip_by_value(pred_xstart / limit, -1.0, 1.0)
        return tf.where(tf.math.is_finite(pred_xstart), clipped, np.nan) if self._shows_overflow else clipped

    def _fixed_variance(self, x_t: tf.Tensor, t: tf.Tensor) -> list[tf.Tensor]:
        """Variance and log-variance [B, H, W, C] of p(x_{t-1} | x_t) if it is not learned (Section 3.2)."""
        schedule = self.schedule
        if self.model_var_type == "fixedlarge":
            tables = (schedule.betas, schedule.fixedlarge_log_variance)
        else:
            tables = (schedule.posterior_variance, schedule.posterior_log_variance_clipped)
        return [self._extract(table, t, x_t) * tf.ones_like(x_t) for table in tables]

    def p_mean_variance(
        self, denoise_fn: DenoiseFn, x_t: tf.Tensor, t: tf.Tensor, *, clip_denoised: bool
    ) -> PMeanVariance:
        """p(x_{t-1} | x_t) by one network evaluation (Eq. 1; mean of Eq. 7 at the predicted x_0).

        Args:
          denoise_fn: the network.
          x_t: float32 [B, H, W, C].
          t: int32 [B].
          clip_denoised: clip the predicted x_0 to [-1, 1], as sampling and bits/dim do and the `kl` loss does not.
        """
        model_output = tf.cast(denoise_fn(x_t, t), tf.float32)
        if self.model_var_type == "learned":
            model_output, log_variance = tf.split(model_output, 2, axis=-1)
            variance = tf.exp(log_variance)
        else:
            variance, log_variance = self._fixed_variance(x_t, t)

        if self.model_mean_type == "eps":
            pred_xstart = self.predict_xstart_from_eps(x_t, t, model_output)
        elif self.model_mean_type == "xprev":
            pred_xstart = self.predict_xstart_from_xprev(x_t, t, model_output)
        else:
            pred_xstart = model_output
        if clip_denoised:
            pred_xstart = self.clip_xstart(pred_xstart)

        if self.model_mean_type == "xprev":
            mean = model_output  # the network predicts the mean itself, so clipping x_0 has no effect on it
        else:
            mean, _, _ = self.q_posterior(pred_xstart, x_t, t)
        return PMeanVariance(mean, variance, log_variance, pred_xstart)

    def p_sample(
        self, denoise_fn: DenoiseFn, x_t: tf.Tensor, t: tf.Tensor, noise: tf.Tensor, *, clip_denoised: bool = True
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """One step of Algorithm 2: (x_{t-1}, pred_xstart). It adds no noise at t = 0.

        Args:
          denoise_fn: the network.
          x_t: float32 [B, H, W, C].
          t: int32 [B].
          noise: standard normal, float32 [B, H, W, C].
          clip_denoised: clip the predicted x_0 to [-1, 1].
        """
        p = self.p_mean_variance(denoise_fn, x_t, t, clip_denoised=clip_denoised)
        nonzero = tf.reshape(tf.cast(t != 0, tf.float32), [-1] + [1] * (len(x_t.shape) - 1))
        return p.mean + nonzero * tf.exp(0.5 * p.log_variance) * noise, p.pred_xstart

    # --- Losses and the bound ------------------------------------------------------------------------------

    def training_losses(self, denoise_fn: DenoiseFn, x_start: tf.Tensor, t: tf.Tensor, noise: tf.Tensor) -> tf.Tensor:
        """Losses [B] of Algorithm 1, by one network evaluation.

        `mse` is the mean squared error of the network's prediction (Eq. 14); `kl` is the term of the bound at t
        (Eq. 5) in bits/dim, without clipping the predicted x_0.

        Args:
          denoise_fn: the network.
          x_start: float32 [B, H, W, C].
          t: int32 [B].
          noise: standard normal, float32 [B, H, W, C].
        """
        x_t = self.q_sample(x_start, t, noise)
        if self.loss_type == "kl":
            return self.vb_terms_bpd(denoise_fn, x_start, x_t, t, clip_denoised=False)[0]
        if self.model_mean_type == "eps":
            target = noise
        elif self.model_mean_type == "xstart":
            target = x_start
        else:
            target, _, _ = self.q_posterior(x_start, x_t, t)
        return mean_flat(tf.math.squared_difference(target, tf.cast(denoise_fn(x_t, t), tf.float32)))

    def vb_terms_bpd(
        self, denoise_fn: DenoiseFn, x_start: tf.Tensor, x_t: tf.Tensor, t: tf.Tensor, *, clip_denoised: bool
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """The term L_t of the bound (Eq. 5), by one network evaluation.

        L_0 is the decoder's -log p(x_0 | x_1) (Eq. 13), every other term KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)).
        Index t has the paper's L_t: the paper's step t has L_{t-1}, and index t is its step t + 1.

        Args:
          denoise_fn: the network.
          x_start: float32 [B, H, W, C].
          x_t: float32 [B, H, W, C], a sample of q(x_t | x_0).
          t: int32 [B].
          clip_denoised: clip the predicted x_0 to [-1, 1].

        Returns:
          L_t [B] in bits/dim, and pred_xstart [B, H, W, C].
        """
        true_mean, _, true_log_variance = self.q_posterior(x_start, x_t, t)
        p = self.p_mean_variance(denoise_fn, x_t, t, clip_denoised=clip_denoised)
        kl = normal_kl(true_mean, true_log_variance, p.mean, p.log_variance)
        decoder_nll = -discretized_gaussian_log_likelihood(x_start, means=p.mean, log_scales=0.5 * p.log_variance)
        return tf.where(t == 0, mean_flat(decoder_nll), mean_flat(kl)) / math.log(2.0), p.pred_xstart

    def prior_bpd(self, x_start: tf.Tensor) -> tf.Tensor:
        """L_T = KL(q(x_T | x_0) || N(0, I)) (Eq. 5), [B] in bits/dim."""
        last = tf.fill([tf.shape(x_start)[0]], self.num_timesteps - 1)
        mean, _, log_variance = self.q_mean_variance(x_start, last)
        return mean_flat(normal_kl(mean, log_variance, 0.0, 0.0)) / math.log(2.0)
