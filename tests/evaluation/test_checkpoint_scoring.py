"""Checkpoints are scored once each, also when training removes them or an evaluation is interrupted."""

import numpy as np
import pytest

from diffusion_tf.data.digits import load_digits
from diffusion_tf.evaluation.checkpoint_scoring import CheckpointScorer, Scorer
from diffusion_tf.evaluation.feature_networks import pixels_network
from diffusion_tf.evaluation.scores import FeatureExtractor, Images, RunSamples
from diffusion_tf.presets import get_preset
from diffusion_tf.runtime.strategies import make_strategy
from diffusion_tf.storage import checkpoints
from diffusion_tf.storage.workdir import Workdir
from diffusion_tf.training.state import TrainState

PRESET = get_preset("digits", num_timesteps=2, ch_mult=(1,), num_steps=6)


@pytest.fixture
def scorer(tmp_path):
    """Scores the run in `tmp_path`, which has checkpoints of the steps 2, 4 and 6."""
    workdir, strategy, digits = Workdir(str(tmp_path)), make_strategy("one_device"), load_digits()
    workdir.write_config(PRESET, len(digits), "")
    arrays = TrainState(PRESET, strategy).to_arrays()
    for step in (2, 4, 6):
        checkpoints.save(workdir.checkpoints, step, {**arrays, "step": np.asarray(step, np.int64)})
    real = Images({"split": "train", "num_images": 30}, 30, lambda first, count: digits[first : first + count])
    extractor = FeatureExtractor(pixels_network((8, 8, 1)), strategy, 10, workdir.partial)
    samples = RunSamples(strategy, PRESET, num_samples=20, batch_size=10, seed=0)
    return CheckpointScorer(
        workdir, Scorer(extractor, ["fid"], real, f"{tmp_path}/reference.npz"), samples, "frechet_pixels"
    )


def test_each_checkpoint_is_scored_once(scorer):
    results = list(scorer.follow(eval_every=4))
    assert [result["step"] for result in results] == [4, 6]  # a multiple of 4, and the last
    assert list(scorer.follow(eval_every=4)) == []
    assert scorer.workdir.read_evaluations() == results
    path = checkpoints.checkpoint_path(scorer.workdir.checkpoints, 4)
    assert scorer.score_once(4, path) == results[0] and scorer.workdir.read_evaluations() == results
    checkpoints.save(scorer.workdir.checkpoints, 4, TrainState(PRESET, make_strategy("one_device")).to_arrays())
    assert scorer.score_once(4, path)["checkpoint_sha256"] != results[0]["checkpoint_sha256"]


def test_an_interrupted_evaluation_scores_its_copy_of_a_removed_checkpoint(scorer, tmp_path, monkeypatch):
    monkeypatch.setattr(scorer.samples, "of_checkpoint", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        next(scorer.follow(eval_every=2))
    monkeypatch.undo()
    (tmp_path / "checkpoints/step_00000002.safetensors").unlink()
    assert [result["step"] for result in scorer.follow(eval_every=2)] == [2, 4, 6]
    assert not list((tmp_path / "checkpoints/evaluating").glob("*/*"))


def test_the_results_may_lie_elsewhere(scorer, tmp_path):
    elsewhere = Workdir(str(tmp_path / "elsewhere"))
    scorer = CheckpointScorer(scorer.workdir, scorer.scorer, scorer.samples, scorer.best_by, elsewhere)
    before = sorted(path for path in tmp_path.rglob("*") if path.name != "partial")
    path = checkpoints.checkpoint_path(scorer.workdir.checkpoints, 4)
    result = scorer.score_once(4, path)
    assert scorer.score_once(4, path) == result and elsewhere.read_evaluations() == [result]
    assert checkpoints.all_steps(f"{elsewhere.checkpoints}/best") == [4]
    after = sorted(path for path in tmp_path.rglob("*") if path.name != "partial" and "elsewhere" not in path.parts)
    assert after == before


def test_a_checkpoint_that_overflows_does_not_end_the_evaluation(scorer, caplog):
    path = checkpoints.checkpoint_path(scorer.workdir.checkpoints, 4)
    arrays = checkpoints.load(path)
    checkpoints.save(
        scorer.workdir.checkpoints,
        4,
        {name: array * np.float32(1e25) if name.startswith("ema/conv_in") else array for name, array in arrays.items()},
    )
    assert [result["step"] for result in scorer.follow(eval_every=2)] == [2, 6]
    assert "step 4 has no scores: " in caplog.text
    assert not checkpoints.all_steps(scorer._held)
