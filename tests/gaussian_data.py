"""Data whose optimal denoiser is known: every pixel of x_0 is N(MEAN, STD^2)."""

import numpy as np
import tensorflow as tf

MEAN, STD = 0.3, 0.5


def optimal_denoiser(diffusion):
    """The best possible network where every pixel of x_0 is N(MEAN, STD^2), in float64 as (a, b): output = a x_t + b.

    And the log-variance of the true p(x_{t-1} | x_t), which is Gaussian here.
    """
    s = diffusion.schedule
    abar, variance = s.alphas_cumprod, STD**2
    gain = variance * np.sqrt(abar) / (abar * variance + 1 - abar)  # E[x_0 | x_t] = MEAN + gain (x_t - sqrt(abar) MEAN)
    offset = MEAN * (1 - gain * np.sqrt(abar))
    xprev = (s.posterior_mean_coef1 * gain + s.posterior_mean_coef2, s.posterior_mean_coef1 * offset)
    xstart_variance = variance * (1 - abar) / (abar * variance + 1 - abar)
    log_variance = np.log(s.posterior_variance + s.posterior_mean_coef1**2 * xstart_variance)
    eps = ((1 - np.sqrt(abar) * gain) / np.sqrt(1 - abar), -np.sqrt(abar) * offset / np.sqrt(1 - abar))
    return {"eps": eps, "xstart": (gain, offset), "xprev": xprev}[diffusion.model_mean_type], xprev, log_variance


def denoise_fn(diffusion):
    """`optimal_denoiser` as a network."""
    (a, b), _, log_variance = optimal_denoiser(diffusion)

    def call(x_t, t):
        at = lambda table: tf.reshape(tf.gather(tf.constant(table, tf.float32), t), [-1, 1, 1, 1])
        output = at(a) * x_t + at(b)
        if diffusion.model_var_type == "learned":
            return tf.concat([output, at(log_variance) * tf.ones_like(x_t)], -1)
        return output

    return call
