"""Sampling loops against the authors' program and on data whose optimal denoiser is known."""

import dataclasses
import itertools

import numpy as np
import pytest
import tensorflow as tf
from support import gaussian_data, golden

from diffusion_tf.conditioning import Condition
from diffusion_tf.diffusion_utils import x_to_images
from diffusion_tf.errors import ConfigError, NotFiniteError
from diffusion_tf.rng import CounterRng
from diffusion_tf.runtime.strategies import make_strategy
from diffusion_tf.samplers import (
    ReverseProcess,
    Sampler,
    ddim_inversion,
    p_sample_loop,
    reverse_steps,
    sample_noise,
)
from diffusion_tf.solvers import SamplerSettings

GOLDEN = golden.load("diffusion_ops")


def golden_noise_fn(t):
    return tf.gather(tf.constant(GOLDEN["loop20/p_noise_table"]), 20 - t)


@pytest.mark.parametrize("jit_compile", [True, False])
@pytest.mark.parametrize("denoise", golden.DENOISE_FNS)
@pytest.mark.parametrize("var_type", ["fixedlarge", "fixedsmall"])
def test_ancestral_loop_matches_the_authors(var_type, denoise, jit_compile):
    diffusion = golden.linear_diffusion("eps", var_type, 20)
    loop = tf.function(
        lambda: p_sample_loop(diffusion, golden.DENOISE_FNS[denoise], golden_noise_fn), jit_compile=jit_compile
    )
    expected = GOLDEN[f"loop20/p_sample_loop/eps/{var_type}/{denoise}"]
    np.testing.assert_allclose(loop(), expected, rtol=1e-5, atol=1e-5)
    if var_type == "fixedsmall":
        np.testing.assert_allclose(loop(), GOLDEN[f"v1/loop20/p_sample_loop/{denoise}"], rtol=1e-5, atol=1e-5)


def test_predictions_on_the_way_match_the_authors():
    diffusion, denoise_fn = golden.linear_diffusion("eps", "fixedlarge", 20), golden.DENOISE_FNS["dn_xt"]
    x_t, steps = golden_noise_fn(tf.constant(20)), lambda time: tf.fill([x_t.shape[0]], time)
    predictions = []
    for start, stop in ((20, 16), (16, 11), (11, 6), (6, 1)):
        x_t = reverse_steps(diffusion, denoise_fn, golden_noise_fn, x_t, steps(start), steps(stop))
        p = diffusion.p_mean_variance(denoise_fn, x_t, steps(stop - 1), clip_denoised=True)
        predictions.insert(0, p.pred_xstart)
    x_start = reverse_steps(diffusion, denoise_fn, golden_noise_fn, x_t, steps(1), steps(0))
    key = "loop20/progressive/eps/fixedlarge/dn_xt"
    np.testing.assert_allclose(x_start, GOLDEN[f"{key}/sample"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(tf.stack(predictions, axis=1), GOLDEN[f"{key}/xstartpreds"], rtol=1e-5, atol=1e-5)


def test_graph_does_not_grow_with_the_number_of_timesteps():
    def nodes(num_timesteps):
        diffusion = golden.linear_diffusion("eps", "fixedlarge", num_timesteps)
        noise_fn = lambda t: CounterRng(0, t, 0).normal("n", (2, 4, 4, 1))
        loop = tf.function(lambda: p_sample_loop(diffusion, golden.DENOISE_FNS["dn_x"], noise_fn))
        graph = loop.get_concrete_function().graph.as_graph_def()
        return len(graph.node) + sum(len(function.node_def) for function in graph.library.function)

    assert nodes(10) == nodes(1000)


@pytest.mark.parametrize(
    ("mean_type", "var_type"),
    list(itertools.product(("eps", "xstart", "xprev"), ("fixedlarge", "fixedsmall", "learned"))),
)
def test_exact_denoiser_samples_the_gaussian_data(mean_type, var_type):
    diffusion = golden.linear_diffusion(mean_type, var_type, 1000)
    denoise_fn = gaussian_data.denoise_fn(diffusion)
    _, (prev_a, prev_b), log_variance = gaussian_data.optimal_denoiser(diffusion)
    shape = (64, 16, 16, 1)

    noise_fn = lambda t: CounterRng(7, t, 0).normal("sample", shape)
    loop = tf.function(lambda: p_sample_loop(diffusion, denoise_fn, noise_fn, clip_denoised=False), jit_compile=True)
    x = loop().numpy().astype(np.float64)

    # The chain is linear, so a recursion gives its exact mean and variance. It adds no noise at t = 0.
    tables = {
        "fixedlarge": diffusion.schedule.fixedlarge_log_variance,
        "fixedsmall": diffusion.schedule.posterior_log_variance_clipped,
        "learned": log_variance,
    }
    mean, variance = 0.0, 1.0
    for t in range(999, -1, -1):
        mean, variance = prev_a[t] * mean + prev_b[t], prev_a[t] ** 2 * variance + np.exp(tables[var_type][t]) * (t > 0)
    standard_error = np.sqrt(variance / x.size)
    assert abs(x.mean() - mean) < 5 * standard_error
    assert abs(x.var() - variance) < 5 * variance * np.sqrt(2 / x.size)
    # They are those of the data. Only the learned variance is exact; the fixed ones bound it (Section 3.2).
    assert abs(mean - gaussian_data.MEAN) < 1e-3
    assert abs(variance - gaussian_data.STD**2) < (1e-3 if var_type == "learned" else 0.02) * gaussian_data.STD**2


@pytest.mark.slow
def test_a_sample_depends_on_seed_and_index_only():
    def tiny(strategy, batch_size, seed=3):
        return Sampler(golden.tiny_model(strategy), batch_size=batch_size, seed=seed)

    one = make_strategy("one_device")
    reference = tiny(one, 16)(0).numpy()
    assert reference.shape == (16, 8, 8, 1) and reference.dtype == np.float32 and np.abs(reference).max() <= 1.0
    assert len(np.unique(reference.reshape(16, -1), axis=0)) == 16
    by_fives = tiny(one, 5)
    in_batches = np.concatenate([by_fives(0), by_fives(5), by_fives(10)])
    replicated = tiny(make_strategy("mirrored"), 16)(0)
    for other in (in_batches, replicated):
        np.testing.assert_allclose(other, reference[: len(other)], atol=1e-4)  # float rounding
    assert (np.abs(tiny(one, 16, seed=4)(0) - reference) > 0.01).mean() > 0.5


@pytest.mark.parametrize(
    "settings",
    [
        SamplerSettings("ancestral", 5),
        SamplerSettings("ddim", 4, eta=0.5),
        SamplerSettings("dpm_solver++", 6),
        SamplerSettings("sde_dpm_solver++", 4, clip_sample="dynamic"),
        SamplerSettings("heun", 5),
    ],
    ids=lambda settings: settings.name,
)
def test_every_sampler_draws_image_i_by_its_index(settings):
    trained = golden.tiny_model(make_strategy("one_device"))
    reference = Sampler(trained, batch_size=5, seed=3, settings=settings)(0).numpy()
    assert np.abs(reference).max() <= 1.0 and len(np.unique(reference.reshape(5, -1), axis=0)) == 5
    by_threes = Sampler(trained, batch_size=3, seed=3, settings=settings)
    in_batches = np.concatenate([by_threes(0), by_threes(3)])
    np.testing.assert_allclose(in_batches[:5], reference, atol=1e-4)  # float rounding


def test_a_sampler_in_several_calls_is_algorithm_2_in_one():
    trained = golden.tiny_model(make_strategy("one_device"))
    whole = tf.function(
        lambda first: p_sample_loop(trained.diffusion, trained.denoise_fn(), sample_noise(3, first, (4, 8, 8, 1))),
        jit_compile=True,
    )
    expected = tf.clip_by_value(whole(tf.constant(8, tf.int64)), -1.0, 1.0)
    np.testing.assert_array_equal(Sampler(trained, batch_size=4, seed=3)(8), expected)


@pytest.mark.parametrize("strength", [0.125, 0.5, 1.0])
def test_a_sampler_starts_from_the_noisy_version_of_an_image(strength):
    trained = golden.known_model(golden.DENOISE_FNS["dn_xt"], make_strategy("one_device"))
    images = np.random.RandomState(0).randint(0, 256, (3, 8, 8, 1), np.uint8)
    sampler = Sampler(trained, batch_size=4, seed=3, settings=SamplerSettings(strength=strength))
    steps = int(8 * strength)
    process = ReverseProcess(trained, batch_size=3, seed=3)
    abar = trained.diffusion.schedule.alphas_cumprod[steps - 1]
    x_t = np.sqrt(abar) * (images / 127.5 - 1) + np.sqrt(1 - abar) * process.noise(3, first_image=5)
    expected = x_to_images(process(x_t.astype(np.float32), steps, 0, first_image=5)).numpy()
    varied = sampler.images(5, 3, start_from=images)
    np.testing.assert_allclose(varied.astype(int), expected, atol=1)  # float rounding
    assert sampler.num_steps == steps
    if strength < 1:
        with pytest.raises(ConfigError, match="needs images to start from"):
            sampler(0)


def test_an_exact_denoiser_of_one_image_leads_back_to_it_from_any_strength():
    image = np.random.RandomState(0).randint(0, 256, (1, 8, 8, 1), np.uint8)
    x_start = tf.constant(image / 127.5 - 1, tf.float32)
    preset = dataclasses.replace(golden.TINY, model_mean_type="xstart", model_var_type="fixedsmall")
    trained = golden.known_model(
        lambda x_t, t: tf.broadcast_to(x_start, x_t.shape), make_strategy("one_device"), preset
    )
    for settings in (SamplerSettings(strength=0.01), SamplerSettings("dpm_solver++", 6, strength=0.5)):
        varied = Sampler(trained, batch_size=2, seed=0, settings=settings).images(0, 2, start_from=image.repeat(2, 0))
        np.testing.assert_array_equal(varied, image.repeat(2, 0))


def test_ddim_inversion_leads_to_latents_and_back():
    """Against the same recursion in float64, for the network eps = 0.1 x."""
    trained = golden.known_model(golden.DENOISE_FNS["dn_x"], make_strategy("one_device"))
    images = np.random.RandomState(0).randint(0, 256, (5, 8, 8, 1), np.uint8)
    latents, samples = ddim_inversion(trained, images, steps=8, spacing="trailing", batch_size=2)
    levels = np.append(1.0, trained.diffusion.schedule.alphas_cumprod)

    def run(x, levels):
        for begin, end in itertools.pairwise(levels):
            x_start = (x - np.sqrt(1 - begin) * 0.1 * x) / np.sqrt(begin)
            x = np.sqrt(end) * x_start + np.sqrt(1 - end) * 0.1 * x
        return x

    expected = run(images / 127.5 - 1.0, levels)
    np.testing.assert_allclose(latents, expected, rtol=1e-4, atol=1e-5)
    expected = run(expected, levels[::-1])
    np.testing.assert_allclose(samples, x_to_images(expected), atol=1)
    assert samples.dtype == np.uint8 and latents.shape == images.shape


@pytest.mark.parametrize(
    ("name", "value"), [("ancestral", np.nan), ("ddim", np.inf), ("dpm_solver++", np.nan), ("sde_dpm_solver++", np.inf)]
)
def test_a_sampler_says_which_samples_of_which_weights_overflow_and_when(name, value):
    trained = golden.overflowing_model(make_strategy("one_device"), value, below=8)
    trained.name = "run/step_5"
    x_T = CounterRng(0, 8, 4).normal("sample", (4, 8, 8, 1)).numpy()
    which = ", ".join(str(4 + i) for i in np.flatnonzero(x_T[:, 0, 0, 0] < 0))
    message = f"samples {which} hold NaN or infinity at t = 7: the network of run/step_5 overflows, use another"
    with pytest.raises(NotFiniteError, match=message):
        Sampler(trained, batch_size=4, seed=0, settings=SamplerSettings(name, 8))(4)


def test_nothing_that_comes_of_the_network_hides_an_overflow():
    trained = golden.overflowing_model(make_strategy("one_device"), np.inf, below=4)
    x_t = np.ones([3, 8, 8, 1], np.float32)
    x_t[1] = -1.0
    process = ReverseProcess(trained, batch_size=2, seed=0)
    with pytest.raises(NotFiniteError, match="samples 6 hold NaN or infinity at t = 0"):
        process(x_t, 1, 0, first_image=5)
    with pytest.raises(NotFiniteError, match="predicted images 1 hold NaN or infinity at t = 3"):
        process.predict_xstart(x_t, 4)
    with pytest.raises(NotFiniteError, match="latents 1 hold NaN or infinity"):
        ddim_inversion(trained, x_to_images(x_t).numpy(), steps=4, spacing="trailing", batch_size=3)


def test_padding_a_partial_batch_adds_no_steps():
    calls = []

    def denoise_fn(x_t, t):
        x = tf.numpy_function(lambda x, t: calls.append(t[0]) or x, [x_t, t], tf.float32)
        return tf.ensure_shape(x, x_t.shape)

    # Under this strategy XLA does not compile the function, so Python can count its calls.
    process = ReverseProcess(golden.known_model(denoise_fn, make_strategy("mirrored")), batch_size=8, seed=0)
    process(process.noise(3), 8, 5)
    assert sorted(calls) == [5] * 8 + [6] * 8 + [7] * 8  # one image for each of eight replicas


CLASSES = dataclasses.replace(golden.TINY, num_classes=3)


def by_label(x_t, t, labels):
    """A network whose eps grows with the label, -1 for none, and over time."""
    return 0.1 * x_t + 0.2 * (tf.cast(labels, tf.float32) + tf.cast(t, tf.float32))[:, None, None, None]


def shifted(shifts):
    """The same for images 0, 1, ... whose labels are `shifts`, as a model without labels."""
    return golden.known_model(lambda x_t, t: by_label(x_t, t, shifts), make_strategy("one_device"))


@pytest.mark.parametrize("name", ["ancestral", "ddim", "dpm_solver++"])
def test_every_sampler_draws_image_i_with_its_label_and_guidance(name):
    """(1 + w) f(label) - w f(-1) is f(label + w (label + 1)) for this network."""
    condition, settings = Condition((2, 0, -1), 1.5), SamplerSettings(name, 4)
    trained = golden.known_model(by_label, make_strategy("one_device"), CLASSES)
    found = Sampler(trained, batch_size=4, seed=3, settings=settings, condition=condition)(4)
    labels = np.array([0, -1, 2, 0], np.float32)  # of images 4, 5, 6, 7
    one = shifted(labels + 1.5 * (labels + 1))
    np.testing.assert_allclose(found, Sampler(one, batch_size=4, seed=3, settings=settings)(4), atol=1e-4)


def test_other_labels_do_not_compile_again():
    traces = []

    def network(x_t, t, labels):
        traces.append(x_t.shape)
        return by_label(x_t, t, labels)

    sampler = Sampler(
        golden.known_model(network, make_strategy("one_device"), CLASSES), batch_size=3, seed=0,
        settings=SamplerSettings("ddim", 4),
    )  # fmt: skip
    first, compiled = sampler(0), len(traces)
    sampler.condition = Condition((1, 2, 0))
    second = sampler(0)
    assert len(traces) == compiled and np.abs(second - first).max(axis=(1, 2, 3)).min() > 0.01


def test_the_reverse_process_and_inversion_take_labels():
    labels = np.array([2, -1, 0], np.int32)
    given = golden.known_model(by_label, make_strategy("one_device"), CLASSES)
    fixed = shifted(labels + (labels + 1))  # as guidance 1 moves them
    process, expected = (ReverseProcess(trained, batch_size=3, seed=0, guidance=1.0) for trained in (given, fixed))
    x_T = process.noise(3)
    np.testing.assert_allclose(process(x_T, 8, 3, labels=labels), expected(x_T, 8, 3), atol=1e-4)
    predicted = process.predict_xstart(x_T, 8, labels=labels)
    np.testing.assert_allclose(predicted, expected.predict_xstart(x_T, 8), atol=1e-4)
    images = np.random.RandomState(0).randint(0, 256, (3, 8, 8, 1), np.uint8)
    arguments = {"steps": 4, "spacing": "trailing", "batch_size": 3, "guidance": 1.0}
    latents, _ = ddim_inversion(given, images, labels=labels, **arguments)
    np.testing.assert_allclose(latents, ddim_inversion(fixed, images, **arguments)[0], atol=1e-4)
