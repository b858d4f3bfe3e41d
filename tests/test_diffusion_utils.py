"""The mathematics of the diffusion against the authors' float32 program and closed forms."""

import itertools

import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import tensorflow as tf
from support import golden

from diffusion_tf import diffusion_utils
from diffusion_tf.diffusion_utils import GaussianDiffusion
from diffusion_tf.errors import InputError, NotFiniteError
from diffusion_tf.presets import get_preset
from diffusion_tf.schedules import NoiseSchedule, get_beta_schedule

GOLDEN = golden.load("diffusion_ops")
X_START, X_T, T = GOLDEN["x_start"], GOLDEN["q_sample"], GOLDEN["t"]
MEAN_TYPES, VAR_TYPES = ("eps", "xstart", "xprev"), ("fixedlarge", "fixedsmall", "learned")


def make(mean_type="eps", var_type="fixedlarge", loss_type="kl", num_timesteps=1000, schedule="linear"):
    betas = get_beta_schedule(schedule, beta_start=1e-4, beta_end=0.02, num_timesteps=num_timesteps)
    return GaussianDiffusion(
        NoiseSchedule(betas), model_mean_type=mean_type, model_var_type=var_type, loss_type=loss_type
    )


def assert_golden(ours, key, atol=0.0):
    """Relative error at most 1e-5, or, where values cancel, 1e-6 of the array's largest value plus `atol`."""
    expected = GOLDEN[key]
    atol = atol + 1e-6 * max(1.0, np.abs(expected).max())
    assert np.all(np.abs(ours - expected) <= 1e-5 * np.abs(expected) + atol), key


def constant_denoise_fn(var_type):
    output = GOLDEN["model_output_2c" if var_type == "learned" else "model_output"]
    return lambda x_t, t: tf.constant(output)


def test_images_scale_to_x_and_back():
    x = diffusion_utils.images_to_x(GOLDEN["x_start_uint8"].astype(np.uint8))
    np.testing.assert_array_equal(x, X_START)
    np.testing.assert_array_equal(diffusion_utils.x_to_images(x), GOLDEN["x_start_uint8"])
    np.testing.assert_array_equal(diffusion_utils.x_to_images(tf.constant([-3.0, 3.0])), [0, 255])


def test_forward_process_matches_the_authors():
    diffusion = make()
    assert_golden(diffusion.q_sample(X_START, T, GOLDEN["noise"]), "q_sample")
    for name, ours in zip(("mean", "variance", "log_variance"), diffusion.q_mean_variance(X_START, T), strict=True):
        assert_golden(ours, f"q_mean_variance/{name}")


def test_posterior_matches_the_authors():
    names = ("mean", "variance", "log_variance_clipped")
    for name, ours in zip(names, make().q_posterior(X_START, X_T, T), strict=True):
        assert_golden(ours, f"q_posterior/{name}")


@pytest.mark.parametrize(("mean_type", "var_type"), list(itertools.product(MEAN_TYPES, VAR_TYPES)))
@pytest.mark.parametrize("clip", [True, False])
def test_reverse_process_and_bound_match_the_authors(mean_type, var_type, clip):
    diffusion, denoise_fn = make(mean_type, var_type), constant_denoise_fn(var_type)
    key = f"{mean_type}/{var_type}/clip{int(clip)}"
    p = diffusion.p_mean_variance(denoise_fn, X_T, T, clip_denoised=clip)
    for name, ours in p._asdict().items():
        assert_golden(ours, f"p_mean_variance/{key}/{name}")
    bpd, _ = diffusion.vb_terms_bpd(denoise_fn, X_START, X_T, T, clip_denoised=clip)
    assert_golden(bpd, f"vb_terms_bpd/{key}", golden.decoder_atol(diffusion, denoise_fn, X_START, X_T, T, clip))


@pytest.mark.parametrize(("mean_type", "var_type"), list(itertools.product(MEAN_TYPES, VAR_TYPES)))
@pytest.mark.parametrize("loss_type", ["mse", "kl"])
def test_training_losses_match_the_authors(mean_type, var_type, loss_type):
    if (var_type, loss_type) == ("learned", "mse"):
        with pytest.raises(InputError, match="loss_type=kl"):
            make(mean_type, var_type, loss_type)
        return
    diffusion, denoise_fn = make(mean_type, var_type, loss_type), constant_denoise_fn(var_type)
    losses = diffusion.training_losses(denoise_fn, X_START, T, GOLDEN["noise"])
    atol = golden.decoder_atol(diffusion, denoise_fn, X_START, X_T, T, False) if loss_type == "kl" else 0.0
    assert_golden(losses, f"training_losses/{mean_type}/{var_type}/{loss_type}", atol)


@pytest.mark.parametrize(("mean_type", "var_type"), list(itertools.product(MEAN_TYPES, ("fixedlarge", "fixedsmall"))))
def test_decoder_term_of_a_good_prediction_matches_the_authors(mean_type, var_type):
    t, x_t = np.zeros_like(T), GOLDEN["q_sample_t0"]
    diffusion = make(mean_type, var_type)
    assert_golden(diffusion.q_sample(X_START, t, GOLDEN["noise"]), "q_sample_t0")
    near = GOLDEN["noise"] + 0.3 * GOLDEN["model_output"]
    output = near if mean_type == "eps" else X_START + np.float32(0.02) * GOLDEN["model_output"]
    denoise_fn = lambda *_: tf.constant(output)
    bpd, _ = diffusion.vb_terms_bpd(denoise_fn, X_START, x_t, t, clip_denoised=True)
    atol = golden.decoder_atol(diffusion, denoise_fn, X_START, x_t, t, True)
    assert_golden(bpd, f"vb_terms_bpd_t0/{mean_type}/{var_type}", atol)


@pytest.mark.parametrize("var_type", ["fixedlarge", "fixedsmall"])
def test_sampling_step_matches_the_authors(var_type):
    diffusion = make("eps", var_type)
    for clip in (True, False):
        sample, pred_xstart = diffusion.p_sample(
            constant_denoise_fn(var_type), X_T, T, GOLDEN["noise2"], clip_denoised=clip
        )
        assert_golden(sample, f"p_sample/eps/{var_type}/clip{int(clip)}/sample")
        assert_golden(pred_xstart, f"p_sample/eps/{var_type}/clip{int(clip)}/pred_xstart")


@pytest.mark.parametrize("var_type", ["fixedlarge", "fixedsmall"])
def test_operations_on_a_good_prediction_match_the_authors(var_type):
    diffusion, denoise_fn = make("eps", var_type), lambda *_: tf.constant(GOLDEN["near_eps"])
    sample, pred_xstart = diffusion.p_sample(denoise_fn, X_T, T, GOLDEN["noise2"])
    assert_golden(sample, f"p_sample_near/eps/{var_type}/sample")
    assert_golden(pred_xstart, f"p_sample_near/eps/{var_type}/pred_xstart")
    bpd, _ = diffusion.vb_terms_bpd(denoise_fn, X_START, X_T, T, clip_denoised=True)
    assert_golden(bpd, f"vb_terms_bpd_near/eps/{var_type}")
    if var_type == "fixedlarge":
        for loss_type in ("mse", "kl"):
            losses = make("eps", var_type, loss_type).training_losses(denoise_fn, X_START, T, GOLDEN["noise"])
            assert_golden(losses, f"training_losses_near/eps/fixedlarge/{loss_type}")


def test_prior_term_matches_the_authors():
    assert_golden(make().prior_bpd(tf.constant(X_START)), "prior_bpd")


def test_images_that_are_not_finite_are_refused_by_their_index():
    for value in (np.nan, np.inf, -np.inf):
        x = np.zeros([5, 2, 2, 1], np.float32)
        x[[1, 3], 0] = value
        with pytest.raises(NotFiniteError, match="images 1, 3 hold NaN or infinity"):
            diffusion_utils.x_to_images(x)
        with pytest.raises(NotFiniteError, match=r"bounds 7, 8, 9, ... \(5 in all\) hold NaN or infinity: why"):
            diffusion_utils.check_finite(np.full([5, 3], value), "bounds", first=7, why=": why")


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("output", [np.nan, np.inf])
def test_a_clip_does_not_hide_that_a_prediction_is_not_finite(jit_compile, output):
    outputs = np.where(np.arange(8) == 3, output, 2.0).astype(np.float32).reshape(8, 1, 1, 1) * np.ones_like(X_T)

    @tf.function(jit_compile=jit_compile)
    def step(x_t):
        p = shown.p_mean_variance(lambda *_: tf.constant(outputs), x_t, tf.constant(T), clip_denoised=True)
        return p.mean, p.pred_xstart

    preset = get_preset("digits")
    shown, hidden = (GaussianDiffusion.from_preset(preset, shows_overflow=shows) for shows in (True, False))
    expected = hidden.p_mean_variance(lambda *_: tf.constant(outputs), X_T, T, clip_denoised=True)
    for found, clipped in zip(step(tf.constant(X_T)), (expected.mean, expected.pred_xstart), strict=True):
        found, rows = found.numpy(), np.arange(8) != 3
        assert np.isnan(found[3]).all()
        np.testing.assert_allclose(found[rows], clipped.numpy()[rows], rtol=1e-6, atol=1e-6)


def test_dynamic_thresholding_scales_each_image_by_its_percentile():
    """Section 2.3 of Imagen, in NumPy; 201 values, so that the percentile is one of them."""
    x = np.random.RandomState(0).standard_normal((3, 67, 1, 3)).astype(np.float32) * np.reshape(
        [3.0, 0.2, 1.0], [3, 1, 1, 1]
    )
    s = np.maximum(np.quantile(np.abs(x.reshape(3, -1)), 0.995, axis=1), 1.0).reshape(3, 1, 1, 1)
    diffusion = GaussianDiffusion.from_preset(get_preset("digits"), shows_overflow=True)
    x = x.astype(np.float32)
    np.testing.assert_allclose(diffusion.clip_xstart(x, dynamic=True), np.clip(x, -s, s) / s, rtol=1e-6)
    x[1, 0] = np.inf
    assert np.isnan(diffusion.clip_xstart(x, dynamic=True)[1, 0]).all()


def test_decoder_likelihood_and_its_cdf_match_the_authors():
    x, means, log_scales = (GOLDEN[f"dgll/{name}"] for name in ("x", "means", "log_scales"))
    log_probs = diffusion_utils.discretized_gaussian_log_likelihood(
        x[:, None, None], means=means[None, :, None], log_scales=log_scales[None, None, :]
    )
    # A probability is a difference of two CDFs with errors of 1.2e-7, so the logarithm of a small one is inexact.
    probability, expected = np.exp(log_probs), np.exp(GOLDEN["dgll/log_probs"])
    np.testing.assert_allclose(probability, expected, atol=2.4e-7)
    likely = expected > 0.02
    assert likely.sum() > 200
    np.testing.assert_allclose(log_probs.numpy()[likely], GOLDEN["dgll/log_probs"][likely], rtol=1e-5, atol=1.2e-5)
    np.testing.assert_allclose(
        tf.sigmoid(diffusion_utils.approx_standard_normal_logit(GOLDEN["cdf/x"])),
        GOLDEN["cdf/approx"],
        rtol=1e-5,
        atol=1.2e-7,
    )


def decoder_log_likelihood(x, mean, log_scale):
    """The authors' formula of the discrete decoder in float64, with 0.5 (1 + tanh(z)) as expit(2 z)."""
    cdf = lambda z: scipy.special.expit(2 * np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))
    centered, std = x.astype(np.float64) - mean, np.exp(log_scale.astype(np.float64))
    centered = np.where(x < -0.999, centered, -np.abs(centered))  # the tail in which float64 keeps its digits
    plus, minus = (cdf((centered + sign / 255) / std) for sign in (1, -1))
    above = cdf(-(x.astype(np.float64) - mean - 1 / 255) / std)
    probability = np.where(x < -0.999, plus, np.where(x > 0.999, above, plus - minus))
    return np.log(np.maximum(probability, 1e-12))


@pytest.mark.parametrize("jit_compile", [False, True])
def test_decoder_likelihood_is_exact_far_from_the_mean(jit_compile):
    levels = (np.array([0, 1, 100, 128, 254, 255]) / 127.5 - 1.0).astype(np.float32)
    log_scales = np.array([-9.0, -5.0, -3.0, -1.0, 1.0], np.float32)
    deviations = np.array([-9.0, -6.0, -2.0, 0.0, 0.3, 4.0, 6.0], np.float32)
    x, log_scale, deviation = (array.reshape(-1) for array in np.meshgrid(levels, log_scales, deviations))
    mean = x + np.exp(log_scale) * deviation

    @tf.function(jit_compile=jit_compile)
    def ours(x, mean, log_scale):
        return diffusion_utils.discretized_gaussian_log_likelihood(x, means=mean, log_scales=log_scale)

    expected = decoder_log_likelihood(x, mean, log_scale)
    # x - mean carries an error of 2^-25, of which the smallest scale makes 2.4e-4 standard deviations.
    atol = 2e-5 + 3e-8 * np.exp(-log_scale) * 20
    np.testing.assert_array_less(np.abs(ours(x, mean, log_scale) - expected), atol)


def test_decoder_likelihood_has_gradients_at_any_mean_and_scale():
    x = tf.constant(np.arange(256) / 127.5 - 1.0, tf.float32)[:, None, None]
    means, log_scales = tf.linspace(-1e4, 1e4, 401), tf.constant([-200.0, -90.0, -40.0, -5.0, 0.0, 40.0, 90.0])
    with tf.GradientTape() as tape:
        tape.watch([means, log_scales])
        log_likelihood = diffusion_utils.discretized_gaussian_log_likelihood(
            x, means=means[:, None], log_scales=log_scales
        )
    assert np.isfinite(log_likelihood).all() and np.min(log_likelihood) >= np.log(1e-12) - 1e-5
    for gradient in tape.gradient(log_likelihood, [means, log_scales]):
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("jit_compile", [False, True])
def test_decoder_likelihood_of_nan_is_nan(jit_compile):
    means, log_scales = np.float32([[np.nan, 0.0]] * 9), np.float32([[0.0, np.nan]] * 9)
    ours = tf.function(diffusion_utils.discretized_gaussian_log_likelihood, jit_compile=jit_compile)
    assert np.isnan(ours(tf.zeros_like(means), means=tf.constant(means), log_scales=tf.constant(log_scales))).all()


def test_decoder_likelihood_is_eq_13_up_to_its_approximate_cdf():
    levels = np.arange(256) / 127.5 - 1.0
    for mean, scale in ((0.1, 0.02), (-0.99, 0.01), (1.0, 0.1)):
        edges = np.concatenate([[-np.inf], levels[:-1] + 1 / 255, [np.inf]])
        exact = np.diff(scipy.stats.norm.cdf(edges, mean, scale))
        ours = np.exp(
            diffusion_utils.discretized_gaussian_log_likelihood(
                tf.constant(levels, tf.float32), means=mean, log_scales=tf.constant(np.log(scale), tf.float32)
            )
        )
        np.testing.assert_allclose(ours, exact, atol=4e-4)
        np.testing.assert_allclose(ours.sum(), 1.0, atol=1e-5)


def test_normal_kl_is_its_integral():
    mean1, logvar1, mean2, logvar2 = 0.3, -1.2, -0.5, 0.4
    p = scipy.stats.norm(mean1, np.exp(0.5 * logvar1))
    q = scipy.stats.norm(mean2, np.exp(0.5 * logvar2))
    integral, _ = scipy.integrate.quad(lambda x: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), -10, 10)
    np.testing.assert_allclose(diffusion_utils.normal_kl(mean1, logvar1, mean2, logvar2), integral, rtol=1e-6)


def test_eps_with_fixedsmall_matches_the_authors_class_for_256x256():
    diffusion = make("eps", "fixedsmall", "mse")
    denoise_fn = constant_denoise_fn("fixedsmall")
    assert_golden(diffusion.q_sample(X_START, T, GOLDEN["noise"]), "v1/q_sample")
    assert_golden(diffusion.training_losses(denoise_fn, X_START, T, GOLDEN["noise"]), "v1/p_losses")
    mean, variance, log_variance = diffusion.q_posterior(X_START, X_T, T)
    assert_golden(mean, "v1/q_posterior/mean")
    assert_golden(variance, "v1/q_posterior/variance")
    assert_golden(diffusion.predict_xstart_from_eps(X_T, T, GOLDEN["model_output"]), "v1/predict_start_from_noise")
    later = T > 0  # at t = 0 that class has log(1e-20), and ours never reads the entry
    np.testing.assert_allclose(log_variance[later], GOLDEN["v1/q_posterior/log_variance_clipped"][later], rtol=1e-5)
    for clip in (True, False):
        p = diffusion.p_mean_variance(denoise_fn, X_T, T, clip_denoised=clip)
        assert_golden(p.mean, f"v1/p_mean_variance/clip{int(clip)}/mean")
        np.testing.assert_allclose(
            p.log_variance[later][:, :1, :1, :1],
            GOLDEN[f"v1/p_mean_variance/clip{int(clip)}/log_variance"][later],
            rtol=1e-5,
        )
        sample, _ = diffusion.p_sample(denoise_fn, X_T, T, GOLDEN["noise2"], clip_denoised=clip)
        assert_golden(sample, f"v1/p_sample/clip{int(clip)}")


def test_interpolation_matches_the_authors():
    diffusion = make("eps", "fixedsmall", num_timesteps=20)
    t = np.full([4], 12, np.int32)
    x1 = diffusion.q_sample(X_START[:4], t, GOLDEN["noise"][:4])
    x2 = diffusion.q_sample(X_START[4:], t, GOLDEN["noise2"][:4])
    x_t = 0.7 * x1 + 0.3 * x2
    for step in range(12, -1, -1):
        noise = GOLDEN["loop20/p_noise_table"][20 - step]
        x_t, _ = diffusion.p_sample(golden.DENOISE_FNS["dn_xt"], x_t, np.full([4], step, np.int32), noise)
    assert_golden(x_t, "v1/loop20/interpolate")


@pytest.mark.parametrize("mean_type", MEAN_TYPES)
def test_predictions_invert_the_forward_process(mean_type):
    diffusion = make(mean_type)
    eps = (X_T - diffusion.q_mean_variance(X_START, T)[0]) / np.sqrt(1 - diffusion.schedule.alphas_cumprod)[
        T, None, None, None
    ]
    output = {"eps": eps, "xstart": X_START, "xprev": diffusion.q_posterior(X_START, X_T, T)[0]}[mean_type]
    p = diffusion.p_mean_variance(lambda *_: tf.cast(output, tf.float32), X_T, T, clip_denoised=False)
    early = T < 500  # later float32 cannot recover x_0 from the noise
    np.testing.assert_allclose(p.pred_xstart[early], X_START[early], atol=2e-3)
    np.testing.assert_allclose(p.mean[early], diffusion.q_posterior(X_START, X_T, T)[0][early], atol=2e-3)


def test_eps_is_refused_if_it_cannot_determine_x_0():
    with pytest.raises(InputError, match="jsd"):
        make("eps", schedule="jsd")
    diffusion = make("xstart", schedule="jsd")
    last = np.full([8], 999, np.int32)
    sample, _ = diffusion.p_sample(lambda x, t: 0.5 * x, X_T, last, GOLDEN["noise"])
    assert np.isfinite(sample).all()


@pytest.mark.parametrize("wrong", ["model_mean_type", "model_var_type", "loss_type"])
def test_unknown_types_list_the_choices(wrong):
    right = {"model_mean_type": "eps", "model_var_type": "learned", "loss_type": "kl"}
    with pytest.raises(InputError, match=f"{wrong}=other: choose one of"):
        GaussianDiffusion(make().schedule, **{**right, wrong: "other"})
