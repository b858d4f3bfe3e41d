"""What the doctor finds in runs broken on purpose, and that it finds nothing in sound ones.

The networks of most tests are the optimal ones for Gaussian pictures, which are linear: each is "trained" on another
setup in closed form. The slow tests train real networks.
"""

import dataclasses
import json

import numpy as np
import pytest
import tensorflow as tf
from support import gaussian_data, golden
from support.forked_programs import run_fork

import diffusion_tf as dtf
from diffusion_tf.calibration import Calibration
from diffusion_tf.data.digits import load_digits
from diffusion_tf.diffusion_utils import GaussianDiffusion
from diffusion_tf.evaluation import diagnosis
from diffusion_tf.evaluation.checkup import Checkup, Pictures
from diffusion_tf.evaluation.denoising import Setup, linear_loss, measure_losses, spectrum, spread_timesteps
from diffusion_tf.evaluation.suspicions import compare_setups, cosine_betas
from diffusion_tf.presets import get_preset
from diffusion_tf.runtime.strategies import make_strategy
from diffusion_tf.schedules import NoiseSchedule, get_beta_schedule
from diffusion_tf.training import step as training_step

PRESET = get_preset("digits", channels=3)
SCHEDULE = GaussianDiffusion.from_preset(PRESET).schedule
RECORDED = Setup(SCHEDULE, "eps")
COLOUR, STD = np.array([0.5, 0.0, -0.5]), 0.3
RANDOM = np.random.default_rng(0)
X_START = (COLOUR + STD * RANDOM.standard_normal((64, 4, 4, 3))).astype(np.float32)
NOISE = RANDOM.standard_normal(X_START.shape).astype(np.float32)
VARIANCES = np.full(48, STD**2)


def network_of(setup):
    """The optimal network for pixels N(COLOUR, STD^2) in the scale, order, process and target of `setup`."""
    s = setup.schedule
    colour = COLOUR[::-1] if setup.reversed_channels else COLOUR
    mean, variance = setup.scale * colour + setup.shift, (setup.scale * STD) ** 2

    def network(x_t, t):
        t = s.num_timesteps - 1 - int(t[0]) if setup.reversed_time else int(t[0])
        t = min(max(t, 0), s.num_timesteps - 1)  # what it says about timesteps that it does not know
        abar = s.alphas_cumprod[t]
        signal, noise_variance = np.sqrt(abar), 1.0 - abar
        gain = signal * variance / (abar * variance + noise_variance)
        xstart = mean + gain * (x_t - signal * mean)
        eps = (x_t - signal * xstart) / np.sqrt(noise_variance)
        if setup.target == "xprev":
            return s.posterior_mean_coef1[t] * xstart + s.posterior_mean_coef2[t] * x_t
        return {"eps": eps, "xstart": xstart, "v": signal * eps - np.sqrt(noise_variance) * xstart}[setup.target]

    return network


def measured(loss, power=1.0, scale=1.0):
    """A calibration with these numbers at every timestep."""
    loss = np.asarray(loss, np.float64)
    full = np.full(len(loss), power)
    return Calibration(spread_timesteps(1000, len(loss)), scale * full, full, loss)


def explained(network, recorded=RECORDED):
    """The findings about the loss of a network whose configuration says `recorded`."""
    ts = spread_timesteps(recorded.schedule.num_timesteps, 10)
    loss = measure_losses(network, recorded, X_START, NOISE, ts).mean(axis=1)
    compared = compare_setups(network, PRESET, recorded, X_START, NOISE, VARIANCES)
    return diagnosis.explain_loss(diagnosis.fit(loss, ts, recorded, VARIANCES), measured(loss), list(compared))


def linear_schedule(num_timesteps, beta_end=0.02):
    betas = get_beta_schedule("linear", beta_start=1e-4, beta_end=beta_end, num_timesteps=num_timesteps)
    return NoiseSchedule(betas)


@pytest.mark.parametrize(
    ("changes", "check", "words"),
    [
        ({"scale": 127.5, "shift": 127.5}, "data range", "[0, 255]"),
        ({"scale": 0.5, "shift": 0.5}, "data range", "[0, 1]"),
        ({"target": "xstart"}, "target", "predicts x_0"),
        ({"target": "v"}, "target", "predicts v"),
        ({"reversed_time": True}, "timestep", "T - 1 - t"),
        ({"schedule": linear_schedule(250)}, "noise schedule", "num_timesteps=250, linear beta_start=0.0001"),
        ({"schedule": linear_schedule(4000)}, "noise schedule", "num_timesteps=4000, linear beta_start=0.0001"),
        ({"schedule": NoiseSchedule(cosine_betas(1000))}, "noise schedule", "num_timesteps=1000, cosine"),
    ],
)
def test_the_reason_of_a_poor_loss_is_the_right_one(changes, check, words):
    (finding,) = explained(network_of(dataclasses.replace(RECORDED, **changes)))
    assert finding.check == check and words in finding.problem and "\n" not in str(finding)


@pytest.mark.parametrize("target", ["eps", "xstart", "v", "xprev"])
def test_a_sound_network_of_any_target_is_not_suspected(target):
    recorded = dataclasses.replace(RECORDED, target=target)
    assert explained(network_of(recorded), recorded) == []


def test_an_untrained_network_is_said_to_be_untrained():
    compared = compare_setups(lambda x_t, t: 0.0 * x_t, PRESET, RECORDED, X_START, NOISE, VARIANCES)
    (finding,) = diagnosis.explain_loss(2.0, measured(np.ones(10), power=0.0), list(compared))
    assert finding.check == "loss" and "untrained" in finding.problem


def test_a_young_network_is_not_taken_for_one_of_fewer_steps():
    """Its loss is poor only near T, which a process of fewer steps does not reach."""

    def young(x_t, t):
        error = 0.3 * (t > 400)[:, None, None, None] * np.roll(NOISE, 1, axis=0)
        return network_of(RECORDED)(x_t, t) + error

    (finding,) = explained(young)
    assert finding.check == "loss" and "train it longer" in finding.remedy.lower()


# --- The best linear denoiser --------------------------------------------------------------------------------------


def test_the_linear_loss_is_that_of_a_regression():
    """In closed form it equals the loss of least squares of eps on x_t, for pictures of correlated pixels."""
    mixing = np.random.RandomState(0).normal(0.0, 0.3, (16, 16))
    x = (np.random.RandomState(1).normal(size=(20000, 16)) @ mixing).astype(np.float32).reshape(-1, 4, 4, 1)
    noise = np.random.RandomState(2).normal(size=(20000, 16))
    for abar in (0.99, 0.5, 0.05):
        x_t = np.sqrt(abar) * x.reshape(-1, 16) + np.sqrt(1.0 - abar) * noise
        residuals = noise - x_t @ np.linalg.lstsq(x_t, noise, rcond=None)[0]
        np.testing.assert_allclose(linear_loss(spectrum(x), [abar])[0], (residuals**2).mean(), rtol=0.01)


def test_few_pictures_have_the_spectrum_of_frequencies():
    """The power of each frequency of a stationary field, where the pixels are too many for their covariance."""
    frequency = np.fft.fftfreq(32)
    power = 1.0 / (0.05 + frequency[:, None] ** 2 + frequency[None] ** 2)
    white = np.random.RandomState(0).normal(size=(400, 32, 32))
    x = np.fft.ifft2(np.fft.fft2(white) * np.sqrt(power)).real.astype(np.float32)[..., None]
    abar = np.array([0.9, 0.3, 0.01])
    np.testing.assert_allclose(linear_loss(spectrum(x), abar), linear_loss(power.ravel(), abar), rtol=0.05)


# --- Files, EMA, calibration, samples ------------------------------------------------------------------------------


def checks(findings):
    return [(finding.check, finding.severity) for finding in findings]


def test_pictures_of_few_levels_are_found():
    digits = load_digits()[:50]
    assert diagnosis.check_pictures(digits) == []
    (finding,) = diagnosis.check_pictures((digits // 255).astype(np.uint8))
    assert finding.check == "data range" and "from 0 to 1 of the 256" in finding.problem


def test_a_process_that_ends_with_the_picture_is_found():
    assert diagnosis.check_schedule(SCHEDULE, 1.0) == []
    assert checks(diagnosis.check_schedule(linear_schedule(100), 1.0)) == [("noise schedule", "error")]


def test_a_changed_configuration_is_found():
    now, before = (dataclasses.replace(PRESET, learning_rate=rate).recipe_sha256() for rate in (1e-3, 2e-3))
    assert diagnosis.check_recipe(before, [now, before]) == diagnosis.check_recipe(None, [now]) == []
    assert checks(diagnosis.check_recipe(before, [now])) == [("configuration", "error")]


@pytest.mark.parametrize(
    ("losses", "found"),
    [
        (np.geomspace(1.0, 0.05, 50), []),
        (np.full(50, 0.99), [("training", "error")]),
        (np.append(np.geomspace(1.0, 0.05, 40), np.full(10, 0.4)), [("training", "error")]),
    ],
)
def test_the_log_shows_a_loss_that_never_fell_or_rose(losses, found):
    lines = [{"step": step, "loss": loss, "skipped_steps": 0} for step, loss in enumerate(losses)]
    assert checks(diagnosis.check_training(lines, loss_of_zero=1.0)) == found
    lines[3] = {"step": 3, "loss": None, "skipped_steps": 2}
    assert checks(diagnosis.check_training(lines, loss_of_zero=1.0)) == [("training", "warning"), *found]


def test_an_ema_of_ten_steps_is_found_by_its_arithmetic():
    losses = np.linspace(0.9, 0.1, 10)
    (finding,) = diagnosis.check_ema(losses, losses, decay=0.9999, steps=10)
    assert finding.severity == "error" and "99.9% initial weights" in finding.problem
    assert "46,050 steps" in finding.remedy
    assert diagnosis.check_ema(losses, losses, decay=0.997, steps=3800) == []
    assert diagnosis.check_ema(losses, losses, decay=0.9999, steps=10, started_random=False) == []  # fine-tuning
    (finding,) = diagnosis.check_ema(1.5 * losses, losses, decay=0.9999, steps=2000, started_random=False)
    assert "lag behind" in finding.problem and "ema_decay=0.995" in finding.remedy


@pytest.mark.parametrize(("scale", "word"), [(1.02, "too little"), (0.95, "too much"), (1.005, None)])
def test_calibration_says_in_which_direction(scale, word):
    found = diagnosis.check_calibration(measured(np.geomspace(0.9, 0.001, 10), scale=scale))
    assert len(found) == (word is not None) and all(word in finding.problem for finding in found)


def test_reversed_channels_are_found_by_loss_and_by_colour():
    ts = spread_timesteps(1000, 6)
    orders = (RECORDED, dataclasses.replace(RECORDED, reversed_channels=True))
    for trained_on, found in zip(orders, ([], [("channel order", "error")]), strict=True):
        losses = [measure_losses(network_of(trained_on), setup, X_START, NOISE, ts) for setup in orders]
        assert checks(diagnosis.check_channel_order(*losses)) == found

    pictures, samples = (np.clip(127.5 + 127.5 * x, 0, 255).astype(np.uint8) for x in (X_START[:32], X_START[32:]))
    ours, theirs = diagnosis.picture_statistics(samples), diagnosis.picture_statistics(pictures)
    assert diagnosis.check_samples(ours, theirs) == []
    reverse = diagnosis.picture_statistics(samples[..., ::-1])
    assert checks(diagnosis.check_samples(reverse, theirs)) == [("colour", "error")]


def test_noise_blur_and_saturation_of_samples_are_found():
    digits = load_digits()
    pictures, sound = (diagnosis.picture_statistics(images) for images in (digits[:1000], digits[1000:1100]))
    assert diagnosis.check_samples(sound, pictures) == [] == diagnosis.check_sampler("ddim", sound, pictures)
    noise = 255 * np.random.RandomState(0).randint(0, 2, (100, 8, 8, 1))
    noisy, blurred, saturated = (
        diagnosis.picture_statistics(images)
        for images in (noise.astype(np.uint8), digits[:100] // 2 + 60, np.where(digits[:100] > 90, 255, 0))
    )
    assert any("noise" in finding.problem for finding in diagnosis.check_samples(noisy, pictures))
    assert any("blurred" in finding.problem for finding in diagnosis.check_samples(blurred, pictures))
    assert ("saturation", "warning") in checks(diagnosis.check_samples(saturated, pictures))
    assert checks(diagnosis.check_sampler("ddim", noisy, sound)) == [("sampler", "warning")]


def test_a_true_posterior_does_not_drift():
    """The optimal network for Gaussian pixels does not; one that leaves noise in the last steps does."""
    preset = dataclasses.replace(
        golden.TINY, num_timesteps=200, beta_start=1e-4, beta_end=0.1, model_var_type="fixedlarge"
    )
    diffusion = GaussianDiffusion.from_preset(preset)
    x = np.random.RandomState(0).normal(gaussian_data.MEAN, 0.2, (200, *preset.image_shape))
    images = np.clip(np.round(127.5 * (x + 1.0)), 0, 255).astype(np.uint8)
    pictures = Pictures.of(images, np.full(200, -1, np.int32))
    optimal = gaussian_data.denoise_fn(diffusion, 0.2)
    drifts = []
    for factor in (1.0, 0.3):
        at = lambda t, factor=factor: tf.where(t < 30, factor, 1.0)[:, None, None, None]
        network = lambda x_t, t, at=at: at(t) * optimal(x_t, t)
        trained = golden.known_model(network, make_strategy("one_device"), preset)
        checkup = Checkup(trained, pictures, num_images=200, num_samples=200, steps=200, batch_size=200, seed=0)
        drifts.append(checkup.drift()[1])
    np.testing.assert_allclose(drifts[0], 1.0, atol=0.1)
    assert diagnosis.check_drift(*checkup.drift()) and drifts[1].max() > 1.5


# --- Real runs -----------------------------------------------------------------------------------------------------

SHORT = {"num_steps": 600, "ema_decay": 0.98, "sample_every": 0, "checkpoint_every": 100}


def tinted_digits():
    """RGB digits, more red than blue."""
    digits = load_digits("train")
    tints = np.random.RandomState(0).uniform([0.7, 0.3, 0.0], [1.0, 0.8, 0.5], (len(digits), 3))
    return np.round(digits * tints[:, None, None]).astype(np.uint8)


def train(workdir, *, images=None, recorded=None, **changes):
    """Trains the digits for some steps; then config.json says `recorded` instead."""
    dtf.train(get_preset("digits", **{**SHORT, **changes}), workdir, images=images)
    config = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps({**config, **(recorded or {})}))


def examine(workdir, *args):
    """The exit code of the program, its lines and the checks of its findings."""
    result = run_fork("doctor", f"--workdir={workdir}", *args)
    record = json.loads((workdir / "doctor.json").read_text())
    assert (workdir / "doctor.png").read_bytes().startswith(b"\x89PNG"), result.stderr
    found = {(finding["check"], finding["severity"]) for finding in record["findings"]}
    return result.returncode, result.stdout, found


@pytest.mark.slow
def test_a_sound_run_gives_no_finding(tmp_path):
    train(tmp_path, num_steps=2000, ema_decay=0.995)
    code, output, found = examine(tmp_path)
    assert (code, found) == (0, set()) and "Nothing wrong found." in output
    assert "Nothing wrong found." in (tmp_path / "doctor.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "recorded", "check", "words"),
    [
        ({"num_steps": 10, "steps_per_loop": 10, "checkpoint_every": 10, "ema_decay": 0.9999}, {}, "EMA", "99.9%"),
        ({"model_mean_type": "xstart"}, {"model_mean_type": "eps"}, "target", "predicts x_0"),
        ({"num_timesteps": 250, "beta_start": 4e-4, "beta_end": 0.08},
         {"num_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}, "noise schedule", "num_timesteps=250"),
        ({}, {"num_timesteps": 100}, "noise schedule", "num_timesteps=1000"),
    ],
    ids=["EMA", "target", "T=250", "T=1000"],
)  # fmt: skip
def test_a_run_broken_on_purpose_is_named(tmp_path, changes, recorded, check, words):
    train(tmp_path, recorded=recorded, **changes)
    code, output, found = examine(tmp_path)
    assert code == 1 and (check, "error") in found and words in output
    assert "loss" not in {name for name, _ in found}  # it is explained


@pytest.mark.slow
def test_a_run_trained_on_pixels_is_named(tmp_path, monkeypatch):
    """No setting of this project does that; weights from elsewhere may."""
    monkeypatch.setattr(training_step, "images_to_x", lambda images: tf.cast(images, tf.float32))
    train(tmp_path)
    code, output, found = examine(tmp_path)
    assert code == 1 and ("data range", "error") in found and "[0, 255]" in output


@pytest.mark.slow
def test_a_run_trained_on_reversed_channels_is_named(tmp_path):
    images, workdir = tinted_digits(), tmp_path / "run"
    np.savez(tmp_path / "rgb.npz", images=images)
    train(workdir, images=images[..., ::-1].copy(), channels=3)
    code, _, found = examine(workdir, f"--npz={tmp_path}/rgb.npz")
    assert code == 1 and found >= {("channel order", "error"), ("colour", "error")}
    np.savez(tmp_path / "bgr.npz", images=images[..., ::-1])
    code, _, found = examine(workdir, f"--npz={tmp_path}/bgr.npz")
    assert code == 0 and not any(severity == "error" for _, severity in found)
