"""Scores of images are named after their features, can be resumed, and do not depend on the number of replicas."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import tensorflow as tf
from support import inception_files

from diffusion_tf.data import open_source
from diffusion_tf.data.digits import load_digits
from diffusion_tf.errors import ConfigError, DamagedFileError, InputError, NotFiniteError
from diffusion_tf.evaluation import metrics
from diffusion_tf.evaluation.best_checkpoint import best_folder, is_alike, read_best, record_evaluation
from diffusion_tf.evaluation.feature_networks import FeatureNetwork, digits_network, inception_network, pixels_network
from diffusion_tf.evaluation.scores import (
    METRICS,
    FeatureExtractor,
    Images,
    RunSamples,
    check_metrics,
    choose_best_by,
    choose_metrics,
    compute_scores,
    file_images,
    reference_features,
    score_names,
    score_notes,
    source_images,
)
from diffusion_tf.presets import get_preset
from diffusion_tf.runtime.strategies import make_strategy
from diffusion_tf.solvers import SamplerSettings
from diffusion_tf.storage import checkpoints
from diffusion_tf.storage.files import write_file
from diffusion_tf.storage.npz_files import write_npz
from diffusion_tf.storage.workdir import Workdir
from diffusion_tf.training.state import TrainState

REFERENCE = {"num_images": 9, "images": "digits, train"}


def array_images(images):
    return Images({"digest": int(images.sum())}, len(images), lambda first, count: images[first : first + count])


def colour_images(seed, count=40):
    return np.random.RandomState(seed).randint(0, 256, (count, 16, 16, 3), np.uint8)


@pytest.mark.parametrize("save", [inception_files.save_model, inception_files.save_frozen_graph])
@pytest.mark.parametrize("strategy", ["one_device", "mirrored"])
def test_features_in_batches_are_those_of_all_at_once(strategy, save, tmp_path):
    save(tmp_path / "inception")
    strategy = make_strategy(strategy)
    network = inception_network(str(tmp_path / "inception"), strategy)
    extractor = FeatureExtractor(network, strategy, 16, str(tmp_path / "partial"))  # 40 is no multiple of 16
    images = colour_images(0)
    arrays = extractor(array_images(images), "images")
    expected = network.apply(tf.constant(images, tf.float32))
    for name in ("features", "logits"):
        np.testing.assert_allclose(arrays[name], expected[name], rtol=1e-4, atol=1e-4)


def test_scores_are_named_after_their_features(tmp_path):
    inception_files.save_frozen_graph(tmp_path / "inception.pb")
    strategy = make_strategy("one_device")
    inception = inception_network(str(tmp_path / "inception.pb"), strategy)
    keys = {}
    for network in (inception, digits_network(), pixels_network((8, 8, 1))):
        colour = network is inception
        images = [colour_images(seed) for seed in (0, 1)] if colour else [load_digits("train"), load_digits("test")]
        extractor = FeatureExtractor(network, strategy, 40, str(tmp_path / "partial"))
        real, generated = (extractor(array_images(array), "images") for array in images)
        names = METRICS if network.name != "pixels" else ("fid", "kid", "precision_recall")
        scores = compute_scores(names, network.name, real, generated)
        keys[network.name] = set(scores)
        frechet = "fid" if colour else f"frechet_{network.name}"
        assert scores[frechet] == metrics.frechet_distance(real["features"], generated["features"])
    splits = {"_10_splits", "_10_splits_std", ""}
    assert keys["inception"] == {"fid", "fid_standard_error", "kid", "kid_standard_error", "precision", "recall"} | {
        f"inception_score{suffix}" for suffix in splits
    }
    coverage = {"precision_pixels", "recall_pixels"}
    errors = {"frechet_pixels_standard_error", "kernel_pixels_standard_error"}
    assert keys["pixels"] == {"frechet_pixels", "kernel_pixels"} | errors | coverage
    assert not any("fid" in key or "inception" in key for key in keys["pixels"] | keys["digits"])


def test_too_few_images_and_missing_logits_are_refused():
    check_metrics(METRICS, "digits", 10, 4)
    for names, network, counts, message in (
        (["inception_score"], "pixels", (100, 100), "metrics=inception_score needs a classifier"),
        (["fid"], "inception", (1, 100), "metrics=fid needs at least 2 samples, and there are 1"),
        (["fid", "precision_recall"], "digits", (100, 3), "needs at least 4 real images, and there are 3"),
        (["kid"], "inception", (64, 50_000), "metrics=kid needs at least 98 samples, and there are 64"),
        (["fid", "kid"], "inception", (64, None), "metrics=kid needs the real images, and the reference holds mean"),
    ):
        with pytest.raises(InputError, match=message):
            check_metrics(names, network, *counts)
    few, many = np.random.RandomState(0).standard_normal((98, 8)), np.random.RandomState(1).standard_normal((50_000, 8))
    assert np.isfinite(metrics.kernel_distance(many, few)).all()


def test_notes_say_why_a_score_is_doubtful_or_undefined(tmp_path):
    features = lambda count: {"features": np.random.RandomState(count).standard_normal((count, 64))}
    enough, few, many = features(100), features(64), features(1100)
    singular = "for 64 features: their covariance is singular"
    assert f"64 samples {singular}" in score_notes(METRICS, "digits", enough, few)["frechet_digits"]
    assert f"64 real images {singular}" in score_notes(METRICS, "inception", few, enough)["fid"]
    notes = score_notes(METRICS, "pixels", enough, enough)
    assert list(notes) == ["kernel_pixels_standard_error"] and "more than 1,024 samples" in notes.popitem()[1]
    assert score_notes(METRICS, "digits", many, many) == score_notes(["precision_recall"], "digits", few, few) == {}
    for real, generated in itertools.product((enough, few, many), repeat=2):
        scores = compute_scores(["kid"], "digits", real, generated)
        undefined = "kernel_digits_standard_error" in score_notes(["kid"], "digits", real, generated)
        assert np.isnan(scores["kernel_digits_standard_error"]) == undefined

    workdir = Workdir(tmp_path)
    workdir.write_config(get_preset("digits"), 1437, "")
    checkpoint = checkpoints.save(workdir.checkpoints, 1, {"x": np.asarray(1)})
    scores = {"kernel_digits": 0.5, "kernel_digits_standard_error": float("nan")}
    record_evaluation(
        workdir, checkpoint, {"step": 1}, scores, "kernel_digits", {"kernel_digits_standard_error": "why"}
    )
    line = json.loads((tmp_path / "evaluations.jsonl").read_text())
    assert line["kernel_digits_standard_error"] is None and line["notes"] == {"kernel_digits_standard_error": "why"}


def test_samples_that_overflow_have_no_score(tmp_path):
    strategy, preset = make_strategy("one_device"), get_preset("digits", num_timesteps=4, ch_mult=(1,))
    arrays = TrainState(preset, strategy).to_arrays()
    arrays["ema/conv_in/kernel"] = arrays["ema/conv_in/kernel"] * np.float32(1e25)
    checkpoint = checkpoints.save(str(tmp_path), 7, arrays)
    images = RunSamples(strategy, preset, num_samples=3, batch_size=2, seed=0).of_checkpoint(checkpoint)
    with pytest.raises(NotFiniteError, match=r"samples 0, 1 hold NaN or infinity at t = 3: the network of .*step_0*7"):
        images.pixels(0, 2)


def test_metrics_and_the_deciding_score_have_defaults_and_known_names():
    assert choose_metrics(None, "pixels") == ["fid", "kid", "precision_recall"]
    assert choose_metrics(None, "inception", moments=True) == ["fid", "inception_score"]
    assert choose_metrics(None, "digits") == list(METRICS) and choose_metrics(["kid"], "digits") == ["kid"]
    assert choose_best_by(None, ["kid", "fid"], "digits") == "kernel_digits"
    assert choose_best_by("frechet_digits", ["kid", "fid"], "digits") == "frechet_digits"
    with pytest.raises(ConfigError, match="metrics=is: choose from fid, inception_score"):
        choose_metrics(["is"], "digits")
    with pytest.raises(ConfigError, match="best_by=fid: choose from frechet_digits"):
        choose_best_by("fid", ["fid"], "digits")


def test_nan_in_features_is_refused(tmp_path):
    network = FeatureNetwork("pixels", "none", "none", lambda pixels: {"features": pixels[:, 0, :, 0] / 0.0})
    extractor = FeatureExtractor(network, make_strategy("one_device"), 4, str(tmp_path))
    with pytest.raises(InputError, match=r"pixels features of samples 0, 1, 2, ... \(4 in all\) hold NaN or infinity"):
        extractor(array_images(load_digits()[:8]), "samples")


def test_files_of_samples_are_checked(tmp_path):
    path = str(tmp_path / "samples.npz")
    with pytest.raises(InputError, match="cannot read .*samples.npz"):
        file_images(path, (8, 8, 1))
    for arrays, message in (
        (
            {"images": load_digits()},
            r"holds no array named samples \(there are: images uint8 \(1797, 8, 8, 1\)\), not samples",
        ),
        ({"samples": load_digits() / 255.0}, r"holds float64 \(1797, 8, 8, 1\), not samples uint8 \(N, 8, 8, 1\)"),
        ({"samples": load_digits()[:, :4]}, r"holds uint8 \(1797, 4, 8, 1\)"),
    ):
        write_npz(path, **arrays)
        with pytest.raises(InputError, match=message):
            file_images(path, (8, 8, 1))
    (tmp_path / "samples.npz").write_bytes(b"PK no archive")
    with pytest.raises(InputError, match="samples.npz is not an .npz file, or is damaged"):
        file_images(path, (8, 8, 1))
    write_npz(path, samples=load_digits()[:5])
    assert file_images(path, (8, 8, 1)).count == 5


def test_reference_features_are_computed_once_and_checked(tmp_path):
    strategy, preset = make_strategy("one_device"), get_preset("digits")
    path = str(tmp_path / "reference.npz")
    applied = []

    def apply(pixels):
        applied.append(1)
        return {"features": pixels[:, :, 0, 0]}

    network = FeatureNetwork("pixels", "a1", "none", apply)
    train, test = (source_images(open_source(preset, split), "digits", split, 179) for split in ("train", "test"))
    first = reference_features(FeatureExtractor(network, strategy, 100, str(tmp_path / "p")), test, path)
    traced = len(applied)
    np.testing.assert_array_equal(first["features"], load_digits("test")[:, :, 0, 0])
    again = reference_features(FeatureExtractor(network, strategy, 100, str(tmp_path / "p")), test, path)
    assert len(applied) == traced + 1 and np.array_equal(again["features"], first["features"])  # for its shape
    with pytest.raises(InputError, match=r"reference.npz holds a reference with split test, not train: remove it"):
        reference_features(FeatureExtractor(network, strategy, 100, str(tmp_path / "p")), train, path)
    other = FeatureNetwork("pixels", "b2", "none", apply)
    with pytest.raises(InputError, match="with sha256 a1, not b2: remove it"):
        reference_features(FeatureExtractor(other, strategy, 100, str(tmp_path / "p")), test, path)


def test_a_reference_without_an_array_or_of_other_shapes_is_refused(tmp_path):
    network = FeatureNetwork("pixels", "a1", "none", lambda pixels: {"features": pixels[:, :, 0, 0]})
    extractor = FeatureExtractor(network, make_strategy("one_device"), 10, str(tmp_path / "p"))
    images, path = array_images(load_digits()[:20]), str(tmp_path / "reference.npz")
    sound = reference_features(extractor, images, path)["features"]
    description = np.array(json.dumps(extractor.describe(images)))
    for arrays in (
        {},
        {"logits": sound},
        {"features": sound, "logits": sound},
        {"features": sound[:9]},
        {"features": sound[:, :3]},
        {"features": sound.astype(np.float64)},
        {"features": np.full_like(sound, np.nan)},
    ):
        write_npz(path, **arrays, description=description)
        with pytest.raises(InputError, match=r"it holds .*, not features float32 \(20, 8\): remove it"):
            reference_features(extractor, images, path)
    write_npz(path, features=sound, description=description)
    np.testing.assert_array_equal(reference_features(extractor, images, path)["features"], sound)


@pytest.mark.parametrize(
    "text",
    [
        "[1]",
        "{",
        "{}",
        '{"step": 4, "num_samples": 9, "reference": {"num_images": 9}}',
        '{"step": 4, "num_samples": 9, "reference": {"num_images": 9}, "best_by": "fid"}',
        '{"step": 4, "num_samples": 9, "reference": {"num_images": 9}, "best_by": "fid", "fid": "low"}',
        '{"step": 4, "num_samples": 9, "reference": {"num_images": 9}, "best_by": "fid", "fid": NaN}',
    ],
)
def test_a_damaged_record_of_the_best_checkpoint_is_refused_and_costs_no_result(tmp_path, text):
    workdir = Workdir(tmp_path)
    workdir.write_config(get_preset("digits"), 1437, "")
    write_file(f"{best_folder(workdir)}/evaluation.json", text.encode())
    if '"best_by": "fid"}' not in text:  # a score that was not finite is null, or absent
        with pytest.raises(DamagedFileError, match=r"best/evaluation.json is .*: remove it"):
            read_best(workdir)
    checkpoint = checkpoints.save(workdir.checkpoints, 5, {"x": np.asarray(5)})
    record_evaluation(
        workdir, checkpoint, {"step": 5, "num_samples": 9, "reference": REFERENCE}, {"fid": 1.0}, "fid", {}
    )
    assert [line["fid"] for line in workdir.read_evaluations()] == [1.0]


def test_an_interrupted_extraction_resumes_to_the_same_features(tmp_path):
    preset = get_preset("digits", num_timesteps=4, ch_mult=(1,))
    strategy, network = make_strategy("one_device"), digits_network()
    checkpoint = checkpoints.save(str(tmp_path), 0, TrainState(preset, strategy).to_arrays())
    drawn = []

    def extract(partial, fail_at):
        samples = RunSamples(strategy, preset, num_samples=50, batch_size=20, seed=1).of_checkpoint(checkpoint)

        def pixels(first, count):
            if len(drawn) == fail_at:
                raise KeyboardInterrupt
            drawn.append(first)
            return samples.pixels(first, count)

        images = Images(samples.description, samples.count, pixels)
        return FeatureExtractor(network, strategy, 20, str(tmp_path / partial))(images, "samples")

    whole = extract("whole", 99)
    assert drawn == [0, 20, 40] and len(whole["features"]) == 50
    drawn.clear()
    with pytest.raises(KeyboardInterrupt):
        extract("broken", 2)
    resumed = extract("broken", 99)
    assert drawn == [0, 20, 40]
    for name, array in whole.items():
        np.testing.assert_array_equal(resumed[name], array)
    assert not np.array_equal(whole["pixels"], np.round(whole["pixels"]))  # clipped, but not rounded
    assert whole["pixels"].min() >= 0.0 and whole["pixels"].max() <= 255.0


def test_results_of_different_samplers_and_precisions_are_not_mixed(tmp_path):
    """A line of an earlier version without them means ancestral sampling over all steps, in the run's precision."""
    workdir = Workdir(tmp_path)
    workdir.write_config(get_preset("digits"), 1437, "")
    workdir.append_evaluation({"step": 10, "seed": 0, "num_samples": 100, "reference": REFERENCE, "fid": 1.0})
    (line,) = workdir.read_evaluations()
    described = {
        settings: {"seed": 0, "num_samples": 100, **settings.describe(get_preset("digits"))}
        for settings in (
            SamplerSettings(), SamplerSettings("ancestral", 50), SamplerSettings("ddim", 50),
            SamplerSettings("ddim", 50, eta=0.5), SamplerSettings("ddim", 50, spacing="logsnr"),
        )
    }  # fmt: skip
    assert [is_alike(line, result) for result in described.values()] == [True, False, False, False, False]
    assert [is_alike(line, {"compute_dtype": dtype}) for dtype in ("float32", "bfloat16")] == [True, False]
    strategy, preset = make_strategy("one_device"), get_preset("digits", ch_mult=(1,))
    checkpoint = checkpoints.save(str(tmp_path), 0, TrainState(preset, strategy).to_arrays())
    keys = set()
    for result in described.values():
        assert [other for other in described.values() if is_alike({"step": 1, **other}, result)] == [result]
    for precision, settings in (("float32", None), ("float32", SamplerSettings("ddim", 50)), ("bfloat16", None)):
        other = dataclasses.replace(preset, precision=precision)
        samples = RunSamples(strategy, other, num_samples=8, batch_size=4, seed=0, settings=settings)
        keys.add(json.dumps(samples.of_checkpoint(checkpoint).description))
        scores = {name for metric in METRICS for name in score_names(metric, "inception")}
        assert not scores & samples.sampling.keys()  # a score would replace what describes the samples
    assert len(keys) == 3  # the samples of one are not taken for another's


def test_the_best_checkpoint_is_kept(tmp_path, capsys):
    workdir = Workdir(tmp_path)
    workdir.write_config(get_preset("digits"), 1437, "")
    best = f"{workdir.checkpoints}/best"

    def record(step, score, best_by="fid", num_samples=100):
        checkpoint = checkpoints.save(workdir.checkpoints, step, {"x": np.asarray(step)})
        result = {"step": step, "checkpoint_sha256": checkpoints.load_digest(checkpoint)}
        result |= {"num_samples": num_samples, "reference": REFERENCE}
        record_evaluation(workdir, checkpoint, result, {"fid": score, "inception_score": score}, best_by, {})
        checkpoints.remove_old(workdir.checkpoints, keep=1, keep_every=0)

    for step, fid in ((10, 5.0), (20, 3.0), (30, 4.0)):
        record(step, fid)
    assert checkpoints.all_steps(workdir.checkpoints) == [30]
    assert checkpoints.all_steps(best) == [20]
    assert json.loads((tmp_path / "checkpoints/best/evaluation.json").read_text())["fid"] == 3.0
    step, path = checkpoints.find(workdir.checkpoints, 20)
    assert step == 20 and checkpoints.load(path)["x"] == 20
    assert checkpoints.find(workdir.checkpoints)[0] == 30
    assert [line["step"] for line in workdir.read_evaluations()] == [10, 20, 30]
    # A checkpoint that another measurement chose is kept.
    record(40, 1.0, num_samples=200)
    record(50, 9.0, best_by="inception_score")
    assert checkpoints.all_steps(best) == [20]
    assert "keeps step 20, which another measurement chose" in capsys.readouterr().out
    tf.io.gfile.rmtree(best)
    for step, score in ((60, 7.0), (70, 8.0), (80, 6.0)):  # a higher inception score is better
        record(step, score, best_by="inception_score")
    assert checkpoints.all_steps(best) == [70]
