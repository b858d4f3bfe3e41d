"""The predicted noise against the true noise, for networks whose moments are known."""

import dataclasses

import numpy as np
import pytest
from support import gaussian_data, golden

from diffusion_tf.calibration import Calibration, calibrated, measure_calibration, run_calibration
from diffusion_tf.data.arrays import array_source
from diffusion_tf.diffusion_utils import GaussianDiffusion
from diffusion_tf.errors import ConfigError, InputError, NotFiniteError
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


def test_a_calibrated_model_predicts_the_scaled_noise():
    trained = golden.tiny_model(make_strategy("one_device"))
    moments = np.array([[0.9, 0.6, 0.5], [0.3, 0.5, 0.25]])
    scaled = calibrated(trained, Calibration(np.array([7, 5, 1]), *moments, np.zeros(3)))
    x_t, t = np.random.RandomState(0).standard_normal((3, 8, 8, 1)).astype(np.float32), np.array([0, 2, 7], np.int32)
    expected = trained.denoise_fn()(x_t, t) * np.array([2.0, 1.8, 3.0]).reshape(3, 1, 1, 1)
    np.testing.assert_allclose(scaled.denoise_fn()(x_t, t), expected, rtol=1e-4, atol=1e-5)
    assert trained.eps_scale is None
    trained.preset = dataclasses.replace(golden.TINY, model_mean_type="xstart")
    with pytest.raises(ConfigError, match="calibrate scales eps, and this run predicts xstart"):
        calibrated(trained, Calibration(np.array([7]), *moments[:, :1], np.zeros(1)))


def test_the_calibration_of_a_run_is_measured_once_for_its_weights(tmp_path):
    trained, opened = golden.tiny_model(make_strategy("one_device")), []

    def open_train():
        opened.append(1)
        return array_source(np.random.RandomState(0).randint(0, 256, (5, 8, 8, 1), np.uint8))

    first, again = (run_calibration(str(tmp_path), trained, "abc", 7, open_train) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert len(opened) == 1 and first.timesteps.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    with pytest.raises(InputError, match="step_00000007.json was made for other weights"):
        run_calibration(str(tmp_path), trained, "other", 7, open_train)


def test_a_network_that_overflows_is_named():
    trained = golden.overflowing_model(make_strategy("one_device"), np.inf, below=4)
    images = np.random.RandomState(0).randint(0, 256, (5, 8, 8, 1), np.uint8)
    with pytest.raises(NotFiniteError, match=r"noise predicted of images .* at t = 3: the network of these weights"):
        measure_calibration(trained, images, timesteps=(7, 3), seed=0, batch_size=5)
