"""Data whose optimal denoiser is known: images of N(MEAN, STD^2) pixels, and points of a mixture of Gaussians."""

from typing import NamedTuple

import numpy as np
import scipy.integrate
import scipy.special
import tensorflow as tf

from diffusion_tf.diffusion_utils import DenoiseFn, GaussianDiffusion

MEAN, STD = 0.3, 0.5


class OptimalDenoiser(NamedTuple):
    """The optimal network for pixels N(MEAN, std^2), which is linear; all arrays are float64 [T].

    Attributes:
      output: (a, b): the network's output is a x_t + b.
      xprev: (a, b): the mean of the true p(x_{t-1} | x_t), which is Gaussian here, is a x_t + b.
      log_variance: its log-variance.
    """

    output: tuple[np.ndarray, np.ndarray]
    xprev: tuple[np.ndarray, np.ndarray]
    log_variance: np.ndarray


def optimal_denoiser(diffusion: GaussianDiffusion, std: float = STD) -> OptimalDenoiser:
    """The optimal network of a diffusion's mean type."""
    s = diffusion.schedule
    abar, variance = s.alphas_cumprod, std**2
    gain = variance * np.sqrt(abar) / (abar * variance + 1 - abar)  # E[x_0 | x_t] = MEAN + gain (x_t - sqrt(abar) MEAN)
    offset = MEAN * (1 - gain * np.sqrt(abar))
    xprev = (s.posterior_mean_coef1 * gain + s.posterior_mean_coef2, s.posterior_mean_coef1 * offset)
    xstart_variance = variance * (1 - abar) / (abar * variance + 1 - abar)
    log_variance = np.log(s.posterior_variance + s.posterior_mean_coef1**2 * xstart_variance)
    eps = ((1 - np.sqrt(abar) * gain) / np.sqrt(1 - abar), -np.sqrt(abar) * offset / np.sqrt(1 - abar))
    output = {"eps": eps, "xstart": (gain, offset), "xprev": xprev}[diffusion.model_mean_type]
    return OptimalDenoiser(output, xprev, log_variance)


def denoise_fn(diffusion: GaussianDiffusion, std: float = STD) -> DenoiseFn:
    """`optimal_denoiser` as a network."""
    (a, b), _, log_variance = optimal_denoiser(diffusion, std)

    def call(x_t: tf.Tensor, t: tf.Tensor) -> tf.Tensor:
        at = lambda table: tf.reshape(tf.gather(tf.constant(table, tf.float32), t), [-1, 1, 1, 1])
        output = at(a) * x_t + at(b)
        if diffusion.model_var_type == "learned":
            return tf.concat([output, at(log_variance) * tf.ones_like(x_t)], -1)
        return output

    return call


# A mixture of three isotropic Gaussians in the plane. Each image [1, 1, 2] is a point.
MIXTURE_WEIGHTS = np.array([0.5, 0.3, 0.2])
MIXTURE_MEANS = np.array([[0.6, 0.2], [-0.5, 0.4], [0.0, -0.7]])
MIXTURE_STDS = np.array([0.25, 0.3, 0.2])


def mixture_xstart(y: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """E[x_0 | y] for y = x_0 + sigma * noise, with y [..., 2] and sigma [...]."""
    difference = y[..., None, :] - MIXTURE_MEANS
    variance = MIXTURE_STDS**2 + sigma[..., None] ** 2
    logits = np.log(MIXTURE_WEIGHTS) - np.log(variance) - 0.5 * (difference**2).sum(-1) / variance
    weights = scipy.special.softmax(logits, axis=-1)
    means = MIXTURE_MEANS + difference * (MIXTURE_STDS**2 / variance)[..., None]
    return (weights[..., None] * means).sum(-2)


def mixture_denoise_fn(diffusion: GaussianDiffusion) -> DenoiseFn:
    """`mixture_xstart` as a network that predicts x_0; it computes in float64."""
    schedule = diffusion.schedule

    def xstart(x_t: np.ndarray, t: np.ndarray) -> np.ndarray:
        sigma = np.sqrt(1.0 / schedule.alphas_cumprod - 1.0)[t]
        y = x_t.astype(np.float64) / schedule.sqrt_alphas_cumprod[t][:, None, None, None]
        return mixture_xstart(y, sigma[:, None, None]).astype(np.float32)

    return lambda x_t, t: tf.ensure_shape(tf.numpy_function(xstart, [x_t, t], tf.float32), x_t.shape)


def mixture_flow(y: np.ndarray, sigma_from: float, sigma_to: float) -> np.ndarray:
    """Moves points y [N, 2] along the probability flow of the mixture, from one noise level to another.

    The flow is dy / d log(sigma) = y - E[x_0 | y], with y = x_t / sqrt(alphas_cumprod) and
    sigma^2 = 1 / alphas_cumprod - 1.
    """

    def velocity(log_sigma: float, flat: np.ndarray) -> np.ndarray:
        points = flat.reshape(-1, 2)
        return (points - mixture_xstart(points, np.full(len(points), np.exp(log_sigma)))).ravel()

    ends = np.log(sigma_from), np.log(sigma_to)
    solution = scipy.integrate.solve_ivp(velocity, ends, y.ravel(), method="DOP853", rtol=1e-9, atol=1e-11)
    return solution.y[:, -1].reshape(-1, 2)
