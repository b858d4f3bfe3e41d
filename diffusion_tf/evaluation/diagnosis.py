"""What is wrong with a trained run, and what to do: each check is a pure function of measurements that gives findings.

The thresholds separate sound runs from runs that were broken on purpose (`tests/evaluation/test_diagnosis.py`).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffusion_tf.calibration import Calibration
from diffusion_tf.evaluation.denoising import Setup, linear_loss
from diffusion_tf.schedules import NoiseSchedule

ERROR, WARNING = "error", "warning"

_LEVELS = 64  # pictures that use less of the 256 levels were scaled wrongly, or hold next to nothing
_PRIOR_SIGNAL, _SLIGHT_PRIOR_SIGNAL = 0.1, 0.03  # standard deviation of the picture that x_T still holds
_FLOOR = 0.02  # added to losses before they are compared: below it their ratio means nothing
_POOR, _VERY_POOR = math.log(1.15), math.log(1.5)  # how far a loss is above the linear denoiser's, as a mean logarithm
_CLEARLY_BETTER = 0.12  # how far another setup must be below the recorded one
_GAIN = 0.2  # how far below that of zeros a loss must be to say anything, as a mean logarithm
_LEAST_GAIN = 1e-3  # of reversed channels
_UNTRAINED_POWER = 0.1  # E[eps_hat^2] of a network that predicts next to nothing; that of the noise is 1
_INITIAL_SHARE = 0.1  # of the initial weights in the EMA
_EMA_WORSE = math.log(1.1)
_CALIBRATION, _PREDICTABLE = 0.012, 0.1  # mean deviation from 1, where the loss is below 0.1
_DRIFT = 1.5
_DEVIATION, _Z = {"high frequencies": 0.25, "contrast": 0.15}, 3.0  # relative difference, and in standard errors
_SATURATED = 0.05  # additional share of pixels


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something that is wrong with a run.

    Attributes:
      check: a short name.
      severity: ERROR if samples of the run are wrong, WARNING if they are not as good as they could be.
      problem: what is wrong, with its numbers, in one line.
      remedy: what to do, in one line.
    """

    check: str
    severity: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.check}: {self.problem}. {self.remedy}."


# --- What the run's files tell ---------------------------------------------------------------------------------


def check_pictures(images: np.ndarray) -> list[Finding]:
    """Checks the range of training images uint8 [N, H, W, C]."""
    low, high = int(images.min()), int(images.max())
    if high - low >= _LEVELS:
        return []
    return [
        Finding(
            "data range",
            ERROR,
            f"the training pictures have levels from {low} to {high} of the 256",
            "Scale them to [0, 255] before they are stored as uint8, and train again",
        )
    ]


def check_schedule(schedule: NoiseSchedule, mean_square: float) -> list[Finding]:
    """Checks that x_T is noise.

    Args:
      schedule: the forward process.
      mean_square: E[x_0^2] over images and dimensions.
    """
    signal = math.sqrt(schedule.alphas_cumprod[-1] * mean_square)
    if signal < _SLIGHT_PRIOR_SIGNAL:
        return []
    return [
        Finding(
            "noise schedule",
            ERROR if signal > _PRIOR_SIGNAL else WARNING,
            f"x_T still holds the picture, scaled by {signal:.2f}, but sampling begins from noise alone",
            f"Train with a larger `num_timesteps` than {schedule.num_timesteps}, or a larger `beta_end`",
        )
    ]


def check_recipe(recorded: str | None, recipes: Sequence[str]) -> list[Finding]:
    """Checks that the configuration is the one that wrote the checkpoint.

    Args:
      recorded: the digest of the recipe in the checkpoint; None: it records none.
      recipes: the digests of the run's recipe and of its earlier ones.
    """
    if recorded is None or recorded in recipes:
        return []
    return [
        Finding(
            "configuration",
            ERROR,
            "config.json is not the recipe that wrote the checkpoint",
            "Restore the config.json of the training",
        )
    ]


def check_training(metrics: Sequence[Mapping[str, Any]], *, loss_of_zero: float | None) -> list[Finding]:
    """Checks the lines of metrics.jsonl, oldest first.

    Args:
      metrics: `step`, `loss` and `skipped_steps` by name; losses that are not finite are None or NaN.
      loss_of_zero: the loss of a network that predicts zeros; None: unknown.
    """
    findings = []
    losses = np.array([line.get("loss", math.nan) for line in metrics], np.float64)
    skipped = sum(int(line.get("skipped_steps", 0)) for line in metrics)
    if skipped:
        findings.append(
            Finding(
                "training",
                WARNING,
                f"{skipped} training steps were skipped because the loss or a gradient was not finite",
                "Lower `learning_rate` or `grad_clip`, or train with `precision=float32`",
            )
        )
    losses = losses[np.isfinite(losses)]
    if len(losses) < 10:
        return findings
    tenth = max(1, len(losses) // 10)
    first, last = float(np.median(losses[:tenth])), float(np.median(losses[-tenth:]))
    best = min(float(np.median(losses[i : i + tenth])) for i in range(0, len(losses) - tenth + 1, tenth))
    if last > 0.9 * max(first, loss_of_zero or 0.0):
        problem = f"the training loss never fell: it was {first:.3g} at first and is {last:.3g}"
        remedy = "Check `learning_rate` and `warmup_steps`, and that the pictures are not noise"
        findings.append(Finding("training", ERROR, problem, remedy))
    elif last > 1.5 * best:
        problem = f"the training loss fell to {best:.3g} and rose to {last:.3g}"
        remedy = "Go back to an earlier `checkpoint`, and go on with a lower `learning_rate`"
        findings.append(Finding("training", ERROR, problem, remedy))
    return findings


# --- What the network's loss tells -----------------------------------------------------------------------------


def distance(loss: np.ndarray, reference: np.ndarray) -> float:
    """How far losses [K] are above reference losses [K], as the mean logarithm of their ratio."""
    return float(np.log((loss + _FLOOR) / (reference + _FLOOR)).mean())


def fit(loss: np.ndarray, timesteps: np.ndarray, setup: Setup, variances: np.ndarray) -> float:
    """`distance` of a network's loss from that of the best linear denoiser of the same pictures.

    Args:
      loss: by timestep, of the network taken to be trained on `setup`, [K].
      timesteps: int [K].
      setup: scale, schedule and target.
      variances: `denoising.spectrum` of pictures in [-1, 1].
    """
    if setup.target in ("xstart", "xprev"):
        # Such a network does not know eps at low t: its small error in x_0 is a large one in eps, which harms nobody.
        loss = np.minimum(loss, 1.0)
    return distance(loss, linear_loss(setup.scale**2 * variances, setup.schedule.alphas_cumprod[timesteps]))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The recorded setup beside another one that the network may have been trained on, at the same noise levels.

    Attributes:
      finding: what is wrong if the network was trained on the other one.
      recorded: `fit` of the recorded setup.
      other: `fit` of the other one.
      loss: the network's loss there, [K].
    """

    finding: Finding
    recorded: float
    other: float
    loss: np.ndarray

    @property
    def explains(self) -> bool:
        """Whether the network knows the other setup, and knows it better than the recorded one."""
        # A network that predicts nothing is as good as the linear denoiser wherever that predicts next to nothing.
        knows = -distance(self.loss, np.ones_like(self.loss)) > _GAIN
        return knows and self.other < min(_POOR, self.recorded - _CLEARLY_BETTER)


def explain_loss(recorded: float, measured: Calibration, comparisons: Sequence[Comparison]) -> list[Finding]:
    """Says why a network's loss is poor: what else it must have been trained on, if it is far better there.

    Args:
      recorded: `fit` of the recorded setup.
      measured: the predictions of the network.
      comparisons: other setups.
    """
    if not is_poor(recorded):
        return []
    if is_untrained(measured):
        problem = f"the network predicts next to no noise (E[eps_hat^2] = {measured.power.mean():.2g}): it is untrained"
        return [Finding("loss", ERROR, problem, "Train it longer, and see whether the loss in metrics.jsonl falls")]
    linear = "times that of the best linear denoiser of the same pictures"
    if explanations := [comparison for comparison in comparisons if comparison.explains]:
        best = max(explanations, key=lambda comparison: comparison.recorded - comparison.other)
        losses = f"its loss is {math.exp(best.recorded):.2g} {linear}, and {math.exp(best.other):.2g} times then"
        return [dataclasses.replace(best.finding, problem=f"{best.finding.problem}: {losses}")]
    severity = ERROR if recorded > _VERY_POOR else WARNING
    remedy = "Train it longer; if the loss in metrics.jsonl no longer falls, use a wider network"
    return [Finding("loss", severity, f"the loss of the network is {math.exp(recorded):.2g} {linear}", remedy)]


def is_poor(recorded: float) -> bool:
    """Whether the `fit` of the recorded setup calls for an explanation: the linear denoiser is clearly better."""
    return recorded > _POOR


def is_untrained(measured: Calibration) -> bool:
    """Whether a network predicts next to nothing, as before its training."""
    return float(measured.power.mean()) < _UNTRAINED_POWER


def check_channel_order(straight: np.ndarray, reverse: np.ndarray) -> list[Finding]:
    """Checks whether a network denoises pictures better if their channels are reversed.

    Args:
      straight: its losses for N pictures as they are, [K, N].
      reverse: its losses for the same pictures and the same noise with reversed channels, [K, N].
    """
    gain = (np.log(straight + _FLOOR) - np.log(reverse + _FLOOR)).mean(axis=0)
    error = gain.std(ddof=1) / math.sqrt(len(gain)) if len(gain) > 1 else math.inf
    if gain.mean() < max(_LEAST_GAIN, _Z * error):
        return []
    share = -math.expm1(-gain.mean())
    return [
        Finding(
            "channel order",
            ERROR,
            f"the network's loss is {share:.1%} lower if the channels of the pictures are reversed (BGR for RGB)",
            "Give it the pictures that it was trained on, or reverse the channels of its training pictures",
        )
    ]


def check_ema(
    ema: np.ndarray, raw: np.ndarray, *, decay: float, steps: int, started_random: bool = True
) -> list[Finding]:
    """Checks the EMA weights, which all samples use.

    Args:
      ema: loss by timestep of the EMA weights [K].
      raw: that of the raw weights [K].
      decay: of the EMA.
      steps: training steps.
      started_random: whether the run began with random weights.
    """
    share, worse = decay**steps, distance(ema, raw)
    holds_initial = started_random and steps > 0 and share > _INITIAL_SHARE
    if not holds_initial and worse < _EMA_WORSE:
        return []
    losses = f"their mean loss is {ema.mean():.3f}, that of the raw weights {raw.mean():.3f}"
    suits = max(0.0, round(1.0 - max(1e-4, 10.0 / max(1, steps)), 4))
    remedy = f"Train with `ema_decay={suits:g}`, which suits {steps:,} steps"
    if holds_initial:
        enough = math.ceil(math.log(0.01) / math.log(decay))
        problem = f"after {steps:,} steps with decay {decay:g} the EMA weights are still {share:.1%} initial weights"
        return [Finding("EMA", ERROR, f"{problem}: {losses}", f"{remedy}, or train for {enough:,} steps")]
    return [Finding("EMA", ERROR, f"the EMA weights (decay {decay:g}) lag behind: {losses}", remedy)]


def check_calibration(measured: Calibration) -> list[Finding]:
    """Checks E[eps eps_hat] / E[eps_hat^2] where the noise is predictable."""
    predictable = measured.loss < _PREDICTABLE
    off = float((measured.scale[predictable] - 1.0).mean()) if predictable.any() else 0.0
    if abs(off) < _CALIBRATION:
        return []
    first = measured.timesteps[predictable].min()
    amount = f"{abs(off):.1%} too {'little' if off > 0 else 'much'} noise"
    effect = "leave noise" if off > 0 else "blur"
    return [
        Finding(
            "calibration",
            WARNING,
            f"from t = {first} on the network predicts {amount}: samplers that add no noise {effect}",
            "Train longer, or sample by `sampler=ancestral`, which corrects itself",
        )
    ]


# --- What samples tell -----------------------------------------------------------------------------------------


def check_drift(timesteps: np.ndarray, drift: np.ndarray) -> list[Finding]:
    """Checks that many steps from x_t end where one step says that they end.

    Args:
      timesteps: int [K].
      drift: E[(sampled x_0 - predicted x_0)^2] / E[(x_0 - predicted x_0)^2] [K], 1 for the true posterior.
    """
    worst = int(drift.argmax())
    if drift[worst] < _DRIFT:
        return []
    return [
        Finding(
            "drift",
            WARNING,
            f"samples from x_t at t = {timesteps[worst]} spread {drift[worst]:.2g} times as far from the prediction as"
            " pictures do: the errors of the steps add up",
            "Train longer or with a larger network; check the calibration",
        )
    ]


@dataclasses.dataclass(frozen=True)
class PictureStatistics:
    """Statistics of N images in [0, 255]; all arrays float64.

    Attributes:
      means: mean of each channel [N, C].
      squares: mean square of each image, after the mean of all images is subtracted [N].
      roughness: mean squared difference of vertical neighbours [N].
      saturated: share of the pixels at 0 or 255 [N].
    """

    means: np.ndarray
    squares: np.ndarray
    roughness: np.ndarray
    saturated: np.ndarray

    @property
    def contrast(self) -> float:
        """Standard deviation over all pixels."""
        return math.sqrt(self.squares.mean())

    @property
    def high_frequencies(self) -> float:
        """Root mean squared difference of vertical neighbours."""
        return math.sqrt(self.roughness.mean())

    def summary(self) -> dict[str, float]:
        """The numbers by their names."""
        return {
            "mean": float(self.means.mean()),
            "contrast": self.contrast,
            "high frequencies": self.high_frequencies,
            "saturated": float(self.saturated.mean()),
        }


def picture_statistics(images: np.ndarray) -> PictureStatistics:
    """The statistics of images uint8 [N, H, W, C]."""
    x = images.astype(np.float64)
    over = (1, 2, 3)
    return PictureStatistics(
        means=x.mean(axis=(1, 2)),
        squares=((x - x.mean()) ** 2).mean(axis=over),
        roughness=(np.diff(x, axis=1) ** 2).mean(axis=over),
        saturated=((images == 0) | (images == 255)).mean(axis=over),
    )


def _ratio(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """Root of the ratio of two means of squares [N] and [M], and its relative standard error."""
    relative = [values.std(ddof=1) / math.sqrt(len(values)) / values.mean() for values in (ours, theirs)]
    return math.sqrt(ours.mean() / theirs.mean()), 0.5 * math.hypot(*relative)


def _differences(ours: PictureStatistics, theirs: PictureStatistics) -> dict[str, float]:
    """Ratios that differ from 1 by more than their threshold and their error, by name."""
    found = {}
    pairs = {"high frequencies": (ours.roughness, theirs.roughness), "contrast": (ours.squares, theirs.squares)}
    for name, pair in pairs.items():
        ratio, error = _ratio(*pair)
        if abs(math.log(ratio)) > max(math.log1p(_DEVIATION[name]), _Z * error):
            found[name] = ratio
    return found


def check_samples(samples: PictureStatistics, pictures: PictureStatistics) -> list[Finding]:
    """Checks samples of Algorithm 2 against pictures of the training set."""
    findings = []
    found = _differences(samples, pictures)
    rough = found.get("high frequencies", 1.0)
    if found:
        what = " and ".join(f"{ratio:.2f} times the {name}" for name, ratio in found.items())
        seen = "they hold noise" if rough > 1 else "they are blurred" if rough < 1 else "their contrast is off"
        remedy = "Mend what else is found; if nothing else is, train longer"
        findings.append(Finding("samples", ERROR, f"samples have {what} of the pictures: {seen}", remedy))
    more = float(samples.saturated.mean() - pictures.saturated.mean())
    if more > max(_SATURATED, _Z * samples.saturated.std() / math.sqrt(len(samples.saturated))):
        shares = f"{samples.saturated.mean():.0%} of the pixels of samples are 0 or 255, of pictures"
        problem = f"{shares} {pictures.saturated.mean():.0%}"
        findings.append(Finding("saturation", WARNING, problem, "Check the range of the data and the calibration"))
    straight, reverse = (
        float(np.abs(samples.means.mean(axis=0) - colour).max())
        for colour in (pictures.means.mean(axis=0), pictures.means.mean(axis=0)[::-1])
    )
    error = float((samples.means - samples.means.mean(axis=1, keepdims=True)).std(axis=0).max())
    if straight - reverse > _Z * error / math.sqrt(len(samples.means)) and reverse < 0.5 * straight:
        colours = [", ".join(f"{v:.0f}" for v in s.means.mean(axis=0)) for s in (samples, pictures)]
        problem = f"the mean colour of samples is ({colours[0]}), that of pictures ({colours[1]}): it is reversed"
        findings.append(Finding("colour", ERROR, problem, "Swap red and blue of the samples, or train on RGB"))
    return findings


def check_sampler(name: str, samples: PictureStatistics, algorithm_2: PictureStatistics) -> list[Finding]:
    """Checks samples of a sampler of few steps against those of Algorithm 2 from the same x_T.

    Args:
      name: the sampler, in words.
      samples: its samples.
      algorithm_2: those of Algorithm 2.
    """
    found = _differences(samples, algorithm_2)
    if not found:
        return []
    what = " and ".join(f"{ratio:.2f} times the {key}" for key, ratio in found.items())
    return [
        Finding(
            "sampler",
            WARNING,
            f"samples of {name} have {what} of those of Algorithm 2 from the same noise",
            "Take more `sampler_steps`, or `sampler=ancestral`",
        )
    ]
