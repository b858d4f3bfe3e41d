"""How well a network predicts noise by timestep, and how well the best linear denoiser of the same pictures does.

Every network is measured by its prediction of eps, whatever it predicts: x_t and its output give eps by Eq. 4. An
untrained network predicts zeros, which have a loss of 1 at every timestep.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import scipy.fft

from diffusion_tf.schedules import NoiseSchedule

# network(x_t float32 [N, H, W, C], t int32 [N]) is its output, float32 [N, H, W, C].
Network = Callable[[np.ndarray, np.ndarray], np.ndarray]

TARGETS = ("eps", "xstart", "v", "xprev")
_SAME_LEVEL = 0.3  # distance of log signal-to-noise ratios
_LEAST_PER_DIMENSION = 4  # pictures for each dimension of a covariance


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a network is taken to be trained on: x = scale * x_0 + shift, diffused by `schedule`.

    Attributes:
      schedule: the forward process.
      target: what the network predicts, one of TARGETS; v is sqrt(abar) eps - sqrt(1 - abar) x (Salimans & Ho 2022).
      scale: of x, where x_0 is in [-1, 1].
      shift: of x.
      reversed_channels: whether the channels of x are in reverse order. Its noise is reversed too, so that the loss
        differs only if the network tells the channels apart.
      reversed_time: whether the network is told T - 1 - t.
    """

    schedule: NoiseSchedule
    target: str
    scale: float = 1.0
    shift: float = 0.0
    reversed_channels: bool = False
    reversed_time: bool = False


def spread_timesteps(num_timesteps: int, count: int) -> np.ndarray:
    """Up to `count` timesteps from 0 to T - 1, ascending and denser at low t, where the loss changes most."""
    return np.unique(np.round(np.linspace(0.0, 1.0, count) ** 2 * (num_timesteps - 1)).astype(int))


def matching_timesteps(schedule: NoiseSchedule, alphas_cumprod: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where a schedule has given noise levels.

    Args:
      schedule: the schedule.
      alphas_cumprod: the levels [K].

    Returns:
      Whether the schedule has each level, up to 30% of its signal-to-noise ratio, bool [K]; and the timesteps of those
      that it has, int [M].
    """
    with np.errstate(divide="ignore"):
        theirs, wanted = (np.log(abar) - np.log1p(-abar) for abar in (schedule.alphas_cumprod, alphas_cumprod))
    distances = np.abs(theirs - wanted[:, None])
    found = distances.min(axis=1) < _SAME_LEVEL
    return found, distances.argmin(axis=1)[found]


def measure_losses(
    network: Network, setup: Setup, x_start: np.ndarray, noise: np.ndarray, timesteps: np.ndarray
) -> np.ndarray:
    """E[(eps - eps_hat)^2] of each image at each timestep, float64 [K, N], by one evaluation for each.

    Args:
      network: the network.
      setup: what it is taken to be trained on.
      x_start: images float32 [N, H, W, C] in [-1, 1].
      noise: standard normal, float32 [N, H, W, C]; x_t at every timestep has this noise.
      timesteps: int [K].
    """
    if setup.reversed_channels:
        x_start, noise = x_start[..., ::-1], noise[..., ::-1]
    x = setup.scale * x_start + setup.shift
    losses = []
    for t in timesteps:
        x_t = setup.schedule.sqrt_alphas_cumprod[t] * x + setup.schedule.sqrt_one_minus_alphas_cumprod[t] * noise
        told = setup.schedule.num_timesteps - 1 - t if setup.reversed_time else t
        output = network(x_t.astype(np.float32), np.full(len(x), told, np.int32))
        eps = predicted_noise(setup, x_t, output, int(t))
        losses.append(((noise - eps) ** 2).mean(axis=(1, 2, 3), dtype=np.float64))
    return np.array(losses)


def predicted_noise(setup: Setup, x_t: np.ndarray, output: np.ndarray, t: int) -> np.ndarray:
    """The eps that follows from x_t and the network's output at timestep t (Eqs. 4 and 7)."""
    s = setup.schedule
    signal, sigma = s.sqrt_alphas_cumprod[t], s.sqrt_one_minus_alphas_cumprod[t]
    match setup.target:
        case "eps":
            return output
        case "v":
            return signal * output + sigma * x_t
        case "xprev":
            output = (output - s.posterior_mean_coef2[t] * x_t) / s.posterior_mean_coef1[t]
    return (x_t - signal * output) / sigma


# --- The best linear denoiser --------------------------------------------------------------------------------------


def spectrum(x: np.ndarray) -> np.ndarray:
    """Variances of pictures float32 [N, H, W, C] along uncorrelated directions, float64 [H W C].

    These are the eigenvalues of the covariance of all pixels if there are pictures enough to estimate it; otherwise of
    the covariance of the channels at each frequency of a cosine transform, whose frequencies hardly correlate.
    """
    centered = x - x.mean(axis=0, dtype=np.float64).astype(np.float32)
    count, dimensions = len(x), x[0].size
    if count >= _LEAST_PER_DIMENSION * dimensions:
        flat = centered.reshape(count, -1)
        return np.maximum(np.linalg.eigvalsh((flat.T @ flat).astype(np.float64) / count), 0.0)
    frequencies = scipy.fft.dctn(centered, axes=(1, 2), norm="ortho")
    covariance = np.einsum("nhwc,nhwd->hwcd", frequencies, frequencies) / count
    return np.maximum(np.linalg.eigvalsh(covariance.astype(np.float64)), 0.0).ravel()


def linear_loss(variances: np.ndarray, alphas_cumprod: np.ndarray) -> np.ndarray:
    """The loss of the best linear prediction of eps from x_t (Wiener), float64 [K], in closed form.

    Args:
      variances: of x along uncorrelated directions, as `spectrum` gives.
      alphas_cumprod: abar at each timestep, [K].
    """
    signal = np.asarray(alphas_cumprod)[:, None] * variances
    return (signal / (signal + 1.0 - np.asarray(alphas_cumprod)[:, None])).mean(axis=1)
