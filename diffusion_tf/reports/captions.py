"""Captions that say which model drew the samples in a picture, and how."""

from collections.abc import Mapping, Sequence
from typing import Any


def sampler_name(sampling: Mapping[str, Any]) -> str:
    """The sampler, labels and guidance, where they are not the defaults; without the number of steps.

    Args:
      sampling: what `SamplerSettings.describe` and `Condition.describe` give, such as a line of `evaluations.jsonl`.
    """
    name, spacing = sampling["sampler"], sampling.get("sampler_spacing")
    clip = f"clip_sample {sampling['clip_sample']}" if "clip_sample" in sampling else ""
    clipped, is_clipped = sampling.get("use_clipped_model_output", True), sampling.get("clip_sample") != "none"
    eps = "eps of the clipped x_0" if clipped else "eps as predicted"
    eps = eps if is_clipped and clipped == (name == "ddim") else ""
    calibrated = "calibrated" if sampling.get("calibrated") else ""
    eta = f"eta {sampling['ddim_eta']:g}" if sampling.get("ddim_eta") else ""
    labels, guidance = sampling.get("labels", "all"), sampling.get("guidance")
    label = {"all": "", "none": "no label"}.get(labels, f"label {labels}")
    guided = f"guidance {guidance:g}" if guidance else ""
    if spacing == "trailing":
        spacing = None
    return ", ".join(filter(None, (name, eta, spacing, clip, eps, calibrated, label, guided)))


def sampling_name(sampling: Mapping[str, Any]) -> str:
    """The sampler and the number of its steps; argument as for `sampler_name`."""
    return f"{sampler_name(sampling)} in {sampling['sampler_steps']:,} steps"


def caption(dataset: str, step: int, sampling: Mapping[str, Any]) -> str:
    """Dataset, step of the checkpoint, sampler, number of its steps, and seed.

    Args:
      dataset: the preset's name.
      step: step of the checkpoint.
      sampling: the seed, and as for `sampler_name`.
    """
    return f"{dataset}, checkpoint {step:,}, {sampling_name(sampling)}, seed {sampling['seed']}"


def measured(
    step: int,
    digest: str,
    sampling: Mapping[str, Any],
    evaluations: Sequence[Mapping[str, Any]],
    likelihood: Mapping[str, Mapping[str, Any]],
) -> str:
    """The newest score of samples of this checkpoint that were drawn in the same way, and its bits/dim; may be empty.

    Args:
      step: step of the checkpoint.
      digest: the checkpoint's, as an evaluation records it.
      sampling: seed, compute dtype and sampler, as an evaluation records them.
      evaluations: the lines of `evaluations.jsonl`.
      likelihood: the bound of each split, as `experiments.likelihood` wrote it.
    """
    same = {"step": step, "checkpoint_sha256": digest, **sampling}
    lines = [line for line in evaluations if all(line.get(name) == value for name, value in same.items())]
    scores = [
        f"{name} {line[name]:.3g} ({line['num_samples']:,} samples)"
        for line in lines
        for name in ("fid", "frechet_digits")
        if isinstance(line.get(name), float)
    ]
    bits = [f"{r['bits_per_dim']:.2f} bits/dim ({split})" for split, r in likelihood.items() if r["step"] == step]
    return ", ".join([*scores[-1:], *bits])
