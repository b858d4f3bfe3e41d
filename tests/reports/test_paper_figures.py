"""The paper's figures show what the paper says, on models whose answer is known."""

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from support import golden

from diffusion_tf import figures
from diffusion_tf.data.digits import load_digits
from diffusion_tf.diffusion_utils import x_to_images, x_to_pixels
from diffusion_tf.evaluation.feature_networks import FeatureNetwork
from diffusion_tf.presets import get_preset
from diffusion_tf.reports import paper_figures
from diffusion_tf.runtime.strategies import make_strategy
from diffusion_tf.samplers import ReverseProcess, Sampler

LEVEL = 0.8


def two_class_model(num_timesteps=200):
    """The optimal model of images that are LEVEL everywhere, or -LEVEL everywhere."""
    diffusion = golden.linear_diffusion("xstart", "fixedsmall", num_timesteps)
    diffusion.schedule.__init__(np.linspace(1e-3, 0.1, num_timesteps))

    def denoise_fn(x_t, t):
        abar = tf.gather(tf.constant(diffusion.schedule.alphas_cumprod, tf.float32), t)
        log_odds = LEVEL * tf.sqrt(abar) * tf.reduce_sum(x_t, axis=[1, 2, 3]) / (1.0 - abar)
        return LEVEL * tf.tanh(log_odds)[:, None, None, None] * tf.ones_like(x_t)

    preset = get_preset("digits", image_size=4, ch_mult=(1,))
    return golden.KnownModel(preset, make_strategy("one_device"), diffusion, denoise_fn)


def capture(monkeypatch):
    """The rows of the next labelled grid."""
    rows = []
    drawn = figures.labelled_grid
    monkeypatch.setattr(figures, "labelled_grid", lambda r, **kwargs: rows.extend(r) or drawn(r, **kwargs))
    return rows


def test_stretches_of_the_chain_are_the_chain():
    trained = golden.tiny_model(make_strategy("one_device"))
    process = ReverseProcess(trained, batch_size=4, seed=3)
    x_T = process.noise(6)
    x_5 = process(x_T, 8, [5, 5, 5, 8, 8, 8])
    np.testing.assert_array_equal(x_5[3:], x_T[3:])
    x_0 = process(x_5, [5, 5, 5, 8, 8, 8], 0)
    expected = Sampler(trained, batch_size=6, seed=3)(0)
    np.testing.assert_allclose(np.clip(x_0, -1, 1), expected, atol=1e-4)


def test_late_splits_share_their_class():
    network = FeatureNetwork(
        "digits", "", "", lambda pixels: {"logits": tf.stack([x := tf.reduce_mean(pixels, [1, 2, 3]), 255 - x], axis=1)}
    )
    made = paper_figures.shared_latents(two_class_model(), network, chains=40, batch_size=128, seed=0)
    shares = made.numbers["same_class_share"]
    assert made.numbers["t"] == [200, 150, 100, 50]
    assert abs(shares[0] - 0.5) < 0.1  # chance, of two classes
    assert shares[1:] == sorted(shares[1:]) and shares[2] > shares[0] + 0.1 and shares[-1] > 0.99


def test_interpolation_at_no_noise_is_mixing_of_pixels(monkeypatch):
    rows = capture(monkeypatch)
    a, b = load_digits()[:2]
    trained = golden.tiny_model(make_strategy("one_device"))
    made = paper_figures.interpolation(trained, a, b, times=[8, 4, 0], batch_size=16, seed=0)
    mixed = [np.round((1 - mix) * a + mix * b.astype(np.float64)) for mix in paper_figures.LAMBDAS]
    assert rows[2].shape == (13, 8, 8, 1)
    np.testing.assert_array_equal(rows[2][[0, 1, -2, -1]], np.stack([a, a, b, b]))
    assert np.abs(rows[2][1:-1] - np.stack(mixed)).max() <= 1  # rounding to levels
    for source in "ab":
        distance = made.numbers[f"rmse_to_source_{source}"]
        assert distance[2] < 1e-3 < distance[1]
    again = paper_figures.interpolation(trained, a, b, times=[8, 4, 0], batch_size=16, seed=0)
    assert again.picture == made.picture


def test_much_noise_forgets_the_sources_and_little_does_not():
    a, b = (np.full((4, 4, 1), round((sign * LEVEL + 1) * 127.5), np.uint8) for sign in (1, -1))
    made = paper_figures.interpolation(two_class_model(), a, b, times=[200, 60], batch_size=32, seed=1)
    assert made.numbers["rmse_to_source_a"][1] < 1 and made.numbers["rmse_to_source_b"][1] < 1
    forgotten = [
        paper_figures.interpolation(two_class_model(), a, b, times=[200], batch_size=32, seed=seed).numbers
        for seed in range(6)
    ]
    assert any(numbers["rmse_to_source_a"][0] > 100 for numbers in forgotten)


def test_predictions_come_closer_to_the_sample(monkeypatch):
    rows = capture(monkeypatch)
    made = paper_figures.progressive(two_class_model(), chains=3, batch_size=2, seed=0)
    distance = made.numbers["rmse_to_the_sample"]
    assert len(distance) == 10 and made.numbers["t"] == list(range(181, 0, -20))
    assert distance[-1] < 1 < 20 < distance[0]
    assert len(rows) == 3 and rows[0].shape == (11, 4, 4, 1)


def test_the_animation_ends_with_the_samples():
    trained = golden.tiny_model(make_strategy("one_device"))
    made = paper_figures.animation(trained, count=4, frames=4, batch_size=4, seed=3)
    assert made.numbers["t"] == [8, 6, 4, 2, 0]
    picture = Image.open(io.BytesIO(made.picture))
    assert picture.format == "GIF" and picture.n_frames == 5
    picture.seek(4)
    shown = np.asarray(picture.convert("L")).astype(int)
    expected = figures.square_grid(x_to_images(Sampler(trained, batch_size=4, seed=3)(0)).numpy())[..., 0]
    scale = shown.shape[0] // expected.shape[0]
    assert np.abs(shown[::scale, ::scale] - expected).max() <= 2


@pytest.mark.parametrize("channels", [1, 3])
def test_labelled_tiles_are_aligned_and_whole(channels):
    images = np.random.RandomState(0).randint(0, 256, (2, 3, 8, 8, channels)).astype(np.uint8)
    png = figures.labelled_grid(
        list(images), row_labels=["a", "long label"], column_labels=list("xyz"), caption="c" * 80
    )
    picture = np.asarray(Image.open(io.BytesIO(png)))
    windows = np.lib.stride_tricks.sliding_window_view(picture[..., 0], (48, 48))
    places = []
    for image in images.reshape(-1, 8, 8, channels):
        enlarged = image[..., 0].repeat(6, 0).repeat(6, 1)
        (place,) = np.argwhere((windows == enlarged).all(axis=(2, 3)))
        places.append(place)
    places = np.array(places).reshape(2, 3, 2)
    assert (np.diff(places[..., 1], axis=1) == 50).all() and (np.diff(places[..., 0], axis=0) == 50).all()
    assert (picture[:, -3:] == 255).all() and (picture[-3:] == 255).all()  # nothing is cut off at the edges


def test_the_predicted_image_becomes_better_on_the_way():
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
