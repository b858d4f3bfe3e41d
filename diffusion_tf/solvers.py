"""Samplers as tables: which timesteps a sampler visits, and the coefficients of its steps.

Every sampler here is linear in what it knows. A step from timestep t to the next, less noisy one is

    x <- a x + b pred_xstart + c (pred_xstart of the previous step) + d (pred_xstart before it is clipped) + s noise,

where the network predicts pred_xstart from (x, t). The last step ends at x_0 (alphas_cumprod = 1).
`samplers.table_steps` runs any such table. To add a sampler, write the function that makes its table, and add that to
_SOLVERS.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from diffusion_tf.errors import ConfigError
from diffusion_tf.presets import Preset
from diffusion_tf.schedules import NoiseSchedule, posterior

if TYPE_CHECKING:
    from diffusion_tf.diffusion_utils import GaussianDiffusion

SPACINGS = ("trailing", "leading", "linspace", "logsnr")
CLIPS = ("static", "dynamic", "none")


@dataclasses.dataclass(frozen=True)
class SamplerTable:
    """The steps of a sampler.

    Attributes:
      timesteps: int [N], descending: the network is evaluated at timesteps[i] in step i.
      coefficients: float64 [N, 5]: a, b, c, d and s of each step.
      clip_sample: how pred_xstart is clipped, one of CLIPS.
    """

    timesteps: np.ndarray
    coefficients: np.ndarray
    clip_sample: str = "static"


def _table(ts: np.ndarray, a: ArrayLike, b: ArrayLike, c: ArrayLike, s: ArrayLike) -> SamplerTable:
    return SamplerTable(ts, np.stack(np.broadcast_arrays(a, b, c, 0.0, s), axis=1).astype(np.float64))


def _levels(schedule: NoiseSchedule, ts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """alphas_cumprod [N] where each step begins, and [N] where it ends."""
    begin = schedule.alphas_cumprod[ts]
    return begin, np.append(begin[1:], 1.0)


def _half_log_snr(alphas_cumprod: np.ndarray) -> np.ndarray:
    """DPM-Solver's lambda: log(sqrt(alphas_cumprod) / sqrt(1 - alphas_cumprod)); infinite at 0 and 1."""
    with np.errstate(divide="ignore"):
        return 0.5 * (np.log(alphas_cumprod) - np.log1p(-alphas_cumprod))


# --- Samplers --------------------------------------------------------------------------------------------------


def ancestral_table(schedule: NoiseSchedule, ts: np.ndarray, model_var_type: str) -> SamplerTable:
    """Algorithm 2 on a sub-sequence of the steps.

    It samples the reverse of the process whose betas lead from each level of the sub-sequence to the next: mean and
    variance are the posterior's (Eqs. 6-7), or the variance is beta for `fixedlarge`.

    Raises:
      ConfigError: the variance is learned. The network predicts it for single steps only.
    """
    if model_var_type == "learned":
        raise ConfigError(
            "sampler_steps",
            f"={len(ts)}: the network learned the variance of single steps only; take all steps with"
            " `clip_sample=static`, or use another `sampler`",
        )
    abar, abar_prev = _levels(schedule, ts)
    betas = 1.0 - abar / abar_prev
    q = posterior(1.0 - betas, betas, abar, abar_prev)
    variance = betas if model_var_type == "fixedlarge" else q.variance
    return _table(ts, q.mean_coef2, q.mean_coef1, 0.0, np.sqrt(np.append(variance[:-1], 0.0)))


def ddim_table(schedule: NoiseSchedule, ts: np.ndarray, eta: float) -> SamplerTable:
    """DDIM (Song, Meng & Ermon 2021, Eqs. 12 and 16). Its order is 1 for eta = 0.

    eps follows from the clipped pred_xstart, unless `with_predicted_eps` changes that. A step ends at the next timestep
    of `ts`; in diffusers it ends at t - T // N, which differs if N does not divide T.
    """
    abar, abar_prev = _levels(schedule, ts)
    sigma = eta * np.sqrt((1.0 - abar_prev) / (1.0 - abar) * (1.0 - abar / abar_prev))
    a = np.sqrt((1.0 - abar_prev - sigma**2) / (1.0 - abar))
    return _table(ts, a, np.sqrt(abar_prev) - a * np.sqrt(abar), 0.0, sigma)


def ddim_inversion_table(schedule: NoiseSchedule, ts: np.ndarray) -> SamplerTable:
    """DDIM with eta = 0 run backwards, from x_0 to x at ts[0], for descending `ts` (Section 4.3 of DDIM).

    Each step predicts eps at the timestep where it begins. The first step begins at the image, which has no timestep,
    and predicts eps at the lowest one.
    """
    ts = ts[::-1]
    end = schedule.alphas_cumprod[ts]
    begin, evaluated = np.append(1.0, end[:-1]), np.append(ts[:1], ts[:-1])
    abar = schedule.alphas_cumprod[evaluated]
    scale = np.sqrt(end / begin)
    per_eps = np.sqrt(1.0 - end) - scale * np.sqrt(1.0 - begin)
    # eps = (x - sqrt(abar) pred_xstart) / sqrt(1 - abar)
    per_eps /= np.sqrt(1.0 - abar)
    return _table(evaluated, scale + per_eps, -per_eps * np.sqrt(abar), 0.0, 0.0)


def with_predicted_eps(schedule: NoiseSchedule, table: SamplerTable) -> SamplerTable:
    """The same sampler with eps as the network predicts it, not as it follows from the clipped pred_xstart.

    diffusers calls these `use_clipped_model_output=False` and True. A step that is linear in x and pred_xstart moves x
    along eps = (x - sqrt(abar) pred_xstart) / sqrt(1 - abar).
    """
    a, b, c, _, s = table.coefficients.T
    signal = a * np.sqrt(schedule.alphas_cumprod[table.timesteps])
    return dataclasses.replace(table, coefficients=np.stack([a, b + signal, c, -signal, s], axis=1))


def dpm_solver_table(schedule: NoiseSchedule, ts: np.ndarray, *, sde: bool = False) -> SamplerTable:
    """DPM-Solver++ 2M (Lu et al. 2022, Algorithm 2), of order 2; the first and the last step have order 1.

    It uses the exact levels of the discrete schedule. The last step ends at x_0, as with diffusers'
    `final_sigmas_type="zero"`.

    Args:
      schedule: of the process.
      ts: the timesteps, int [N], descending.
      sde: solve the reverse SDE (their SDE-DPM-Solver++ 2M, Appendix D.3), which replaces noise at every step. Of order
        1, it is ancestral sampling with the posterior's variance.
    """
    abar, abar_prev = _levels(schedule, ts)
    h = _half_log_snr(abar_prev) - _half_log_snr(abar)
    kept = np.exp(-h) if sde else np.ones(len(ts))  # the share of the old noise in the new
    gain = np.sqrt(abar_prev) * (1.0 - kept * np.exp(-h))
    extrapolation = np.zeros(len(ts))  # 1 / (2 r), where r is the previous step's h over this step's h
    extrapolation[1:-1] = h[1:-1] / (2.0 * h[:-2])
    return _table(
        ts,
        kept * np.sqrt((1.0 - abar_prev) / (1.0 - abar)),
        gain * (1.0 + extrapolation),
        -gain * extrapolation,
        np.sqrt((1.0 - abar_prev) * (1.0 - kept**2)),
    )


def heun_table(schedule: NoiseSchedule, ts: np.ndarray) -> SamplerTable:
    """EDM's deterministic sampler (Karras et al. 2022, Algorithm 1): Heun's method, of order 2, on the levels `ts`.

    Two evaluations a step, except one in the last: 2 len(ts) - 1 in all. In y = x / sqrt(abar), with the noise level
    sigma, dy / dsigma is (y - pred_xstart) / sigma. The second evaluation of a step corrects the Euler step that the
    first one made, which is linear, so the step's beginning follows from its end.
    """
    begin, end = _levels(schedule, ts)
    sigma, sigma_end = np.sqrt(1.0 / begin - 1.0), np.sqrt(1.0 / end - 1.0)
    ratio = sigma_end / sigma
    euler = np.stack([np.sqrt(end / begin) * ratio, np.sqrt(end) * (1.0 - ratio), np.zeros(len(ts))], axis=1)
    # y + half ((y - first) / sigma + (y' - second) / sigma_end), where y' = ratio y + (1 - ratio) first.
    sigma, sigma_end, ratio, scale = sigma[:-1], sigma_end[:-1], ratio[:-1], np.sqrt(end[:-1])
    half = 0.5 * (sigma_end - sigma)
    per_y = 1.0 + half / sigma
    per_first = -half / sigma - per_y * (1.0 - ratio) / ratio
    heun = np.stack([per_y / ratio + half / sigma_end, -scale * half / sigma_end, scale * per_first], axis=1)
    rows = np.empty((2 * len(ts) - 1, 3))
    rows[::2], rows[1::2] = euler, heun
    return _table(ts.repeat(2)[1:], rows[:, 0], rows[:, 1], rows[:, 2], 0.0)


class _Solver(NamedTuple):
    """How to make a sampler's table, in how many steps by default (None: all T), and the evaluations of each."""

    table: Callable[["GaussianDiffusion", np.ndarray, float], SamplerTable]  # of (diffusion, timesteps, eta)
    default_steps: int | None
    evaluations: int = 1


_SOLVERS = {
    "ancestral": _Solver(
        lambda diffusion, ts, _: ancestral_table(diffusion.schedule, ts, diffusion.model_var_type), None
    ),
    "ddim": _Solver(lambda diffusion, ts, eta: ddim_table(diffusion.schedule, ts, eta), 50),
    "dpm_solver++": _Solver(lambda diffusion, ts, _: dpm_solver_table(diffusion.schedule, ts), 20),
    "sde_dpm_solver++": _Solver(lambda diffusion, ts, _: dpm_solver_table(diffusion.schedule, ts, sde=True), 20),
    "heun": _Solver(lambda diffusion, ts, _: heun_table(diffusion.schedule, ts), 35, evaluations=2),
}
SAMPLERS = tuple(_SOLVERS)


# --- Settings --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SamplerSettings:
    """Which sampler, and in how many steps.

    Attributes:
      name: one of SAMPLERS; default: `ancestral` for all T steps, `sde_dpm_solver++` for fewer.
      steps: network evaluations for each sample, in [1, T]; `heun` takes an odd number, one less than an even one.
        Default: T for `ancestral`, 50 for `ddim`, 20 for `dpm_solver++` and `sde_dpm_solver++`, 35 for `heun`.
      eta: noise of DDIM, in [0, 1]: 0 adds none, 1 adds as much as the posterior q(x_{t-1} | x_t, x_0) has.
      spacing: one of SPACINGS, see `timesteps`.
      strength: take only this share of the steps, the last ones, in (0, 1]; below 1 they start from given images
        (SDEdit, Meng et al. 2021).
      clip_sample: how the predicted x_0 is limited in every step: `static` clips it to [-1, 1], `dynamic` is
        `GaussianDiffusion.clip_xstart`'s thresholding of each image, and `none` leaves it.
      use_clipped_model_output: whether eps follows from the clipped x_0, as in diffusers; False: as predicted. `heun`
        can only do the former. Default: False for `ddim`, True for the others.
    """

    name: str | None = None
    steps: int | None = None
    eta: float = 0.0
    spacing: str = "trailing"
    strength: float = 1.0
    clip_sample: str = "static"
    use_clipped_model_output: bool | None = None

    def resolve(self, preset: Preset) -> "SamplerSettings":
        """These settings with every default filled in for `preset`.

        Raises:
          ConfigError: a value is out of range, or does not fit the sampler.
        """
        num_timesteps = preset.num_timesteps
        name = self.name or ("ancestral" if self.steps in (None, num_timesteps) else "sde_dpm_solver++")
        if name not in SAMPLERS:
            raise ConfigError("sampler", f"={name}: choose one of {', '.join(SAMPLERS)}")
        steps = self.steps or min(_SOLVERS[name].default_steps or num_timesteps, num_timesteps)
        if not 1 <= steps <= num_timesteps:
            raise ConfigError("sampler_steps", f"={steps} must be from 1 to the run's {num_timesteps} steps")
        if self.clip_sample not in CLIPS:
            raise ConfigError("clip_sample", f"={self.clip_sample}: choose one of {', '.join(CLIPS)}")
        if not 0 <= self.eta <= 1:
            raise ConfigError("ddim_eta", f"={self.eta} must be in [0, 1]")
        if self.eta and name != "ddim":
            raise ConfigError("ddim_eta", f"={self.eta} goes with `sampler=ddim`, not {name}")
        if not 0 < self.strength <= 1:
            raise ConfigError("strength", f"={self.strength} must be in (0, 1]")
        if self.use_clipped_model_output is False and name in ("ancestral", "heun"):
            raise ConfigError("use_clipped_model_output", f"=False does not go with `sampler={name}`")
        clipped = name != "ddim" if self.use_clipped_model_output is None else self.use_clipped_model_output
        return dataclasses.replace(self, name=name, steps=steps, use_clipped_model_output=clipped)

    def describe(self, preset: Preset) -> dict[str, Any]:
        """The settings that its samples depend on, in a form that JSON can hold.

        What older versions did not record is there only where it differs from what they did.
        """
        resolved = self.resolve(preset)
        description: dict[str, Any] = {"sampler": resolved.name, "sampler_steps": resolved.steps}
        if resolved.name == "ddim":
            description["ddim_eta"] = resolved.eta
        if (resolved.name, resolved.steps) != ("ancestral", preset.num_timesteps):
            description["sampler_spacing"] = resolved.spacing
        if resolved.strength < 1:
            description["strength"] = resolved.strength
        if resolved.clip_sample != "static":
            description["clip_sample"] = resolved.clip_sample
        if not resolved.use_clipped_model_output and resolved.clip_sample != "none":
            description["use_clipped_model_output"] = False
        return description

    def last_steps(self, steps: int) -> int:
        """How many of the last steps `strength` takes, at least one."""
        return max(1, round(self.strength * steps))


def sampler_table(settings: SamplerSettings, preset: Preset, diffusion: "GaussianDiffusion") -> SamplerTable | None:
    """The table of a sampler, or None for Algorithm 2 over all steps, which needs no table.

    Raises:
      ConfigError: a setting is out of range, or ancestral sampling would skip steps of a learned variance.
    """
    resolved = settings.resolve(preset)
    assert resolved.name and resolved.steps
    if (resolved.name, resolved.steps, resolved.clip_sample) == ("ancestral", diffusion.num_timesteps, "static"):
        return None
    solver = _SOLVERS[resolved.name]
    steps = -(-resolved.steps // solver.evaluations)
    ts = timesteps(diffusion.schedule, steps, resolved.spacing)[-resolved.last_steps(steps) :]
    table = solver.table(diffusion, ts, resolved.eta)
    if not resolved.use_clipped_model_output:
        table = with_predicted_eps(diffusion.schedule, table)
    return dataclasses.replace(table, clip_sample=resolved.clip_sample)


# --- Inpainting ------------------------------------------------------------------------------------------------

# The paper's, except that it takes 250 steps. 100 of them complete digits as well, at the cost of about one sample.
RESAMPLINGS = 10  # how often each stretch of steps is taken
JUMP_LENGTH = 10  # steps in a stretch
_REPAINT_STEPS = 100


@dataclasses.dataclass(frozen=True)
class RepaintTable:
    """The network evaluations of RePaint (Lugmayr et al. 2022) over the steps of a sampler.

    Attributes:
      steps: int [M]: the step that evaluation i takes, an index into the sampler's timesteps.
      ends: float64 [M]: alphas_cumprod where that step ends.
      jumps: float64 [M]: what the jump after evaluation i multiplies alphas_cumprod by; 1 where there is none.
    """

    steps: np.ndarray
    ends: np.ndarray
    jumps: np.ndarray


def repaint_settings(settings: SamplerSettings, preset: Preset) -> SamplerSettings:
    """The sampler of RePaint: by default ancestral sampling, which takes 100 steps unless `settings` say otherwise.

    A learned variance, which is that of single steps, takes all T.
    """
    if settings.name is None:
        settings = dataclasses.replace(settings, name="ancestral")
    if settings.name != "ancestral" or settings.steps or preset.model_var_type == "learned":
        return settings
    return dataclasses.replace(settings, steps=min(_REPAINT_STEPS, preset.num_timesteps))


def repaint_table(schedule: NoiseSchedule, ts: np.ndarray, *, resamplings: int, jump_length: int) -> RepaintTable:
    """RePaint's schedule on a sampler's timesteps: every stretch of steps is taken several times before the next one.

    After a stretch of `jump_length` steps it adds the noise of those steps, and takes them again. The last step, and
    the steps before the first whole stretch, are taken once.

    Args:
      schedule: of the process.
      ts: the sampler's timesteps int [N], descending.
      resamplings: how often each stretch is taken, the paper's r; 1 makes no jumps.
      jump_length: steps in a stretch, the paper's j.

    Raises:
      ConfigError: a number is not positive.
    """
    for name, value in (("resamplings", resamplings), ("jump_length", jump_length)):
        if value < 1:
            raise ConfigError(name, f"={value} must be greater than 0")
    stretches = (len(ts) - 1) // jump_length
    head = len(ts) - 1 - stretches * jump_length
    steps = np.arange(len(ts))
    repeated = steps[head:-1].reshape(stretches, 1, jump_length).repeat(resamplings, axis=1)
    steps = np.concatenate([steps[:head], repeated.ravel(), steps[-1:]])
    begin, end = _levels(schedule, ts)
    ends = end[steps]
    return RepaintTable(steps, ends, np.append(begin[steps[1:]] / ends[:-1], 1.0))


# --- Timesteps -------------------------------------------------------------------------------------------------


def timesteps(schedule: NoiseSchedule, steps: int, spacing: str) -> np.ndarray:
    """Descending timesteps int [steps] in [0, T); all T of them if steps = T.

    `trailing`: T - k T / steps - 1, rounded, for k = 0, 1, ... It begins at T - 1. diffusers uses the same name.
    `leading`: the multiples of T // steps, as in diffusers' DDPM and DDIM (not its DPM-Solver). It leaves out the
      noisiest steps: 10 of 1000 begin at 900.
    `linspace`: evenly spaced from T - 1 to 0, without 0 itself, as in diffusers' DPM-Solver (its DDIM includes 0).
    `logsnr`: evenly spaced in log(alphas_cumprod / (1 - alphas_cumprod)) from T - 1 to 0. Differs from the DPM-Solver
      paper, which has continuous time: a network knows whole timesteps only, so this takes the nearest ones, and
      neighbours where several would be the same.

    Raises:
      ConfigError: the spacing is unknown, or `logsnr` is given a schedule whose alphas_cumprod ends at 0.
    """
    last = schedule.num_timesteps - 1
    if spacing == "trailing":
        return np.round(np.arange(steps, 0, -1) * schedule.num_timesteps / steps).astype(int) - 1
    if spacing == "leading":
        return np.arange(steps)[::-1] * (schedule.num_timesteps // steps)
    if spacing == "linspace":
        return _distinct(np.linspace(last, 0, steps + 1).round().astype(int)[:-1])
    if spacing != "logsnr":
        raise ConfigError("sampler_spacing", f"={spacing}: choose one of {', '.join(SPACINGS)}")
    if schedule.alphas_cumprod[-1] == 0:
        raise ConfigError(
            "sampler_spacing", "=logsnr needs a schedule whose alphas_cumprod does not end at 0: choose another"
        )
    lambdas = _half_log_snr(schedule.alphas_cumprod)
    wanted = np.linspace(lambdas[-1], lambdas[0], steps)
    return _distinct(np.abs(lambdas - wanted[:, None]).argmin(axis=1))


def _distinct(descending: np.ndarray) -> np.ndarray:
    """Lowers repeated timesteps until all are distinct, and raises those that would fall below 0."""
    steps = len(descending)
    lowered = np.minimum.accumulate(descending + np.arange(steps)) - np.arange(steps)
    return np.maximum(lowered, np.arange(steps)[::-1])
