"""What a reader of a run's page looks for first: the key numbers, what was changed, and what was not measured."""

import dataclasses
import math
from typing import Any, NamedTuple

from diffusion_tf.presets import PRESETS
from diffusion_tf.reports import paper_numbers as paper
from diffusion_tf.reports.captions import sampling_name
from diffusion_tf.reports.run_record import RunRecord, scores

_DETAILS = ("_standard_error", "_splits", "_splits_std")


class KeyNumber(NamedTuple):
    """A result of a run, as text.

    Attributes:
      name: its name.
      value: the result.
      paper: the paper's for the same, or empty.
      note: how it was measured, where that is not how the paper does; or what to compare it with.
    """

    name: str
    value: str
    paper: str = ""
    note: str = ""


def title(record: RunRecord) -> str:
    """The preset, and how far the run is."""
    step = int(record.metrics[-1]["step"]) if record.metrics else 0
    progress = f"{step:,} of {record.config['num_steps']:,} steps" if step else "not trained here"
    return f"{record.config['dataset']}, {progress}"


def key_numbers(record: RunRecord) -> list[KeyNumber]:
    """The bound of each split, and the scores of one evaluation, beside the paper's where they can be compared."""
    papers = paper.RESULTS.get(record.config["dataset"], {})
    numbers = []
    for split, result in record.likelihood.items():
        error = _error(result["bits_per_dim_standard_error"])
        name = f"bits/dim, {split}"
        levels = result.get("levels", 256)  # older versions did not count them
        note = f"a uniform code of the images' {levels} levels takes {math.log2(levels):.2f}" if levels < 256 else ""
        note = ", ".join(filter(None, ["given the labels" if "given" in result else "", note]))
        numbers.append(KeyNumber(name, f"{result['bits_per_dim']:.2f}{error}", papers.get(name, ""), note))
    line = record.best_fid()
    if not line:  # the newest one, of Algorithm 2 if there is one
        papers, scored = {}, [line for line in record.evaluations if main_scores(line)]
        line = next(iter([*filter(record.is_algorithm_2, scored[::-1]), *scored[::-1]]), {})
    if line:
        note = "" if record.is_algorithm_2(line) else sampling_name(line)
        names = [name for name in main_scores(line) if not name.startswith(("kid", "kernel"))]
        numbers += [KeyNumber(name, score_text(line, name), papers.get(name, ""), note) for name in names]
    return numbers


def main_scores(evaluation: dict[str, Any]) -> dict[str, float]:
    """The scores of an evaluation without their errors and splits."""
    return {name: score for name, score in scores(evaluation).items() if not name.endswith(_DETAILS)}


def score_text(evaluation: dict[str, Any], name: str) -> str:
    """A score with its standard error, if there is one."""
    return f"{evaluation[name]:.4g}{_error(evaluation.get(f'{name}_standard_error'))}"


def _error(error: Any) -> str:
    return f" ± {error:.2g}" if isinstance(error, float) and math.isfinite(error) else ""


def changed_fields(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a run's configuration that are not the preset's; all of them if its preset is unknown."""
    preset = PRESETS.get(config["dataset"])
    there = dataclasses.asdict(preset) if preset else {}
    if not config.get("num_classes"):
        config = {name: value for name, value in config.items() if name != "label_dropout"}  # unused
    return {name: value for name, value in config.items() if name not in there or value != there[name]}


def missing(record: RunRecord) -> dict[str, str]:
    """The measurements that the run has no result of, and the programs that make them."""
    programs = {
        "bits/dim": (record.likelihood, "likelihood"),
        "rate-distortion": (record.rate_distortion, "rate_distortion"),
        "scores of samples": (record.evaluations, "evaluate"),
        "compressed files": (record.compression, "compress encode"),
        "copies of training pictures": (record.neighbors, "neighbors"),
    }
    return {name: f"python -m experiments.{program}" for name, (result, program) in programs.items() if not result}
