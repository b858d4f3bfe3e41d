"""The predicted noise against the true noise, for networks whose moments are known."""

import dataclasses

import numpy as np
import pytest
from support import gaussian_data, golden

from diffusion_tf.calibration import measure_calibration
from diffusion_tf.diffusion_utils import GaussianDiffusion
from diffusion_tf.errors import NotFiniteError
from diffusion_tf.runtime.strategies import make_strategy

TIMESTEPS = (7, 3, 0)


@pytest.mark.parametrize("mean_type", ["eps", "xstart"])
def test_moments_are_those_of_gaussian_data(mean_type):
    images = np.clip(np.random.RandomState(0).normal(150.0, 40.0, (600, 8, 8, 1)), 0, 255).astype(np.uint8)
    preset = dataclasses.replace(golden.TINY, model_mean_type=mean_type)
    diffusion = GaussianDiffusion.from_preset(preset)
    trained = golden.known_model(gaussian_data.denoise_fn(diffusion), make_strategy("one_device"), preset)
    found = measure_calibration(trained, images, timesteps=TIMESTEPS, seed=0, batch_size=256)

    a, b = gaussian_data.optimal_denoiser(GaussianDiffusion.from_preset(golden.TINY)).output
    x_start, abar, ts = images / 127.5 - 1.0, diffusion.schedule.alphas_cumprod, np.array(TIMESTEPS)
    mean, a, b, abar = np.sqrt(abar[ts]) * x_start.mean(), a[ts], b[ts], abar[ts]
    cross = a * np.sqrt(1.0 - abar)
    power = a**2 * (abar * x_start.var() + 1.0 - abar) + (a * mean + b) ** 2
    np.testing.assert_array_equal(found.timesteps, TIMESTEPS)
    np.testing.assert_allclose(found.cross, cross, rtol=0.02, atol=1e-3)
    np.testing.assert_allclose(found.power, power, rtol=0.02)
    np.testing.assert_allclose(found.loss, 1.0 - 2.0 * cross + power, rtol=0.02)
    np.testing.assert_allclose(found.scale, cross / power, rtol=0.02)


def test_the_scale_undoes_a_network_that_predicts_too_little_noise():
    images = np.random.RandomState(0).randint(0, 256, (7, 8, 8, 1), np.uint8)
    strategy, calibrations = make_strategy("one_device"), []
    for share in (1.0, 0.5):
        trained = golden.known_model(lambda x_t, t, share=share: share * x_t, strategy)
        calibrations.append(measure_calibration(trained, images, timesteps=TIMESTEPS, seed=3, batch_size=4))
    np.testing.assert_allclose(calibrations[1].scale, 2.0 * calibrations[0].scale, rtol=1e-4)


def test_a_network_that_overflows_is_named():
    trained = golden.overflowing_model(make_strategy("one_device"), np.inf, below=4)
    images = np.random.RandomState(0).randint(0, 256, (5, 8, 8, 1), np.uint8)
    with pytest.raises(NotFiniteError, match=r"noise predicted of images .* at t = 3: the network of these weights"):
        measure_calibration(trained, images, timesteps=(7, 3), seed=0, batch_size=5)
