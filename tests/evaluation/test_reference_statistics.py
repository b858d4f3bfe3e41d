"""Published statistics stand for the images of which they are, and what cannot be compared is refused or said."""

import pickle

import numpy as np
import pytest

from diffusion_tf.errors import DamagedFileError, InputError
from diffusion_tf.evaluation.feature_networks import pixels_network
from diffusion_tf.evaluation.metrics import frechet_distance
from diffusion_tf.evaluation.reference_statistics import check_size, convention_note, read_statistics
from diffusion_tf.evaluation.scores import compute_scores
from diffusion_tf.storage.npz_files import write_npz

REAL = np.random.RandomState(0).standard_normal((90, 12))
SOUND = {"mu": REAL.mean(axis=0), "sigma": np.cov(REAL.T)}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_statistics_give_the_distance_of_their_images(dtype, tmp_path):
    path = str(tmp_path / "virtual.npz")
    others = {"mu_s": np.zeros(3), "arr_0": np.zeros((2, 4, 4, 3), np.uint8)}  # as guided diffusion's files have
    write_npz(path, **{name: array.astype(dtype) for name, array in SOUND.items()}, **others)
    statistics = read_statistics(path)
    generated = {"features": np.random.RandomState(1).standard_normal((70, 12)) + 0.3}
    scores = compute_scores(["fid"], "inception", statistics.gaussian, generated)
    assert scores["fid"] == pytest.approx(frechet_distance(REAL, generated["features"]), rel=1e-5)
    assert scores == pytest.approx(compute_scores(["fid"], "inception", {"features": REAL}, generated), rel=1e-4)
    assert statistics.description["file"] == "virtual.npz" and "num_images" not in statistics.description


def test_a_covariance_of_dependent_features_is_taken(tmp_path):
    """Fewer images than features, and rounding, give eigenvalues below zero."""
    real = REAL[:5].astype(np.float32)
    write_npz(str(tmp_path / "x.npz"), mu=real.mean(axis=0), sigma=np.cov(real.T).astype(np.float32))
    gaussian = read_statistics(str(tmp_path / "x.npz")).gaussian
    assert frechet_distance(gaussian, REAL) == pytest.approx(frechet_distance(real, REAL), rel=1e-3)


def test_files_that_are_no_statistics_are_refused(tmp_path):
    path = tmp_path / "x.npz"
    with pytest.raises(InputError, match="cannot read .*x.npz"):
        read_statistics(str(path))
    write_npz(str(path), samples=np.zeros(3))
    assert read_statistics(str(path)) is None
    nan, skewed = SOUND["sigma"].copy(), SOUND["sigma"].copy()
    nan[3, 3], skewed[2, 5] = np.nan, 0.5
    for changed, message in (
        ({"mu": None}, r"x.npz holds sigma float64 \(12, 12\), not mu \(D,\) and sigma \(D, D\)"),
        ({"mu": SOUND["mu"][:9]}, "not mu .D,. and sigma .D, D."),
        ({"mu": SOUND["mu"].astype(int)}, "not mu .D,. and sigma .D, D.*, float32 or float64"),
        ({"sigma": nan}, "x.npz is damaged: its mu or sigma holds NaN or infinity"),
        ({"sigma": skewed}, "x.npz is damaged: its sigma is not symmetric"),
        ({"sigma": -np.eye(12)}, "x.npz is damaged: its sigma is no covariance .covariance has the eigenvalue -1"),
    ):
        write_npz(str(path), **{name: array for name, array in {**SOUND, **changed}.items() if array is not None})
        with pytest.raises(DamagedFileError, match=message):
            read_statistics(str(path))
    path.write_bytes(pickle.dumps({"fid": SOUND}))
    with pytest.raises(DamagedFileError, match="x.npz is a pickle, which may run code: give its arrays mu"):
        read_statistics(str(path))


def test_statistics_of_another_number_of_features_are_refused_by_name(tmp_path):
    path = str(tmp_path / "fid_stats.npz")
    write_npz(path, **SOUND)
    check_size(read_statistics(path), pixels_network((2, 2, 3)), (2, 2, 3))
    with pytest.raises(InputError, match="fid_stats.npz holds statistics of 12 features, and pixels computes 27: give"):
        check_size(read_statistics(path), pixels_network((3, 3, 3)), (3, 3, 3))


def test_notes_say_what_differs_from_published_values():
    cifar10 = {"dataset": "cifar10", "split": "train", "num_images": 50_000, "resize": "TF1 bilinear to 299"}
    assert convention_note(cifar10, 50_000) == ""
    for changed, num_samples, message in (
        ({}, 5_000, "5,000 samples, where published values take 50,000 (fewer give a higher distance)"),
        ({"split": "test"}, 50_000, "real images of the test split, where published values take train"),
        ({"num_images": 10_000}, 50_000, "10,000 real images, where published values take 50,000"),
        (
            {"resize": "PyTorch bilinear to 299"},
            50_000,
            "resized by PyTorch bilinear to 299, where the paper",
        ),
    ):
        note = convention_note({**cifar10, **changed}, num_samples)
        assert note.startswith(message) and ";" not in note
    file = {"file": "stats.npz", "resize": "PyTorch bilinear to 299"}
    assert "stats.npz does not say of which images, how many, and with which resize" in convention_note(file, 50_000)
