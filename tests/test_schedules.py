"""Beta schedules and tables against the authors' float64 numbers."""

import numpy as np
import pytest
from support import golden

from diffusion_tf.errors import InputError
from diffusion_tf.presets import CHOICES
from diffusion_tf.schedules import NoiseSchedule, get_beta_schedule, posterior

GOLDEN = golden.load("schedules")
TABLES = (
    "alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod"
    " log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod posterior_variance"
    " posterior_log_variance_clipped posterior_mean_coef1 posterior_mean_coef2 fixedlarge_log_variance"
).split()


def _betas(name, num_timesteps=1000):
    return get_beta_schedule(name, beta_start=1e-4, beta_end=0.02, num_timesteps=num_timesteps)


@pytest.mark.parametrize("name", CHOICES["beta_schedule"])
def test_betas_match_the_authors(name):
    betas = _betas(name)
    assert betas.dtype == np.float64
    np.testing.assert_allclose(betas, GOLDEN[f"betas_{name}"], rtol=1e-15)


@pytest.mark.parametrize("table", TABLES)
def test_tables_match_the_authors(table):
    ours = getattr(NoiseSchedule(_betas("linear")), table)
    np.testing.assert_allclose(ours, GOLDEN[table], rtol=1e-13, atol=0)


def test_log_variance_of_the_authors_second_class_differs_at_t_0_only():
    ours = NoiseSchedule(_betas("linear")).posterior_log_variance_clipped
    np.testing.assert_allclose(ours[1:], GOLDEN["v1_posterior_log_variance_clipped"][1:], rtol=1e-13)


def test_jsd_ends_in_pure_noise_with_a_finite_posterior():
    schedule = NoiseSchedule(_betas("jsd", 50))
    assert schedule.alphas_cumprod[-1] == 0.0
    assert np.isfinite(schedule.posterior_mean_coef1).all()
    assert np.isfinite(schedule.posterior_log_variance_clipped).all()


def test_posterior_of_a_long_step_is_bayes_rule():
    """q(x_s | x_t, x_0) is proportional to q(x_t | x_s) q(x_s | x_0): precisions add."""
    abar = NoiseSchedule(_betas("linear")).alphas_cumprod
    t, s = np.array([999, 700, 300, 20]), np.array([700, 300, 20, 0])
    alphas = abar[t] / abar[s]
    q = posterior(alphas, 1 - alphas, abar[t], abar[s])
    likelihood, prior = alphas / (1 - alphas), 1 / (1 - abar[s])  # precisions of x_s
    np.testing.assert_allclose(q.variance, 1 / (likelihood + prior), rtol=1e-9)
    np.testing.assert_allclose(q.mean_coef1, q.variance * prior * np.sqrt(abar[s]), rtol=1e-9)
    np.testing.assert_allclose(q.mean_coef2, q.variance * likelihood / np.sqrt(alphas), rtol=1e-9)


def test_unknown_schedule_lists_the_choices():
    with pytest.raises(InputError, match="linear, quad, const, warmup10, warmup50, jsd"):
        _betas("cosine")


@pytest.mark.parametrize("betas", [[0.1], [0.1, 0.0], [0.1, 1.5], [[0.1, 0.2]]])
def test_invalid_betas_are_refused(betas):
    with pytest.raises(InputError, match="betas"):
        NoiseSchedule(np.array(betas))
