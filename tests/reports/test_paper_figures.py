"""The paper's figures, on models for which the answer is known."""

import io
import itertools

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from support import golden

from diffusion_tf import figures
from diffusion_tf.data.digits import load_digits
from diffusion_tf.diffusion_utils import GaussianDiffusion, x_to_images, x_to_pixels
from diffusion_tf.evaluation.feature_networks import FeatureNetwork
from diffusion_tf.presets import get_preset
from diffusion_tf.reports import paper_figures
from diffusion_tf.reports.xstart_estimate import XstartEstimate
from diffusion_tf.runtime.strategies import make_strategy
from diffusion_tf.samplers import ReverseProcess, Sampler
from diffusion_tf.schedules import NoiseSchedule, get_beta_schedule

LEVEL = 0.8
SUBJECT = "digits, checkpoint 5, ancestral in 200 steps, seed 0"


PAPER_SCHEDULE = NoiseSchedule(get_beta_schedule("linear", beta_start=1e-4, beta_end=0.02, num_timesteps=1000))


def two_class_model():
    """The optimal model of images that are LEVEL everywhere, or -LEVEL everywhere."""
    schedule = NoiseSchedule(np.linspace(1e-3, 0.1, 200))
    diffusion = GaussianDiffusion(schedule, model_mean_type="xstart", model_var_type="fixedsmall", loss_type="mse")

    def denoise_fn(x_t, t):
        abar = tf.gather(tf.constant(schedule.alphas_cumprod, tf.float32), t)
        log_odds = LEVEL * tf.sqrt(abar) * tf.reduce_sum(x_t, axis=[1, 2, 3]) / (1.0 - abar)
        return LEVEL * tf.tanh(log_odds)[:, None, None, None] * tf.ones_like(x_t)

    preset = get_preset("digits", image_size=4, ch_mult=(1,))
    return golden.KnownModel(preset, make_strategy("one_device"), diffusion, denoise_fn)


def test_stretches_of_a_chain_join_to_the_chain():
    trained = golden.tiny_model(make_strategy("one_device"))
    process = ReverseProcess(trained, batch_size=4, seed=3)
    x_T = process.noise(6)
    x_5 = process(x_T, 8, [5, 5, 5, 8, 8, 8])
    np.testing.assert_array_equal(x_5[3:], x_T[3:])
    x_0 = process(x_5, [5, 5, 5, 8, 8, 8], 0)
    expected = Sampler(trained, batch_size=6, seed=3)(0)
    np.testing.assert_allclose(np.clip(x_0, -1, 1), expected, atol=1e-4)


def test_samples_that_part_late_share_their_class():
    network = FeatureNetwork(
        "digits", "", "", lambda pixels: {"logits": tf.stack([x := tf.reduce_mean(pixels, [1, 2, 3]), 255 - x], axis=1)}
    )
    made = paper_figures.shared_latents(two_class_model(), network, chains=40, batch_size=128, seed=0, subject=SUBJECT)
    shares = made.numbers["same_class_share"]
    assert made.numbers["t"] == [200, 150, 100, 50]
    assert abs(shares[0] - 0.5) < 0.1  # chance for two classes
    assert shares[1:] == sorted(shares[1:]) and shares[2] > shares[0] + 0.1 and shares[-1] > 0.99


def test_interpolation_without_noise_mixes_pixels():
    a, b = load_digits()[:2]
    trained = golden.known_model(golden.DENOISE_FNS["dn_xt"], make_strategy("one_device"))
    arguments = {"times": [8, 4, 0], "batch_size": 16, "seed": 0}
    decoded = paper_figures.interpolate(trained, a, b, **arguments)
    mixed = [(1 - mix) * a + mix * b.astype(np.float64) for mix in paper_figures.LAMBDAS]
    np.testing.assert_allclose((decoded[2] + 1) * 127.5, mixed, atol=1e-3)
    figure = paper_figures.interpolation(trained, a, b, **arguments, subject=SUBJECT)
    for source in "ab":
        distance = figure.numbers[f"rmse_to_source_{source}"]
        assert distance[2] < 1e-3 < distance[1]
    assert paper_figures.interpolation(trained, a, b, **arguments, subject=SUBJECT).picture == figure.picture


def test_mixes_of_one_image_with_itself_are_one_image():
    a = load_digits()[0]
    trained = golden.known_model(golden.DENOISE_FNS["dn_xt"], make_strategy("one_device"))
    decoded = paper_figures.interpolate(trained, a, a, times=[8, 4], batch_size=4, seed=0)
    np.testing.assert_allclose(decoded, np.repeat(decoded[:, :1], 11, axis=1), atol=1e-4)
    assert np.abs(decoded[0] - decoded[1]).max() > 0.1


@pytest.mark.parametrize(("image_size", "expected"), [(8, 250), (32, 375), (256, 500)])
def test_default_time_of_an_interpolation(image_size, expected):
    assert paper_figures.interpolation_time(PAPER_SCHEDULE, (image_size, image_size, 3)) == expected


def test_default_time_follows_the_noise_and_is_a_step_of_the_run():
    quarter = NoiseSchedule(np.array([1e-6, 0.9, 0.9, 0.9]))  # all of the image after one step of four
    assert paper_figures.interpolation_time(quarter, (8, 8, 1)) == 1
    assert paper_figures.interpolation_time(NoiseSchedule(np.full(4, 1e-4)), (8, 8, 1)) == 4
    assert paper_figures.interpolation_time(NoiseSchedule(np.full(4, 0.99)), (8, 8, 1)) == 1


def test_interpolation_forgets_the_sources_with_much_noise_only():
    a, b = (np.full((4, 4, 1), round((sign * LEVEL + 1) * 127.5), np.uint8) for sign in (1, -1))
    made = paper_figures.interpolation(two_class_model(), a, b, times=[200, 60], batch_size=32, seed=1, subject=SUBJECT)
    assert made.numbers["rmse_to_source_a"][1] < 1 and made.numbers["rmse_to_source_b"][1] < 1
    forgotten = [
        paper_figures.interpolation(
            two_class_model(), a, b, times=[200], batch_size=32, seed=seed, subject=SUBJECT
        ).numbers
        for seed in range(6)
    ]
    assert any(numbers["rmse_to_source_a"][0] > 100 for numbers in forgotten)


def test_estimates_approach_the_sample():
    made = paper_figures.progressive(two_class_model(), chains=3, batch_size=64, seed=0, subject=SUBJECT)
    distance = made.numbers["rmse_to_the_sample"]
    assert len(distance) == 10 and made.numbers["t"] == list(range(181, 0, -20)) and made.numbers["chains"] == 64
    assert all(later < 1.02 * earlier + 0.1 for earlier, later in itertools.pairwise(distance))
    assert distance[-1] < 1 < 20 < distance[0]


def test_an_estimate_of_noise_is_the_mean_image():
    random = np.random.RandomState(0)
    x_start = 0.3 + 0.2 * random.randn(500, 4, 4, 1)
    noise = np.clip(5 * random.randn(2, 500, 4, 4, 1), -1, 1)
    predictions = np.stack([noise[0], x_start + 0.2 * noise[1] / noise[1].std(), x_start]).astype(np.float32)
    estimate = XstartEstimate(predictions, x_start.astype(np.float32))
    np.testing.assert_allclose(estimate.weights, [0.0, 0.5, 1.0], atol=0.02)  # signal / (signal + noise)
    error = np.sqrt(np.square(estimate(predictions) - x_start).mean(axis=(1, 2, 3, 4)))
    np.testing.assert_allclose(error, [0.2, 0.2 / 2**0.5, 0.0], atol=0.005)
    one = XstartEstimate(predictions[:, :1], x_start[:1].astype(np.float32))
    np.testing.assert_array_equal(one(predictions[:, :1]), predictions[:, :1])  # no regression


def test_animation_ends_with_the_samples():
    trained = golden.known_model(golden.DENOISE_FNS["dn_xt"], make_strategy("one_device"))
    made = paper_figures.animation(trained, count=4, frames=4, batch_size=4, seed=3, subject=SUBJECT)
    times = made.numbers["t"]
    assert times[0] == 8 and times[-1] == 0
    picture = Image.open(io.BytesIO(made.picture))
    assert picture.format == "GIF" and picture.n_frames == len(times)
    picture.seek(len(times) - 1)
    shown = np.asarray(picture.convert("L")).astype(int)
    assert (shown[:48] < 128).any()  # the caption
    expected = figures.square_grid(x_to_images(Sampler(trained, batch_size=4, seed=3)(0)).numpy())[..., 0]
    scale = 360 // expected.shape[0]
    shown = shown[48 : 48 + scale * expected.shape[0] : scale, 8 : 8 + scale * expected.shape[1] : scale]
    assert np.abs(shown - expected).max() <= 2


def test_frames_of_an_animation_differ_by_equal_changes():
    times = np.array(paper_figures.animation_times(PAPER_SCHEDULE, 50))
    assert times[0] == 1000 and times[-1] == 0 and len(times) == 51 and (np.diff(times) < 0).all()
    signal = np.append(1.0, PAPER_SCHEDULE.sqrt_alphas_cumprod)[times]
    noise = np.sqrt(1.0 - signal**2)
    moved = np.hypot(np.diff(signal), np.diff(noise))  # of (x_0, noise) = (1, 0) and (0, 1), which are orthogonal
    np.testing.assert_allclose(moved, np.pi / 100, atol=0.01)
    assert np.mean(times < 250) > 0.45


def test_scores_of_the_estimates_improve_over_the_reverse_process():
    network = FeatureNetwork("digits", "", "", _mean_and_class)
    levels = np.where(np.arange(200) % 2, LEVEL, -LEVEL).astype(np.float32)
    real = network.apply(x_to_pixels(tf.constant(levels)[:, None, None, None] * tf.ones([200, 4, 4, 1])))
    real = {name: value.numpy() for name, value in real.items()}
    made = paper_figures.progressive_quality(
        two_class_model(), network, real, count=60, batch_size=25, seed=0, subject=SUBJECT
    )
    distance, score = made.numbers["frechet_digits"], made.numbers["classifier_score_digits"]
    assert made.numbers["t"] == list(range(181, 0, -20)) and len(distance) == len(score) == 10
    assert distance[-1] < 0.1 * distance[0]
    assert score[0] < 1.5 and score[-1] > 1.9  # of two classes


def _mean_and_class(pixels):
    mean = tf.reduce_mean(pixels, [1, 2, 3])[:, None] / 127.5 - 1.0
    return {"features": tf.concat([mean, mean**2], axis=1), "logits": tf.concat([4 * mean, -4 * mean], axis=1)}
