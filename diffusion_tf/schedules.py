"""Beta schedules (Section 4) and the float64 tables of the forward process and its posterior (Eqs. 4, 6, 7)."""

from typing import NamedTuple

import numpy as np

from diffusion_tf.errors import ConfigError, InputError
from diffusion_tf.presets import CHOICES


def get_beta_schedule(name: str, *, beta_start: float, beta_end: float, num_timesteps: int) -> np.ndarray:
    """Betas float64 [T]; index t is the paper's step t + 1.

    Args:
      name: `linear` is the paper's schedule. `quad` is linear in sqrt(beta). `const` is beta_end at every step.
        `warmup10` and `warmup50` grow linearly over the first 10% or 50% of the steps and stay at beta_end.
        `jsd` is 1/T, 1/(T-1), ..., 1 and ignores beta_start and beta_end.
      beta_start: beta of the first step.
      beta_end: beta of the last step.
      num_timesteps: T.

    Raises:
      ConfigError: the name is unknown.
    """
    if name == "linear":
        return np.linspace(beta_start, beta_end, num_timesteps, dtype=np.float64)
    if name == "quad":
        return np.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=np.float64) ** 2
    if name == "const":
        return np.full(num_timesteps, beta_end, dtype=np.float64)
    if name in ("warmup10", "warmup50"):
        betas = np.full(num_timesteps, beta_end, dtype=np.float64)
        warmup = int(num_timesteps * int(name.removeprefix("warmup")) / 100)
        betas[:warmup] = np.linspace(beta_start, beta_end, warmup, dtype=np.float64)
        return betas
    if name == "jsd":
        return 1.0 / np.arange(num_timesteps, 0, -1, dtype=np.float64)
    raise ConfigError("beta_schedule", f"={name}: choose one of {', '.join(CHOICES['beta_schedule'])}")


class Posterior(NamedTuple):
    """q(x_{t-1} | x_t, x_0) = N(mean_coef1 x_0 + mean_coef2 x_t, variance I); float64 arrays of one shape."""

    mean_coef1: np.ndarray
    mean_coef2: np.ndarray
    variance: np.ndarray


def posterior(
    alphas: np.ndarray, betas: np.ndarray, alphas_cumprod: np.ndarray, alphas_cumprod_prev: np.ndarray
) -> Posterior:
    """The posterior of Eqs. 6-7, for single steps or for the longer steps of a sub-sequence.

    A step leads from x_t to a less noisy x_s. For s = t - 1 its alpha and beta are the schedule's; for any s < t they
    are alphas_cumprod[t] / alphas_cumprod[s] and 1 minus that.

    Args:
      alphas: alpha of each step, float64.
      betas: 1 - alphas. Both are arguments because each caller knows one of them exactly.
      alphas_cumprod: alphas_cumprod at t, where the step begins.
      alphas_cumprod_prev: alphas_cumprod at s, where it ends; 1 if it ends at x_0.
    """
    return Posterior(
        mean_coef1=betas * np.sqrt(alphas_cumprod_prev) / (1.0 - alphas_cumprod),
        mean_coef2=(1.0 - alphas_cumprod_prev) * np.sqrt(alphas) / (1.0 - alphas_cumprod),
        variance=betas * (1.0 - alphas_cumprod_prev) / (1.0 - alphas_cumprod),
    )


class NoiseSchedule:
    """The tables of the forward process and its posterior, each float64 [T].

    All arithmetic is float64: float32 tables would cost a relative error of 1.7e-4 in 1 - alphas_cumprod at t = 0.

    Args:
      betas: [T], each in (0, 1], T >= 2.

    Raises:
      InputError: `betas` is anything else.
    """

    def __init__(self, betas: np.ndarray):
        betas = np.asarray(betas, dtype=np.float64)
        if betas.ndim != 1 or len(betas) < 2 or not ((betas > 0) & (betas <= 1)).all():
            raise InputError("betas must be a vector of at least two values in (0, 1]")
        self.betas = betas
        self.num_timesteps = len(betas)

        # q(x_t | x_0), Eq. 4.
        alphas = 1.0 - betas
        self.alphas_cumprod = np.cumprod(alphas)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1.0 - self.alphas_cumprod)
        self.log_one_minus_alphas_cumprod = np.log(1.0 - self.alphas_cumprod)

        # Eq. 4 solved for x_0, as in Eq. 15.
        with np.errstate(divide="ignore"):  # jsd ends at alphas_cumprod = 0
            self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod)
            self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod - 1.0)

        # q(x_{t-1} | x_t, x_0), Eqs. 6-7.
        q = posterior(alphas, betas, self.alphas_cumprod, self.alphas_cumprod_prev)
        self.posterior_mean_coef1, self.posterior_mean_coef2, self.posterior_variance = q
        # The variance is 0 at t = 0, so its logarithm takes the value of t = 1 there.
        self.posterior_log_variance_clipped = np.log(np.append(q.variance[1], q.variance[1:]))
        # Differs from the paper, as the authors' code does: sigma_t^2 = beta_t, but entry 0 is the posterior's.
        self.fixedlarge_log_variance = np.log(np.append(q.variance[1], betas[1:]))
