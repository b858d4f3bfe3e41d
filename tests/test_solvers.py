"""Tables of the samplers against diffusers' schedulers, and their order of convergence on known data."""

import dataclasses

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
    SPACINGS,
    SamplerSettings,
    ancestral_table,
    ddim_inversion_table,
    ddim_table,
    dpm_solver_table,
    sampler_table,
    timesteps,
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
    ("make_table", "order"), [(lambda s, ts: ddim_table(s, ts, 0.0), 1), (dpm_solver_table, 2)], ids=["ddim", "dpm"]
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
        (SamplerSettings("ddim", 5, spacing="cosine"), "sampler_spacing=cosine: choose one of trailing"),
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
        "sampler": "ddim", "sampler_steps": 50, "ddim_eta": 0.0, "sampler_spacing": "trailing"
    }  # fmt: skip
    assert SamplerSettings("dpm_solver++", spacing="logsnr").describe(get_preset("cifar10", num_timesteps=8)) == {
        "sampler": "dpm_solver++", "sampler_steps": 8, "sampler_spacing": "logsnr"
    }  # fmt: skip
    assert SamplerSettings("ddim").describe(get_preset("digits"))["sampler_spacing"] == "early_end"
    assert (
        sampler_table(
            SamplerSettings(), get_preset("cifar10", num_timesteps=50), golden.linear_diffusion("eps", "learned", 50)
        )
        is None
    )
