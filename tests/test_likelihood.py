"""The bound against the authors' loop, against a closed form, and over a set of images."""

import dataclasses

import numpy as np
import pytest
import scipy.stats
import tensorflow as tf
from support import gaussian_data, golden

from diffusion_tf import likelihood
from diffusion_tf.data.digits import load_digits
from diffusion_tf.diffusion_utils import GaussianDiffusion
from diffusion_tf.errors import NotFiniteError
from diffusion_tf.presets import PRESETS
from diffusion_tf.rng import CounterRng
from diffusion_tf.runtime.strategies import make_strategy
from diffusion_tf.schedules import NoiseSchedule, get_beta_schedule

GOLDEN = golden.load("diffusion_ops")


@pytest.mark.parametrize(
    "case",
    [
        "eps/fixedlarge/clip1/dn_x",
        "eps/fixedlarge/clip0/dn_x",
        "eps/fixedsmall/clip1/dn_x",
        "eps/fixedlarge/clip1/dn_xt",
        "xstart/fixedsmall/clip1/dn_x",
        "xprev/fixedlarge/clip1/dn_x",
    ],
)
@pytest.mark.parametrize("noise", ["calc_bpd", "calc_bpd_tab"])
def test_loop_matches_the_authors(case, noise):
    mean_type, var_type, clip, denoise_name = case.split("/")
    diffusion, denoise_fn, clip = (
        golden.linear_diffusion(mean_type, var_type, 20),
        golden.DENOISE_FNS[denoise_name],
        clip == "clip1",
    )
    x_start, noises = GOLDEN["x_start"], tf.constant(GOLDEN["loop20/q_noise_table"] * (noise == "calc_bpd_tab"))

    @tf.function(jit_compile=True)
    def loop():
        noise_fn, timesteps_fn = lambda k: tf.gather(noises, k), lambda k: tf.fill([8], k)
        return likelihood.calc_bpd_loop(
            diffusion, denoise_fn, tf.constant(x_start), noise_fn, timesteps_fn, 20, clip_denoised=clip
        )

    bound = loop()
    zeros = np.zeros(8, np.int32)
    x_1 = diffusion.q_sample(x_start, zeros, noises[0])
    decoder_atol = golden.decoder_atol(diffusion, denoise_fn, x_start, x_1, zeros, clip)

    def assert_golden(ours, name, atol=0.0):
        expected = GOLDEN[f"loop20/{noise}/{case}/{name}"]
        atol = atol + 1e-6 * max(1.0, np.abs(expected).max())
        assert np.all(np.abs(ours - expected) <= 1e-5 * np.abs(expected) + atol), name

    assert_golden(bound.terms_bpd, "terms_bpd", decoder_atol[:, None] * (np.arange(20) == 0))
    assert_golden(bound.prior_bpd, "prior_bpd")
    assert_golden(bound.mse, "mse")
    assert_golden(np.sum(bound.terms_bpd, axis=1) + bound.prior_bpd, "total_bpd", decoder_atol)


def decoder_nats(diffusion):
    """E[-log p(x_0 | x_1)] of the exact denoiser of Gaussian data, by quadrature with the exact normal CDF."""
    schedule = diffusion.schedule
    (a, b), _, _ = gaussian_data.optimal_denoiser(diffusion)
    z = np.linspace(-7, 7, 1401)
    weight = scipy.stats.norm.pdf(z) / scipy.stats.norm.pdf(z).sum()
    x_0 = gaussian_data.MEAN + gaussian_data.STD * z[:, None]
    x_1 = schedule.sqrt_alphas_cumprod[0] * x_0 + schedule.sqrt_one_minus_alphas_cumprod[0] * z[None, :]
    mean, std = a[0] * x_1 + b[0], np.exp(0.5 * schedule.posterior_log_variance_clipped[0])
    plus, minus = (scipy.stats.norm.cdf((x_0 - mean + sign / 255) / std) for sign in (1, -1))
    probability = np.where(x_0 < -0.999, plus, np.where(x_0 > 0.999, 1 - minus, plus - minus))
    return -(weight[:, None] * weight[None, :] * np.log(np.maximum(probability, 1e-12))).sum()


def analytic_terms(diffusion):
    """L_1, ..., L_{T-1} in nats per dimension of the exact denoiser of Gaussian data, with variances `fixedsmall`."""
    schedule, variance = diffusion.schedule, gaussian_data.STD**2
    abar = schedule.alphas_cumprod
    # Both Gaussians have one variance, so their KL is the squared distance of the means: coef1 (x_0 - E[x_0 | x_t]).
    xstart_variance = variance * (1 - abar) / (abar * variance + 1 - abar)
    return (schedule.posterior_mean_coef1**2 * xstart_variance / 2)[1:] / schedule.posterior_variance[1:]


def test_exact_denoiser_of_gaussian_data_has_the_analytic_bound():
    diffusion = golden.linear_diffusion("xstart", "fixedsmall", 1000)
    abar, terms = diffusion.schedule.alphas_cumprod, analytic_terms(diffusion)
    second_moment = gaussian_data.MEAN**2 + gaussian_data.STD**2
    prior = 0.5 * (-1 - np.log(1 - abar[-1]) + (1 - abar[-1]) + abar[-1] * second_moment)
    expected = (prior + terms.sum() + decoder_nats(diffusion)) / np.log(2)

    shape = (512, 8, 8, 1)

    @tf.function(jit_compile=True)
    def loop(batch):
        first = tf.cast(batch, tf.int64) * 512
        x_start = gaussian_data.MEAN + gaussian_data.STD * CounterRng(5, 0, first).normal("x_start", shape)
        noise_fn = lambda k: CounterRng(6, k, first).normal("noise", shape)
        denoise_fn = gaussian_data.denoise_fn(diffusion)
        timesteps_fn = lambda k: tf.fill([512], k)
        return likelihood.calc_bpd_loop(
            diffusion, denoise_fn, x_start, noise_fn, timesteps_fn, 1000, clip_denoised=False
        )

    bounds = [loop(tf.constant(batch)) for batch in range(2)]
    totals = np.concatenate([bound.prior_bpd + np.sum(bound.terms_bpd, axis=1) for bound in bounds])
    mean, standard_error = likelihood.mean_and_standard_error(totals)
    assert standard_error < 0.012
    # The decoder's tanh approximation of the CDF costs up to 1e-3.
    assert abs(mean - expected) < 4 * standard_error + 1e-3
    middle = np.concatenate([np.asarray(bound.terms_bpd)[:, 1:] for bound in bounds]).mean(axis=0)
    np.testing.assert_allclose(middle, terms / np.log(2), rtol=0.03, atol=1e-6)  # float32 noise


def tiny(strategy, batch_size, seed=3, estimate=None):
    trained = golden.tiny_model(strategy)
    return likelihood.BoundEvaluator(trained, batch_size=batch_size, seed=seed, num_timesteps_estimate=estimate)


@pytest.mark.slow
def test_terms_of_an_image_depend_on_seed_and_index_only():
    one, images = make_strategy("one_device"), load_digits()[:16]
    sixteen = tiny(one, 16)
    reference, last_five = sixteen(0, images), sixteen(11, images[11:])
    replicated = tiny(make_strategy("mirrored"), 16)(0, images)
    other_seed = tiny(one, 16, seed=4)(0, images)
    for i, name in enumerate(likelihood.BoundTerms._fields):
        np.testing.assert_allclose(last_five[i], reference[i][11:], rtol=1e-4, err_msg=name)
        np.testing.assert_allclose(replicated[i], reference[i], rtol=1e-4, err_msg=name)
    assert np.abs(other_seed.terms_bpd / reference.terms_bpd - 1).max() > 0.01


@pytest.mark.parametrize("schedule", ["linear", "const", "jsd"])
def test_drawn_timesteps_and_weights_give_every_sum_without_bias(schedule):
    """A fine grid of u stands for the expectation."""
    betas = get_beta_schedule(schedule, beta_start=1e-4, beta_end=0.02, num_timesteps=50)
    strata = likelihood.TimestepStrata(NoiseSchedule(betas))
    grid = (np.arange(20_000, dtype=np.float32) + 0.5) / 20_000
    for num_strata in (1, 4):
        timesteps, weights = (np.asarray(a) for a in strata.draw(np.tile(grid[:, None], num_strata)))
        assert (timesteps[:, 0] == 0).all() and (weights[:, 0] == 1).all() and timesteps[:, 1:].min() == 1
        expected = np.bincount(timesteps.ravel(), weights.ravel(), minlength=50) / len(grid)
        np.testing.assert_allclose(expected, np.ones(50), rtol=0.03)


def test_25_terms_estimate_the_bound_of_gaussian_data_within_5_percent():
    diffusion = golden.linear_diffusion("xstart", "fixedsmall", 1000)
    terms = analytic_terms(diffusion)
    u = np.random.default_rng(0).random((2000, 25), np.float32)
    timesteps, weights = (np.asarray(a)[:, 1:] for a in likelihood.TimestepStrata(diffusion.schedule).draw(u))
    estimates = (weights * terms[timesteps - 1]).sum(axis=1)
    mean, standard_error = likelihood.mean_and_standard_error(estimates)
    assert abs(mean - terms.sum()) < 4 * standard_error
    assert estimates.std() < 0.05 * terms.sum()


@pytest.mark.slow
def test_estimate_is_unbiased():
    one, images = make_strategy("one_device"), load_digits()[:256]
    exact = tiny(one, 256)(0, images).terms_bpd
    for num_terms in (1, 3):
        terms = tiny(one, 256, estimate=num_terms)(0, images).terms_bpd
        np.testing.assert_allclose(terms[:, 0], exact[:, 0], rtol=1e-4)
        difference = terms[:, 1:].sum(axis=1) - exact[:, 1:].sum(axis=1)
        mean, standard_error = likelihood.mean_and_standard_error(difference)
        assert standard_error > 0 and abs(mean) < 4 * standard_error


def test_bound_of_images_adds_up_the_terms_of_all_batches():
    trained = golden.known_model(golden.DENOISE_FNS["dn_x"], make_strategy("one_device"))
    images, everything = load_digits()[:7], {"batch_size": 7, "seed": 3}
    bound = likelihood.bound_of_images(trained, images, batch_size=3, seed=3)
    evaluate = likelihood.BoundEvaluator(trained, **everything)
    terms, prior, mse = (np.asarray(value, np.float64) for value in evaluate(0, images))
    np.testing.assert_allclose(bound.total_bpd, prior + terms.sum(axis=1), rtol=1e-4)
    np.testing.assert_allclose(bound.terms_bpd, terms.mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(bound.terms_standard_error, terms.std(axis=0, ddof=1) / np.sqrt(7), rtol=1e-3)
    np.testing.assert_allclose(bound.mse, mse.mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(bound.mean_square, np.square(images / 127.5 - 1).mean(axis=(1, 2, 3)))
    estimate = likelihood.bound_of_images(trained, images, batch_size=3, seed=3, num_timesteps_estimate=2)
    chosen, _, _ = likelihood.BoundEvaluator(trained, **everything, num_timesteps_estimate=2)(0, images)
    np.testing.assert_allclose(estimate.middle_bpd, chosen[:, 1:].sum(axis=1), rtol=1e-4)
    assert estimate.terms_bpd is None


def test_interrupted_measurement_continues_to_the_same_result(tmp_path):
    strategy = make_strategy("one_device")
    trained = golden.known_model(golden.DENOISE_FNS["dn_xt"], strategy)
    images, read = load_digits()[:50], []

    def measure(trained, fail_at=None):
        def read_images(first, count):
            if first == fail_at:
                raise KeyboardInterrupt
            read.append(first)
            return images[first : first + count]

        return likelihood.measure_bound(
            trained, read_images, num_images=50, batch_size=20, seed=1, partial=str(tmp_path), subject={}
        )

    with pytest.raises(KeyboardInterrupt):
        measure(trained, fail_at=40)
    resumed = measure(trained)
    assert read == [0, 20, 40]
    whole = likelihood.bound_of_images(trained, images, batch_size=20, seed=1)
    for name in ("total_bpd", "terms_bpd", "terms_standard_error", "mse"):
        np.testing.assert_array_equal(getattr(resumed, name), getattr(whole, name), err_msg=name)
    bfloat16 = dataclasses.replace(trained.preset, precision="bfloat16")
    measure(golden.known_model(golden.DENOISE_FNS["dn_xt"], strategy, bfloat16))
    assert read == [0, 20, 40] * 2  # it does not read back the results of another precision


def test_rate_and_distortion():
    rng = np.random.default_rng(0)
    terms, mse = rng.uniform(size=6), rng.uniform(size=6)
    prior, middle, decoder = np.full(3, 0.25), np.full(3, terms[1:].sum()), np.full(3, terms[0])
    bound = likelihood.Bound(prior, middle, decoder, np.ones(3), terms, terms, mse)
    rate, distortion = likelihood.rate_distortion(bound)
    np.testing.assert_allclose(rate, [0.25 + terms[t + 1 :].sum() for t in range(6)])
    np.testing.assert_allclose(rate[0] + terms[0], bound.total_bpd.mean(), rtol=1e-12)
    np.testing.assert_allclose((distortion / 127.5) ** 2, mse)


def test_claims_of_appendix_c_hold():
    for preset in PRESETS.values():
        diffusion = GaussianDiffusion.from_preset(preset)
        claims = likelihood.appendix_c(diffusion.schedule, mean_square=0.25)
        assert claims["unit_variance_error"] < 1e-12 and claims["sampler_scale_error"] < 1e-9
        loudest = diffusion.prior_bpd(tf.ones([1, *preset.image_shape]))
        assert loudest[0] < 1e-4 < claims["unscaled_prior_bits_per_dim"]
    # Samples of the unscaled process, x_T = x_0 + noise, against the prior N(0, noise_variance).
    noise_variance = diffusion.schedule.betas.sum()
    x_0 = np.random.default_rng(0).choice([-0.5, 0.5], 100_000)
    x_T = x_0 + np.sqrt(noise_variance) * np.random.default_rng(1).standard_normal(100_000)
    log_ratio = (x_T**2 - (x_T - x_0) ** 2) / (2 * noise_variance) / np.log(2)
    mean, standard_error = likelihood.mean_and_standard_error(log_ratio)
    assert abs(mean - claims["unscaled_prior_bits_per_dim"]) < 4 * standard_error


def test_sampling_step_is_algorithm_2_in_terms_of_beta():
    """Line 4 of Algorithm 2 against p_sample, for a fixed eps."""
    diffusion = golden.linear_diffusion("eps", "fixedlarge", 1000)
    betas = np.linspace(1e-4, 0.02, 1000)
    abar = np.cumprod(1 - betas)
    t = np.array([1, 10, 500, 999], np.int32)
    eps, x_t, noise = (CounterRng(0, 0, 0).normal(name, (4, 8, 8, 1)) for name in ("eps", "x_t", "noise"))
    ours, _ = diffusion.p_sample(lambda *_: eps, x_t, t, noise, clip_denoised=False)
    b, a = (table[t][:, None, None, None] for table in (betas, abar))
    expected = (x_t - b / np.sqrt(1 - a) * eps) / np.sqrt(1 - b) + np.sqrt(b) * noise
    # The predicted x_0 is up to 157 times x_T, so float32 rounding is about 1e-5.
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_forward_process_keeps_unit_variance():
    diffusion = golden.linear_diffusion("eps", "fixedlarge", 1000)
    x_start = CounterRng(0, 0, 0).normal("x_start", (64, 32, 32, 1))
    for t in (0, 200, 500, 999):
        x_t = diffusion.q_sample(x_start, tf.fill([64], t), CounterRng(0, t, 0).normal("noise", x_start.shape))
        assert abs(np.var(x_t) - 1.0) < 5 * np.sqrt(2 / 65536)


def test_a_bound_says_which_images_of_which_weights_overflow_and_when():
    trained = golden.overflowing_model(make_strategy("one_device"), np.inf, below=2)
    trained.name = "run/step_5"
    images = np.full([5, 8, 8, 1], 255, np.uint8)
    images[3] = 0  # x_t is near -1 at small t
    message = "the bounds of images 3 hold NaN or infinity at t = 1: the network of run/step_5 overflows"
    with pytest.raises(NotFiniteError, match=message):
        likelihood.bound_of_images(trained, images, batch_size=2, seed=0)
    with pytest.raises(NotFiniteError, match="the bounds of images 3 hold NaN or infinity: the network of run/step_5"):
        likelihood.bound_of_images(trained, images, batch_size=2, seed=0, num_timesteps_estimate=7)


def test_levels_are_those_that_occur():
    digits = load_digits()
    reads = []

    def read(first, count):
        reads.append((first, count))
        return digits[first : first + count]

    assert likelihood.count_levels(read, 300) == 17
    assert reads[0][0] == 0 and sum(count for _, count in reads) == 300
    assert likelihood.count_levels(lambda _, count: np.zeros([count, 8, 8, 3], np.uint8), 1) == 1
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    assert likelihood.count_levels(lambda *_: every, 1) == 256
    assert "17 of the 256 levels" in likelihood.describe_levels(17)
    assert "log2(17) = 4.09 bits/dim" in likelihood.describe_levels(17)


CLASS_MEANS = (-0.5, 0.25)


def test_the_bound_given_labels_is_the_closed_form(tmp_path):
    """A network that predicts the mean of the image's class: both Gaussians of a term have one variance."""
    preset = dataclasses.replace(golden.TINY, num_classes=2, model_mean_type="xstart")

    def network(x_t, _, labels):
        means = tf.gather(tf.constant(CLASS_MEANS), tf.maximum(labels, 0))
        return tf.where(labels < 0, 0.0, means)[:, None, None, None] * tf.ones_like(x_t)

    trained = golden.known_model(network, make_strategy("one_device"), preset)
    images, labels = load_digits()[:5], np.array([0, 1, -1, 1, 0])
    schedule = trained.diffusion.schedule
    gain = np.sum(schedule.posterior_mean_coef1[1:] ** 2 / schedule.posterior_variance[1:]) / 2 / np.log(2)

    def expected(labels):
        means = np.where(labels < 0, 0.0, np.take(CLASS_MEANS, labels))[:, None, None, None]
        return gain * np.square(images / 127.5 - 1 - means).mean(axis=(1, 2, 3))

    found = likelihood.bound_of_images(trained, images, batch_size=2, seed=0, labels=labels)
    np.testing.assert_allclose(found.middle_bpd, expected(labels), rtol=1e-4)
    unlabelled = likelihood.bound_of_images(trained, images, batch_size=2, seed=0)
    np.testing.assert_allclose(unlabelled.middle_bpd, expected(np.full(5, -1)), rtol=1e-4)

    def measure(read_labels):
        return likelihood.measure_bound(
            trained, lambda first, count: images[first : first + count], num_images=5, batch_size=2, seed=0,
            partial=str(tmp_path), subject={}, read_labels=read_labels,
        ).middle_bpd  # fmt: skip

    np.testing.assert_array_equal(measure(None), unlabelled.middle_bpd)
    # A measurement of its own, although it is kept in the same folder.
    np.testing.assert_array_equal(measure(lambda first, count: labels[first : first + count]), found.middle_bpd)
