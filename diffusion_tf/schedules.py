"""Beta schedules and the float64 tables that follow from them (Section 4, Appendix B)."""

import numpy as np

from diffusion_tf.errors import ConfigError, InputError
from diffusion_tf.presets import CHOICES


def get_beta_schedule(name: str, *, beta_start: float, beta_end: float, num_timesteps: int) -> np.ndarray:
    """Betas [T] in float64; index t is the paper's step t + 1.

    `linear` is the paper's. `quad` is linear in sqrt(beta), `const` is beta_end throughout, `warmup10` and
    `warmup50` grow linearly over the first tenth or half, and `jsd` is 1/T, 1/(T-1), ..., 1 whatever the ends.

    Raises:
      InputError: unknown name; the message lists the known ones.
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


class NoiseSchedule:
    """The tables of the forward process and its posterior, each float64 [T].

    Computed in float64 throughout: float32 tables would cost 1.7e-4 relative on 1 - alphas_cumprod at t = 0.

    Args:
      betas: [T] in (0, 1], T >= 2.
    """

    def __init__(self, betas: np.ndarray):
        betas = np.asarray(betas, dtype=np.float64)
        if betas.ndim != 1 or len(betas) < 2 or not ((betas > 0) & (betas <= 1)).all():
            raise InputError("betas must be a vector of at least two values in (0, 1]")
        self.betas = betas
        self.num_timesteps = len(betas)

        alphas = 1.0 - betas
        self.alphas_cumprod = np.cumprod(alphas)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1.0 - self.alphas_cumprod)
        self.log_one_minus_alphas_cumprod = np.log(1.0 - self.alphas_cumprod)
        with np.errstate(divide="ignore"):  # jsd ends at alphas_cumprod = 0
            self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod)
            self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod - 1.0)

        # q(x_{t-1} | x_t, x_0), Eqs. 6-7.
        self.posterior_variance = betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)
        self.posterior_mean_coef1 = betas * np.sqrt(self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)
        self.posterior_mean_coef2 = (1.0 - self.alphas_cumprod_prev) * np.sqrt(alphas) / (1.0 - self.alphas_cumprod)
        # The posterior's variance is 0 at t = 0; its neighbour's stands in wherever a logarithm is needed.
        self.posterior_log_variance_clipped = np.log(np.append(self.posterior_variance[1], self.posterior_variance[1:]))
        # Differs from the paper, as the authors' code does: sigma_t^2 = beta_t, but entry 0 is the posterior's.
        self.fixedlarge_log_variance = np.log(np.append(self.posterior_variance[1], betas[1:]))
