"""What captions say of samples, and which scores they take."""

import pytest

from diffusion_tf.conditioning import Condition
from diffusion_tf.presets import get_preset
from diffusion_tf.reports.captions import caption, measured
from diffusion_tf.solvers import SamplerSettings

PRESET = get_preset("digits")


def sampling(seed=0, dtype="float32", **settings):
    return {"seed": seed, "compute_dtype": dtype, **SamplerSettings(**settings).describe(PRESET)}


def line(step=20, digest="abc", score=1.5, **how):
    return {"step": step, "checkpoint_sha256": digest, **sampling(**how), "num_samples": 1000, "frechet_digits": score}


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({}, "ancestral in 1,000 steps, seed 0"),
        ({"seed": 3, "steps": 50}, "sde_dpm_solver++ in 50 steps, seed 3"),
        ({"name": "ddim", "steps": 5}, "ddim in 5 steps, seed 0"),
        ({"name": "ddim", "eta": 0.5, "spacing": "leading"}, "ddim, eta 0.5, leading in 50 steps, seed 0"),
        ({"name": "ddim", "clip_sample": "none"}, "ddim, clip_sample none in 50 steps, seed 0"),
        ({"name": "ddim", "use_clipped_model_output": True}, "ddim, eps of the clipped x_0 in 50 steps, seed 0"),
    ],
)
def test_caption_names_checkpoint_sampler_and_seed(how, expected):
    assert caption("digits", 2000, sampling(**how)) == f"digits, checkpoint 2,000, {expected}"


@pytest.mark.parametrize(
    "other",
    [
        {"name": "ddim", "steps": 5},
        {"steps": 50},
        {"seed": 1},
        {"dtype": "bfloat16"},
        {"step": 30},
        {"digest": "another"},
    ],
)
def test_a_caption_takes_no_score_of_other_samples(other):
    assert measured(20, "abc", sampling(), [line(**other)], {}) == ""
    evaluations = [line(score=1.0), line(score=2.0), line(**other, score=3.0)]
    assert measured(20, "abc", sampling(), evaluations, {}) == "frechet_digits 2 (1,000 samples)"


def test_a_caption_has_the_bound_of_its_checkpoint():
    likelihood = {"train": {"step": 10, "bits_per_dim": 3.0}, "test": {"step": 20, "bits_per_dim": 4.126}}
    assert measured(20, "abc", sampling(), [], likelihood) == "4.13 bits/dim (test)"
    assert measured(20, "abc", sampling(), [line()], likelihood).endswith("samples), 4.13 bits/dim (test)")


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        (Condition(), "ancestral in"),
        (Condition((3,), 2.0), "ancestral, label 3, guidance 2 in"),
        (Condition((-1,)), "ancestral, no label in"),
        (Condition((3, 5)), "ancestral, label 3,5 in"),
    ],
)
def test_a_caption_names_labels_and_guidance_and_takes_their_scores_only(condition, expected):
    classes = get_preset("digits", num_classes=10)
    how = {**sampling(), **condition.describe(classes)}
    assert caption("digits", 20, how) == f"digits, checkpoint 20, {expected} 1,000 steps, seed 0"
    others = [Condition((4,)), Condition(guidance=1.0), condition]
    lines = [{**line(score=float(i)), **other.describe(classes)} for i, other in enumerate(others)]
    assert measured(20, "abc", how, lines, {}) == "frechet_digits 2 (1,000 samples)"
