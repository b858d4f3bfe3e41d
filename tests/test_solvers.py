"""Tables of the samplers against diffusers' schedulers, and their order of convergence on known data."""

import dataclasses
import itertools

import numpy as np
import pytest
import tensorflow as tf
from support import gaussian_data, golden

from diffusion_tf.diffusion_utils import GaussianDiffusion
from diffusion_tf.errors import ConfigError
from diffusion_tf.presets import get_preset
from diffusion_tf.samplers import table_steps
from diffusion_tf.schedules import NoiseSchedule
from diffusion_tf.solvers import (
    SAMPLERS,
    SPACINGS,
    SamplerSettings,
    ancestral_table,
    ddim_inversion_table,
    ddim_table,
    dpm_solver_table,
    heun_table,
    repaint_settings,
    sampler_table,
    timesteps,
    with_predicted_eps,
)

GOLDEN = golden.load("schedulers")
SCHEDULE = golden.linear_diffusion("eps", "fixedsmall", 1000).schedule


def run(diffusion, denoise_fn, table, x, *, start=0, stop=None, noise=None, clip_sample="none"):
    """Steps of a table: a single one eagerly, several as a graph."""
    table = dataclasses.replace(table, clip_sample=clip_sample)
    stop = len(table.timesteps) if stop is None else stop

    def steps(x):
        last, noise_fn = tf.zeros_like(x), lambda t: noise
        return table_steps(diffusion, denoise_fn, noise_fn, table, x, last, start, stop)[0]

    return (steps if stop == start + 1 else tf.function(steps))(tf.constant(x, tf.float32)).numpy()


@pytest.mark.parametrize(
    ("spacing", "steps", "key"),
    [
        *((name, n, f"ddim_{name}_one1_{n}") for name in ("leading", "trailing") for n in (10, 50)),
        *((name, n, f"ddim_{name}_{n}") for name in ("leading", "trailing") for n in (7, 30)),
        *(("leading", n, f"ddpm_{n}") for n in (10, 50, 100)),
        *((name, n, f"dpmpp2m_{name}_zero_{n}") for name in ("linspace", "trailing") for n in (10, 20)),
    ],
)
def test_timesteps_match_diffusers(spacing, steps, key):
    np.testing.assert_array_equal(timesteps(SCHEDULE, steps, spacing), GOLDEN[f"{key}_timesteps"])


@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_are_distinct_and_complete(spacing):
    for steps in (1, 2, 3, 7, 20, 33, 50, 100, 333, 999):
        ts = timesteps(SCHEDULE, steps, spacing)
        assert len(ts) == steps and (np.diff(ts) < 0).all() and ts[-1] >= 0
        assert spacing == "leading" or ts[0] == 999
    np.testing.assert_array_equal(timesteps(SCHEDULE, 1000, spacing), np.arange(999, -1, -1))


def test_logsnr_spacing_is_even_where_timesteps_are_dense():
    abar = SCHEDULE.alphas_cumprod[timesteps(SCHEDULE, 12, "logsnr")]
    steps = np.diff(np.log(abar / (1 - abar)))
    np.testing.assert_allclose(steps[:8], steps.mean(), rtol=0.03)
    with pytest.raises(ConfigError, match="logsnr needs a schedule whose alphas_cumprod does not end at 0"):
        timesteps(NoiseSchedule(1.0 / np.arange(50, 0, -1)), 10, "logsnr")


def test_a_strength_takes_the_last_steps_as_a_sampler_of_their_own():
    diffusion, preset = golden.linear_diffusion("eps", "fixedsmall", 1000), get_preset("cifar10")
    table = sampler_table(SamplerSettings("dpm_solver++", 20, strength=0.6), preset, diffusion)
    expected = dpm_solver_table(SCHEDULE, timesteps(SCHEDULE, 20, "trailing")[8:])
    np.testing.assert_array_equal(table.timesteps, expected.timesteps)
    np.testing.assert_array_equal(table.coefficients, expected.coefficients)
    assert [SamplerSettings(strength=strength).last_steps(20) for strength in (1e-9, 0.5, 1.0)] == [1, 10, 20]
    for strength in (0.0, 1.1, np.nan):
        with pytest.raises(ConfigError, match="strength="):
            SamplerSettings(strength=strength).resolve(preset)


@pytest.mark.parametrize("key", sorted(key for key in GOLDEN if key.startswith("ddim") and key.endswith("_prev")))
def test_steps_of_ddim_match_diffusers(key):
    """With `use_clipped_model_output=True`, which computes eps from the clipped x_0."""
    _, spacing, _, steps, i, eta, _, _ = key.split("_")
    i, diffusion = int(i[1:]), golden.linear_diffusion("eps", "fixedsmall", 1000)
    table = ddim_table(diffusion.schedule, timesteps(diffusion.schedule, int(steps), spacing), float(eta[3:]))
    ours = run(
        diffusion, lambda x_t, t: tf.constant(GOLDEN["model_output"]), table, GOLDEN["sample"],
        start=i, stop=i + 1, noise=GOLDEN["noise"], clip_sample="static",
    )  # fmt: skip
    np.testing.assert_allclose(ours, GOLDEN[key], atol=2e-5)


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("i", [0, 9])
def test_ddim_keeps_eps_as_predicted_where_pred_xstart_is_clipped(i, eta):
    """By Eq. 12 of DDIM, with the network's own eps."""
    x, eps, noise = (GOLDEN[name].astype(np.float64) for name in ("sample", "model_output", "noise"))
    ts = timesteps(SCHEDULE, 10, "trailing")
    abar, abar_prev = SCHEDULE.alphas_cumprod[ts[i]], SCHEDULE.alphas_cumprod[ts[i + 1]] if i < 9 else 1.0
    sigma = eta * np.sqrt((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev))
    pred_xstart = np.clip((x - np.sqrt(1 - abar) * eps) / np.sqrt(abar), -1, 1)
    expected = np.sqrt(abar_prev) * pred_xstart + np.sqrt(1 - abar_prev - sigma**2) * eps + sigma * noise
    ours = run(
        golden.linear_diffusion("eps", "fixedsmall", 1000), lambda x_t, t: tf.constant(GOLDEN["model_output"]),
        with_predicted_eps(SCHEDULE, ddim_table(SCHEDULE, ts, eta)), GOLDEN["sample"],
        start=i, stop=i + 1, noise=GOLDEN["noise"], clip_sample="static",
    )  # fmt: skip
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=2e-3 * (i == 0) + 1e-5)


def test_predicted_eps_changes_nothing_without_a_clip():
    diffusion, ts = golden.linear_diffusion("eps", "fixedsmall", 1000), timesteps(SCHEDULE, 6, "trailing")
    x = np.random.RandomState(0).standard_normal((2, 4, 4, 1))
    for table in (ddim_table(SCHEDULE, ts, 0.0), dpm_solver_table(SCHEDULE, ts)):
        ours = [run(diffusion, lambda x_t, t: 0.9 * x_t, t, x) for t in (table, with_predicted_eps(SCHEDULE, table))]
        np.testing.assert_allclose(ours[0], ours[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("var_type", ["fixedlarge", "fixedsmall"])
@pytest.mark.parametrize("steps", [10, 50, 100])
def test_steps_of_ancestral_sampling_match_diffusers(steps, var_type):
    diffusion = golden.linear_diffusion("eps", var_type, 1000)
    ts = timesteps(diffusion.schedule, steps, "leading")
    i = steps // 2
    ours = run(
        diffusion, lambda x_t, t: tf.constant(GOLDEN["model_output"]),
        ancestral_table(diffusion.schedule, ts, var_type), GOLDEN["sample"],
        start=i, stop=i + 1, noise=GOLDEN["noise"], clip_sample="static",
    )  # fmt: skip
    name = var_type.replace("fixed", "fixed_")
    np.testing.assert_allclose(ours, GOLDEN[f"ddpm_{name}_{steps}steps_t{ts[i]}_prev"], atol=3e-4)


@pytest.mark.parametrize(
    "key", ["ddim_leading_one1_10", "ddim_trailing_one1_50", "dpmpp2m_linspace_zero_20", "dpmpp2m_trailing_zero_10",
            "dpmpp2m_leading_zero_20", "dpmpp1m_linspace_zero_20"],
)  # fmt: skip
def test_trajectories_match_diffusers(key):
    """`dpmpp1m`: DPM-Solver++ of order 1 is DDIM with eta = 0."""
    diffusion = golden.linear_diffusion("eps", "fixedsmall", 1000)
    ts, trajectory = GOLDEN[f"{key}_timesteps"], GOLDEN[f"{key}_traj"]
    table = dpm_solver_table(SCHEDULE, ts) if "2m" in key else ddim_table(SCHEDULE, ts, 0.0)
    for steps in (1, 2, len(ts) // 2, len(ts)):
        ours = run(diffusion, lambda x_t, t: 0.1 * x_t, table, trajectory[0], stop=steps)
        np.testing.assert_allclose(ours, trajectory[steps], rtol=1e-5, atol=2e-5 * np.abs(trajectory[:steps]).max())


@pytest.mark.parametrize("var_type", ["fixedlarge", "fixedsmall"])
def test_ancestral_table_of_all_steps_is_algorithm_2(var_type):
    diffusion = golden.linear_diffusion("eps", var_type, 20)
    noises = tf.constant(golden.load("diffusion_ops")["loop20/p_noise_table"])
    table = ancestral_table(diffusion.schedule, np.arange(20)[::-1], var_type)
    x_T = noises[0]
    loop = tf.function(
        lambda: table_steps(
            diffusion, golden.DENOISE_FNS["dn_xt"], lambda t: tf.gather(noises, 20 - t), table, x_T, x_T, 0, 20
        )[0]
    )
    expected = golden.load("diffusion_ops")[f"loop20/p_sample_loop/eps/{var_type}/dn_xt"]
    np.testing.assert_allclose(loop(), expected, rtol=1e-5, atol=1e-5)


def test_ddim_with_eta_1_is_ancestral_sampling():
    ts = timesteps(SCHEDULE, 50, "trailing")
    np.testing.assert_allclose(
        ddim_table(SCHEDULE, ts, 1.0).coefficients, ancestral_table(SCHEDULE, ts, "fixedsmall").coefficients, rtol=1e-9
    )


# --- Convergence on a mixture of Gaussians ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixture():
    """A process of 20,000 fine steps, starting points, and the points to which the probability flow takes them.

    The flow ends at the least noisy level, from which the samplers' last step predicts x_0.
    """
    betas = np.linspace(5e-6, 1e-3, 20_000)
    diffusion = GaussianDiffusion(
        NoiseSchedule(betas), model_mean_type="xstart", model_var_type="fixedsmall", loss_type="mse"
    )
    abar = diffusion.schedule.alphas_cumprod
    sigma = np.sqrt(1.0 / abar - 1.0)
    x_T = np.random.RandomState(0).standard_normal((64, 2))
    y = gaussian_data.mixture_flow(x_T / np.sqrt(abar[-1]), sigma[-1], sigma[0])
    return diffusion, x_T, gaussian_data.mixture_xstart(y, np.full(len(y), sigma[0]))


@pytest.mark.parametrize(
    ("make_table", "order"),
    [(lambda s, ts: ddim_table(s, ts, 0.0), 1), (dpm_solver_table, 2), (heun_table, 2)],
    ids=["ddim", "dpm", "heun"],
)
def test_samplers_converge_to_the_probability_flow_with_their_order(mixture, make_table, order):
    diffusion, x_T, expected = mixture
    steps, errors = [20, 40, 80, 160], []
    for n in steps:
        table = make_table(diffusion.schedule, timesteps(diffusion.schedule, n, "logsnr"))
        x = run(diffusion, gaussian_data.mixture_denoise_fn(diffusion), table, x_T[:, None, None])
        errors.append(np.sqrt(np.mean((x[:, 0, 0] - expected) ** 2)))
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert abs(slope - order) < 0.12 * order, errors


def test_heun_is_edms_algorithm_1(mixture):
    """Against its loop over noise levels, in float64."""
    diffusion, x_T, _ = mixture
    ts = timesteps(diffusion.schedule, 9, "trailing")
    sigmas = np.append(np.sqrt(1.0 / diffusion.schedule.alphas_cumprod[ts] - 1.0), 0.0)
    y = x_T * np.sqrt(1.0 + sigmas[0] ** 2)

    def slope(y, sigma):
        return (y - gaussian_data.mixture_xstart(y, np.full(len(y), sigma))) / sigma

    for sigma, end in itertools.pairwise(sigmas):
        first = slope(y, sigma)
        euler = y + (end - sigma) * first
        y = y + (end - sigma) * (first + slope(euler, end)) / 2 if end else euler
    table = heun_table(diffusion.schedule, ts)
    np.testing.assert_array_equal(table.timesteps, [ts[0], *ts[1:].repeat(2)])
    ours = run(diffusion, gaussian_data.mixture_denoise_fn(diffusion), table, x_T[:, None, None])
    np.testing.assert_allclose(ours[:, 0, 0], y, atol=2e-3)


def test_sde_dpm_solver_is_the_recursion_over_noise_levels():
    """In y = x / sqrt(abar) with the noise level sigma, as k-diffusion writes it."""
    ts = timesteps(SCHEDULE, 7, "trailing")
    abar = np.append(SCHEDULE.alphas_cumprod[ts], 1.0)
    sigmas = np.sqrt(1.0 / abar - 1.0)
    rng = np.random.RandomState(0)
    y, x_starts, noises = rng.standard_normal(3), rng.standard_normal((7, 3)), rng.standard_normal((7, 3))
    x, table = np.sqrt(abar[0]) * y, dpm_solver_table(SCHEDULE, ts, sde=True)
    for i in range(7):
        a, b, c, d, s = table.coefficients[i]
        x = a * x + b * x_starts[i] + c * x_starts[i - 1] + d + s * noises[i]
        if i == 6:
            y = x_starts[i]
        else:
            h = np.log(sigmas[i] / sigmas[i + 1])
            y = sigmas[i + 1] / sigmas[i] * np.exp(-h) * y - np.expm1(-2 * h) * x_starts[i]
            if i:
                ratio = h / np.log(sigmas[i - 1] / sigmas[i])
                y -= 0.5 * np.expm1(-2 * h) * ratio * (x_starts[i] - x_starts[i - 1])
            y += sigmas[i + 1] * np.sqrt(-np.expm1(-2 * h)) * noises[i]
        np.testing.assert_allclose(x, np.sqrt(abar[i + 1]) * y, rtol=1e-9, atol=1e-9)
    small = ancestral_table(SCHEDULE, ts, "fixedsmall").coefficients
    np.testing.assert_allclose(table.coefficients[[0, -1]], small[[0, -1]], rtol=1e-9, atol=1e-12)


def test_the_variance_of_sde_dpm_solver_converges_with_order_2(mixture):
    """For Gaussian data the samples are Gaussian, and their covariance with the last prediction follows a recursion."""
    diffusion, _, _ = mixture
    gains, _ = gaussian_data.optimal_denoiser(diffusion).output
    steps, errors = [40, 80, 160, 320], []
    for n in steps:
        table = dpm_solver_table(diffusion.schedule, timesteps(diffusion.schedule, n, "logsnr"), sde=True)
        covariance = np.diag([1.0, 0.0])
        for t, (a, b, c, _, s) in zip(table.timesteps, table.coefficients, strict=True):
            step = np.array([[a + b * gains[t], c], [gains[t], 0.0]])
            covariance = step @ covariance @ step.T + np.diag([s**2, 0.0])
        last = diffusion.schedule.alphas_cumprod[0]
        expected = gaussian_data.STD**4 * last / (last * gaussian_data.STD**2 + 1 - last)  # of E[x_0 | x_1]
        errors.append(abs(covariance[0, 0] - expected))
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert 1.7 < slope < 2.3, errors


def test_inversion_and_sampling_converge_to_the_probability_flow(mixture):
    """From x_0 to a latent and back, with four times smaller errors for four times more steps."""
    diffusion, _, points = mixture
    denoise_fn, schedule = gaussian_data.mixture_denoise_fn(diffusion), diffusion.schedule
    sigma = np.sqrt(1.0 / schedule.alphas_cumprod - 1.0)
    flow = gaussian_data.mixture_flow(points, 1e-4, sigma[-1]) * schedule.sqrt_alphas_cumprod[-1]
    latent_errors, errors = [], []
    for n in (40, 160):
        ts = timesteps(schedule, n, "logsnr")
        latents = run(diffusion, denoise_fn, ddim_inversion_table(schedule, ts), points[:, None, None])
        latent_errors.append(np.abs(latents[:, 0, 0] - flow).mean())
        back = run(diffusion, denoise_fn, ddim_table(schedule, ts, 0.0), latents)
        errors.append(np.abs(back[:, 0, 0] - points).mean())
    for coarse, fine in (latent_errors, errors):
        assert 3.0 < coarse / fine < 5.0 and fine < 0.02, (latent_errors, errors)


# --- Settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (SamplerSettings("euler"), "sampler=euler: choose one of ancestral, ddim, dpm_solver"),
        (SamplerSettings("ddim", 51), "sampler_steps=51 must be from 1 to the run's 50 steps"),
        (SamplerSettings("ddim", 5, eta=1.5), r"ddim_eta=1.5 must be in \[0, 1\]"),
        (SamplerSettings("ancestral", 5, eta=0.5), "ddim_eta=0.5 goes with `sampler=ddim`, not ancestral"),
        (SamplerSettings("ddim", 5, spacing="early_end"), "sampler_spacing=early_end: choose one of trailing"),
        (SamplerSettings("ddim", 5, clip_sample="yes"), "clip_sample=yes: choose one of static, dynamic, none"),
        (SamplerSettings("heun", 5, use_clipped_model_output=False), "use_clipped_model_output=False does not go with"),
        (SamplerSettings(clip_sample="none"), "sampler_steps=50: the network learned the variance of single steps"),
        (SamplerSettings("ancestral", 5), "sampler_steps=5: the network learned the variance of single steps only"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        sampler_table(settings, get_preset("cifar10", num_timesteps=50), golden.linear_diffusion("eps", "learned", 50))


def test_description_holds_what_samples_depend_on():
    preset = get_preset("cifar10")
    assert SamplerSettings().describe(preset) == {"sampler": "ancestral", "sampler_steps": 1000}
    assert SamplerSettings("ddim").describe(preset) == {
        "sampler": "ddim", "sampler_steps": 50, "ddim_eta": 0.0, "sampler_spacing": "trailing",
        "use_clipped_model_output": False,
    }  # fmt: skip
    assert SamplerSettings("dpm_solver++", spacing="logsnr").describe(get_preset("cifar10", num_timesteps=8)) == {
        "sampler": "dpm_solver++", "sampler_steps": 8, "sampler_spacing": "logsnr"
    }  # fmt: skip
    # Versions that did not record these settings had these values.
    assert "use_clipped_model_output" not in SamplerSettings("ddim", use_clipped_model_output=True).describe(preset)
    assert SamplerSettings("dpm_solver++", 20, clip_sample="dynamic").describe(preset)["clip_sample"] == "dynamic"
    assert (
        sampler_table(
            SamplerSettings(), get_preset("cifar10", num_timesteps=50), golden.linear_diffusion("eps", "learned", 50)
        )
        is None
    )


def test_fewer_steps_than_all_choose_another_sampler():
    preset = get_preset("cifar10")
    assert [SamplerSettings(steps=n).resolve(preset).name for n in (None, 1000, 50)] == [
        "ancestral", "ancestral", "sde_dpm_solver++"
    ]  # fmt: skip
    assert repaint_settings(SamplerSettings(steps=50), preset).name == "ancestral"


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 5, 1000])
def test_no_sampler_takes_more_evaluations_than_asked_for(name, steps):
    diffusion = golden.linear_diffusion("eps", "fixedlarge", 1000)
    table = sampler_table(SamplerSettings(name, steps, clip_sample="none"), get_preset("cifar10"), diffusion)
    assert len(table.timesteps) == (steps - 1 + steps % 2 if name == "heun" else steps)
    assert np.isfinite(table.coefficients).all()
