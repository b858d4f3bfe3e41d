"""RePaint against its authors' schedule, on Gaussian data whose conditional is known, and on small networks."""

import dataclasses
import itertools

import numpy as np
import pytest
import tensorflow as tf
from support import golden

from diffusion_tf.errors import ConfigError, NotFiniteError
from diffusion_tf.inpainting import Inpainter, repaint_steps
from diffusion_tf.presets import get_preset
from diffusion_tf.rng import CounterRng
from diffusion_tf.runtime.strategies import make_strategy
from diffusion_tf.samplers import Sampler
from diffusion_tf.schedules import NoiseSchedule
from diffusion_tf.solvers import SamplerSettings, repaint_settings, repaint_table

ONE = make_strategy("one_device")
IMAGES = np.random.RandomState(0).randint(0, 256, (5, 8, 8, 1), np.uint8)
PAINTED = np.zeros((5, 8, 8, 1), bool)
PAINTED[:, :, :4] = True


@pytest.mark.parametrize(("num_steps", "jump_length", "resamplings"), [(250, 10, 10), (20, 3, 4), (7, 1, 2), (5, 9, 3)])
def test_the_schedule_is_that_of_the_authors(num_steps, jump_length, resamplings):
    """Their program counts down, and up again step by step wherever it has jumps left."""
    jumps = dict.fromkeys(range(0, num_steps - jump_length, jump_length), resamplings - 1)
    t, times = num_steps, []
    while t >= 1:
        t -= 1
        times.append(t)
        if jumps.get(t, 0) > 0:
            jumps[t] -= 1
            times += range(t + 1, t + jump_length + 1)
            t += jump_length
    schedule = NoiseSchedule(np.linspace(1e-3, 0.1, num_steps))
    ts = np.arange(num_steps)[::-1]
    table = repaint_table(schedule, ts, resamplings=resamplings, jump_length=jump_length)
    i, renoised, abar = -1, 1.0, np.append(schedule.alphas_cumprod, 1.0)
    for begin, end in itertools.pairwise([*times, -1]):
        if end < begin:
            i, renoised = i + 1, 1.0
            assert ts[table.steps[i]] == begin and table.ends[i] == abar[end]
        else:
            renoised *= 1.0 - schedule.betas[end]
        assert end < begin or end % jump_length or np.isclose(table.jumps[i], renoised)
    assert i == len(table.steps) - 1 and (table.jumps != 1.0).sum() == sum(
        end > begin and begin % jump_length == 0 for begin, end in itertools.pairwise(times)
    )


# --- Two pixels of correlation RHO, of which the second is known ----------------------------------------------------

RHO, KNOWN = 0.9, 0.8
COVARIANCE = np.array([[1.0, RHO], [RHO, 1.0]])


def optimal_gain(diffusion):
    """The optimal network for this data is linear: E[x_0 | x_t] = gain[t] x_t, float64 [T, 2, 2]."""
    abar = diffusion.schedule.alphas_cumprod[:, None, None]
    return np.sqrt(abar) * COVARIANCE @ np.linalg.inv(abar * COVARIANCE + (1 - abar) * np.eye(2))


def exact_moments(table, diffusion):
    """Mean and variance of the painted pixel: the chain is linear, so a recursion in float64 gives them."""
    s, gain, painted = diffusion.schedule, optimal_gain(diffusion), np.diag([1.0, 0.0])
    variance = np.exp(s.fixedlarge_log_variance) * (np.arange(s.num_timesteps) > 0)
    mean, covariance = np.zeros(2), np.eye(2)
    for step, end, jump in zip(table.steps, table.ends, table.jumps, strict=True):
        t = s.num_timesteps - 1 - step
        map_ = s.posterior_mean_coef1[t] * gain[t] + s.posterior_mean_coef2[t] * np.eye(2)
        mean, covariance = map_ @ mean, map_ @ covariance @ map_.T + variance[t] * np.eye(2)
        mean = painted @ mean + [0.0, np.sqrt(end) * KNOWN]
        covariance = painted @ covariance @ painted + np.diag([0.0, 1.0 - end])
        mean, covariance = np.sqrt(jump) * mean, jump * covariance + (1.0 - jump) * np.eye(2)
    return mean[0], covariance[0, 0]


def repaint_of(diffusion, resamplings):
    ts = np.arange(diffusion.num_timesteps)[::-1]
    return repaint_table(diffusion.schedule, ts, resamplings=resamplings, jump_length=10)


def test_resampling_leads_to_the_conditional_of_gaussian_data():
    diffusion = golden.linear_diffusion("xstart", "fixedlarge", 1000)
    moments = np.array([exact_moments(repaint_of(diffusion, r), diffusion) for r in (1, 3, 10, 30)])
    mean_errors, variance_errors = np.abs(moments - [RHO * KNOWN, 1.0 - RHO**2]).T
    assert (np.diff(mean_errors) < 0).all() and (np.diff(variance_errors) < 0).all()
    assert mean_errors[0] > 0.2 and mean_errors[2] < 0.02 and mean_errors[3] < 0.006
    assert variance_errors[0] > 0.1 and variance_errors[2] < 0.01 and variance_errors[3] < 0.004


def test_the_loop_has_the_moments_of_the_recursion():
    diffusion, shape = golden.linear_diffusion("xstart", "fixedlarge", 60), (5_000, 1, 2, 1)
    table, gain = repaint_of(diffusion, 3), tf.constant(optimal_gain(diffusion), tf.float32)
    denoise_fn = lambda x, t: tf.reshape(tf.matmul(x[:, 0, :, 0], gain[t[0]], transpose_b=True), shape)
    noise_fn = lambda stream, left: CounterRng(0, left, 0).normal(stream, shape)
    stop = len(table.steps)
    paint = tf.function(
        lambda: repaint_steps(
            diffusion, denoise_fn, noise_fn, None, table, noise_fn("sample", tf.constant(stop)), tf.fill(shape, KNOWN),
            tf.constant([[[[True], [False]]]]), 0, stop, clip_denoised=False,
        ),
        jit_compile=True,
    )  # fmt: skip
    x = paint().numpy()[:, 0, :, 0].astype(np.float64)
    np.testing.assert_array_equal(x[:, 1], np.float32(KNOWN))
    mean, variance = exact_moments(table, diffusion)
    assert abs(x[:, 0].mean() - mean) < 5 * np.sqrt(variance / len(x))
    assert abs(x[:, 0].var() - variance) < 5 * variance * np.sqrt(2 / len(x))


# --- Networks -------------------------------------------------------------------------------------------------------


def model(strategy=ONE):
    return golden.known_model(golden.DENOISE_FNS["dn_xt"], strategy)


def inpainter(strategy=ONE, batch_size=5, **settings):
    return Inpainter(model(strategy), batch_size=batch_size, seed=3, jump_length=2, **settings)


def test_known_pixels_stay_and_a_picture_depends_on_its_index_only():
    paint, by_twos = inpainter(resamplings=2), inpainter(batch_size=2, resamplings=2)
    pictures = paint(IMAGES, PAINTED, first_image=7)
    np.testing.assert_array_equal(pictures[~PAINTED], IMAGES[~PAINTED])
    assert (pictures[PAINTED] != IMAGES[PAINTED]).mean() > 0.9 and pictures.dtype == np.uint8
    parts = [by_twos(IMAGES[i : i + 2], PAINTED[i : i + 2], first_image=7 + i) for i in (0, 2, 4)]
    np.testing.assert_allclose(np.concatenate(parts).astype(int), pictures, atol=1)  # float rounding
    assert (paint(IMAGES, PAINTED) != pictures)[PAINTED].mean() > 0.5


def test_a_picture_without_known_pixels_is_the_sample_of_its_index():
    pictures = inpainter(resamplings=1)(IMAGES, np.ones_like(PAINTED), first_image=2)
    samples = Sampler(model(), batch_size=5, seed=3).images(2, 5)
    np.testing.assert_allclose(pictures.astype(int), samples, atol=1)  # float rounding


@pytest.mark.parametrize(
    "settings", [SamplerSettings("ancestral", 5), SamplerSettings("ddim", 4)], ids=lambda s: s.name
)
def test_samplers_of_few_steps_inpaint(settings):
    by_steps = inpainter(settings=settings, resamplings=3)
    pictures = by_steps(IMAGES, PAINTED)
    np.testing.assert_array_equal(pictures[~PAINTED], IMAGES[~PAINTED])
    assert by_steps.num_evaluations == 1 + (settings.steps - 1) % 2 + 3 * ((settings.steps - 1) // 2 * 2)


@pytest.mark.slow
def test_replicas_share_a_batch_without_a_difference():
    shared = inpainter(make_strategy("mirrored"), batch_size=16)(IMAGES, PAINTED, first_image=7)
    np.testing.assert_allclose(shared.astype(int), inpainter()(IMAGES, PAINTED, first_image=7), atol=1)


def test_ancestral_sampling_takes_100_steps_unless_the_variance_is_learned():
    preset = get_preset("cifar10")
    learned = dataclasses.replace(preset, model_var_type="learned", loss_type="kl")
    for settings, given, steps in (
        (SamplerSettings(), preset, 100),
        (SamplerSettings(), learned, None),
        (SamplerSettings(steps=20), preset, 20),
        (SamplerSettings("ddim"), preset, None),
        (SamplerSettings(), golden.TINY, 8),
    ):
        assert repaint_settings(settings, given).steps == steps


def test_settings_that_do_not_fit_are_named():
    for settings, message in (
        ({"resamplings": 0}, "resamplings=0 must be greater than 0"),
        ({"settings": SamplerSettings("dpm_solver++", 4)}, "sampler=dpm_solver.. uses the step before"),
    ):
        with pytest.raises(ConfigError, match=message):
            inpainter(**settings)
    overflowing = golden.overflowing_model(ONE, np.nan, below=8)
    with pytest.raises(NotFiniteError, match="pictures .* hold NaN or infinity at t = "):
        Inpainter(overflowing, batch_size=5, seed=0)(IMAGES, PAINTED)
