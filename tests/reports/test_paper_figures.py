"""The paper's figures, on models for which the answer is known."""

import io

import numpy as np
import tensorflow as tf
from PIL import Image
from support import golden

from diffusion_tf import figures
from diffusion_tf.data.digits import load_digits
from diffusion_tf.diffusion_utils import GaussianDiffusion, x_to_images, x_to_pixels
from diffusion_tf.evaluation.feature_networks import FeatureNetwork
from diffusion_tf.presets import get_preset
from diffusion_tf.reports import paper_figures
from diffusion_tf.runtime.strategies import make_strategy
from diffusion_tf.samplers import ReverseProcess, Sampler
from diffusion_tf.schedules import NoiseSchedule

LEVEL = 0.8


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
    made = paper_figures.shared_latents(two_class_model(), network, chains=40, batch_size=128, seed=0)
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
    figure = paper_figures.interpolation(trained, a, b, **arguments)
    for source in "ab":
        distance = figure.numbers[f"rmse_to_source_{source}"]
        assert distance[2] < 1e-3 < distance[1]
    assert paper_figures.interpolation(trained, a, b, **arguments).picture == figure.picture


def test_interpolation_forgets_the_sources_with_much_noise_only():
    a, b = (np.full((4, 4, 1), round((sign * LEVEL + 1) * 127.5), np.uint8) for sign in (1, -1))
    made = paper_figures.interpolation(two_class_model(), a, b, times=[200, 60], batch_size=32, seed=1)
    assert made.numbers["rmse_to_source_a"][1] < 1 and made.numbers["rmse_to_source_b"][1] < 1
    forgotten = [
        paper_figures.interpolation(two_class_model(), a, b, times=[200], batch_size=32, seed=seed).numbers
        for seed in range(6)
    ]
    assert any(numbers["rmse_to_source_a"][0] > 100 for numbers in forgotten)


def test_predictions_approach_the_sample():
    made = paper_figures.progressive(two_class_model(), chains=3, batch_size=2, seed=0)
    distance = made.numbers["rmse_to_the_sample"]
    assert len(distance) == 10 and made.numbers["t"] == list(range(181, 0, -20))
    assert distance[-1] < 1 < 20 < distance[0]


def test_animation_ends_with_the_samples():
    trained = golden.known_model(golden.DENOISE_FNS["dn_xt"], make_strategy("one_device"))
    made = paper_figures.animation(trained, count=4, frames=4, batch_size=4, seed=3)
    assert made.numbers["t"] == [8, 6, 4, 2, 0]
    picture = Image.open(io.BytesIO(made.picture))
    assert picture.format == "GIF" and picture.n_frames == 5
    picture.seek(4)
    shown = np.asarray(picture.convert("L")).astype(int)
    expected = figures.square_grid(x_to_images(Sampler(trained, batch_size=4, seed=3)(0)).numpy())[..., 0]
    scale = shown.shape[0] // expected.shape[0]
    assert np.abs(shown[::scale, ::scale] - expected).max() <= 2


def test_predictions_improve_over_the_reverse_process():
    network = FeatureNetwork("digits", "", "", _mean_and_class)
    levels = np.where(np.arange(200) % 2, LEVEL, -LEVEL).astype(np.float32)
    real = network.apply(x_to_pixels(tf.constant(levels)[:, None, None, None] * tf.ones([200, 4, 4, 1])))
    real = {name: value.numpy() for name, value in real.items()}
    made = paper_figures.progressive_quality(two_class_model(), network, real, count=60, batch_size=25, seed=0)
    distance, score = made.numbers["frechet_digits"], made.numbers["classifier_score_digits"]
    assert made.numbers["t"] == list(range(181, 0, -20)) and len(distance) == len(score) == 10
    assert distance[-1] < 0.1 * distance[0]
    assert score[0] < 1.5 and score[-1] > 1.9  # of two classes


def _mean_and_class(pixels):
    mean = tf.reduce_mean(pixels, [1, 2, 3])[:, None] / 127.5 - 1.0
    return {"features": tf.concat([mean, mean**2], axis=1), "logits": tf.concat([4 * mean, -4 * mean], axis=1)}
