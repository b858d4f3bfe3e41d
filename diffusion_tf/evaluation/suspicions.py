"""What else a network may have been trained on than its configuration says: other data, targets and processes."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from diffusion_tf.evaluation.denoising import (
    TARGETS,
    Network,
    Setup,
    matching_timesteps,
    measure_losses,
    spread_timesteps,
)
from diffusion_tf.evaluation.diagnosis import ERROR, Comparison, Finding, fit
from diffusion_tf.presets import Preset
from diffusion_tf.schedules import NoiseSchedule, get_beta_schedule

_TIMESTEPS, _LEAST_LEVELS = 8, 3  # where setups are compared
_STEPS = (100, 250, 500, 1000, 2000, 4000)
_BETA_STEPS = 1000  # of the process whose betas others scale by their own number of steps
_MAX_BETA = 0.999
_TARGETS = {"eps": "the noise", "xstart": "x_0", "v": "v", "xprev": "the mean of x_{t-1}"}


def compare_setups(
    network: Network,
    preset: Preset,
    recorded: Setup,
    x_start: np.ndarray,
    noise: np.ndarray,
    variances: np.ndarray,
) -> Iterator[Comparison]:
    """Compares the loss of a network on what its configuration says with that on each of the `suspicions`.

    It takes up to 8 network evaluations of each image for each of about 40 suspicions.

    Args:
      network: the network.
      preset: the run's configuration.
      recorded: the setup that it describes.
      x_start: images float32 [N, H, W, C] in [-1, 1].
      noise: standard normal, float32 [N, H, W, C].
      variances: `denoising.spectrum` of the pictures.
    """
    ts = spread_timesteps(recorded.schedule.num_timesteps, _TIMESTEPS)
    own = measure_losses(network, recorded, x_start, noise, ts).mean(axis=1)
    for finding, setup in suspicions(preset, recorded, float(x_start.mean()), float(x_start.std())):
        found, theirs = matching_timesteps(setup.schedule, recorded.schedule.alphas_cumprod[ts])
        if found.sum() < _LEAST_LEVELS:
            continue
        loss = measure_losses(network, setup, x_start, noise, theirs).mean(axis=1)
        yield Comparison(
            finding,
            recorded=fit(own[found], ts[found], recorded, variances),
            other=fit(loss, theirs, setup, variances),
            loss=loss,
        )


def suspicions(preset: Preset, recorded: Setup, mean: float, std: float) -> Iterator[tuple[Finding, Setup]]:
    """Yields each other setup, and the finding if a network was trained on it.

    Args:
      preset: the run's configuration.
      recorded: the setup that it describes.
      mean: of the pictures in [-1, 1].
      std: their standard deviation.
    """
    scales = {
        "[0, 255]": (127.5, 127.5),
        "[0, 1]": (0.5, 0.5),
        "[-0.5, 0.5]": (0.5, 0.0),
        "units of its standard deviation": (1.0 / std, -mean / std),
    }
    for name, (scale, shift) in scales.items():
        problem = f"the network was trained on x in {name}, and is given x in [-1, 1]"
        yield (
            Finding("data range", ERROR, problem, "Train with `x = pixels / 127.5 - 1`"),
            dataclasses.replace(recorded, scale=scale, shift=shift),
        )
    for target in TARGETS:
        if target != recorded.target:
            problem = f"the network predicts {_TARGETS[target]}, and is taken to predict {_TARGETS[recorded.target]}"
            remedy = "Train again, with the loss on what `model_mean_type` says"
            if target != "v":
                remedy = f"Set model_mean_type to {target} in config.json, or train on {recorded.target}"
            yield Finding("target", ERROR, problem, remedy), dataclasses.replace(recorded, target=target)
    for name, schedule in _schedules(preset):
        if schedule.num_timesteps == recorded.schedule.num_timesteps and np.allclose(
            schedule.alphas_cumprod, recorded.schedule.alphas_cumprod, rtol=1e-3
        ):
            continue
        problem = f"the network was trained on another noise schedule ({name})"
        yield (
            Finding("noise schedule", ERROR, problem, "Set these values in config.json, or train on the recorded ones"),
            dataclasses.replace(recorded, schedule=schedule),
        )
    problem = "the network is told T - 1 - t for t"
    yield (
        Finding("timestep", ERROR, problem, "Train with t as it is"),
        dataclasses.replace(recorded, reversed_time=True),
    )


def _schedules(preset: Preset) -> Iterator[tuple[str, NoiseSchedule]]:
    """Yields other schedules by what they are: the run's betas or the paper's with another T, and cosines."""
    betas = {(preset.beta_start, preset.beta_end), (1e-4, 0.02)}
    for steps in sorted({*_STEPS, preset.num_timesteps}):
        factor = _BETA_STEPS / steps
        for start, end in sorted(betas | {(1e-4 * factor, 0.02 * factor)}):
            if end < 1:
                name = f"num_timesteps={steps}, linear beta_start={start:g}, beta_end={end:g}"
                table = get_beta_schedule("linear", beta_start=start, beta_end=end, num_timesteps=steps)
                yield name, NoiseSchedule(table)
        yield f"num_timesteps={steps}, cosine", NoiseSchedule(cosine_betas(steps))


def cosine_betas(num_timesteps: int) -> np.ndarray:
    """Betas float64 [T] of the cosine schedule (Nichol & Dhariwal 2021, Eq. 17)."""
    levels = np.cos((np.arange(num_timesteps + 1) / num_timesteps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1.0 - levels[1:] / levels[:-1], _MAX_BETA)
