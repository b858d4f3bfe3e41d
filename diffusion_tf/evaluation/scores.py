"""Scores a run's samples against real images: samples, features and metrics.

Scores of Inception features have the published names (`fid`, `kid`, `inception_score`). Those of another network are
named after it (`frechet_digits`, `frechet_pixels`), so that nobody mistakes one for the other.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_tf.conditioning import UNGUIDED, Condition
from diffusion_tf.data.source import ImageReader, ImageSource, identity
from diffusion_tf.diffusion_utils import check_finite, x_to_pixels
from diffusion_tf.errors import ConfigError, DamagedFileError, InputError
from diffusion_tf.evaluation import METRICS, metrics
from diffusion_tf.evaluation.feature_networks import FeatureNetwork
from diffusion_tf.evaluation.reference_statistics import Statistics
from diffusion_tf.evaluation.tfgan_eval import classifier_metrics
from diffusion_tf.presets import Preset
from diffusion_tf.runtime.replicas import over_replicas
from diffusion_tf.samplers import Sampler
from diffusion_tf.solvers import SamplerSettings
from diffusion_tf.storage import checkpoints
from diffusion_tf.storage.files import Arrays, listed
from diffusion_tf.storage.json_files import parse_json
from diffusion_tf.storage.npz_files import describe_arrays, read_npz, write_npz
from diffusion_tf.storage.resumable import ResumableBatches
from diffusion_tf.storage.workdir import Workdir
from diffusion_tf.trained_model import TrainedModel, load_ema

# Names by network: only Inception features give a FID.
_NAMES = {
    "inception": {"fid": "fid", "kid": "kid", "inception_score": "inception_score"},
    "digits": {"fid": "frechet_digits", "kid": "kernel_digits", "inception_score": "classifier_score_digits"},
    "pixels": {"fid": "frechet_pixels", "kid": "kernel_pixels"},
}
_SPLITS = 10
_SPLIT_SUFFIXES = (f"_{_SPLITS}_splits", f"_{_SPLITS}_splits_std")
_NEIGHBORS = 3
_NEED_FEATURES = ("kid", "precision_recall")  # of the real images, one by one


@dataclasses.dataclass(frozen=True)
class Images:
    """Images to compare: of a data set, of a file, or samples.

    Attributes:
      description: JSON values that identify the images.
      count: number of images.
      pixels: pixels(first, count) returns the images first .. first + count - 1, [count, H, W, C] in [0, 255], uint8
        or float.
    """

    description: dict[str, Any]
    count: int
    pixels: Callable[[int, int], Any]


def source_images(source: ImageSource, dataset: str, split: str, count: int) -> Images:
    """The first images of a source.

    Args:
      source: the images.
      dataset: the name of their preset.
      split: train or test.
      count: number of images.
    """
    description = {"dataset": dataset, "split": split, "num_images": count, **identity(source)}
    return Images(description, count, ImageReader(source))


def file_images(path: str, image_shape: tuple[int, int, int]) -> Images:
    """The images of an .npz file: `samples`, uint8 [N, H, W, C].

    Raises:
      InputError: the file cannot be read, or holds no images of this shape.
    """
    arrays = read_npz(path)
    images = arrays.pop("samples", None)
    if images is None or images.dtype != np.uint8 or images.shape[1:] != image_shape:
        there = f"no array named samples (there are: {describe_arrays(arrays)})"
        found = there if images is None else f"{images.dtype} {images.shape}"
        raise InputError(f"{path} holds {found}, not samples uint8 {('N', *image_shape)}".replace("'", ""))
    digest = hashlib.sha256(np.ascontiguousarray(images).data).hexdigest()
    description = {"file": os.path.basename(path), "file_sha256": digest, "num_images": len(images)}
    return Images(description, len(images), lambda first, count: images[first : first + count])


class RunSamples:
    """Samples of a run's checkpoints from their EMA weights: clipped, but not rounded to integers.

    Args:
      strategy: where to draw them.
      preset: the run's configuration.
      num_samples: number of samples.
      batch_size: samples drawn at once, over all replicas.
      seed: seed of the samples.
      settings: the sampler; default: ancestral sampling over all steps.
      condition: the labels of the samples, and guidance.

    Attributes:
      sampling: seed, compute dtype, sampler, labels and guidance, as JSON values. Its keys are not names of scores.

    Raises:
      InputError: the batch size is not divisible by the replicas, or the settings do not fit the preset.
    """

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        preset: Preset,
        *,
        num_samples: int,
        batch_size: int,
        seed: int,
        settings: SamplerSettings | None = None,
        condition: Condition = UNGUIDED,
    ):
        self.trained = TrainedModel(preset, strategy)
        self.num_samples = num_samples
        self.sampling = {
            "seed": seed,
            "compute_dtype": preset.precision,
            **(settings or SamplerSettings()).describe(preset),
            **condition.describe(preset),
        }
        self.sampler = Sampler(self.trained, batch_size=batch_size, seed=seed, settings=settings, condition=condition)

    def of_checkpoint(self, path: str) -> Images:
        """The samples of the checkpoint at `path`, drawn when `pixels` is called. Valid until the next call.

        Raises:
          InputError: the file is damaged, or holds another network.
        """
        load_ema(self.trained.model, path)
        self.trained.name = path
        digest = checkpoints.load_digest(path)
        description = {"checkpoint": digest, "num_images": self.num_samples, **self.sampling}
        return Images(description, self.num_samples, lambda first, count: x_to_pixels(self.sampler(first)[:count]))


class FeatureExtractor:
    """Computes the features of images.

    Args:
      network: the network.
      strategy: where it runs.
      batch_size: images computed at once, over all replicas.
      partial: folder that keeps the features of each batch, so that an interrupted extraction can be resumed.

    Raises:
      InputError: the batch size is not divisible by the replicas.
    """

    def __init__(self, network: FeatureNetwork, strategy: tf.distribute.Strategy, batch_size: int, partial: str):
        self.network = network
        self.batch_size = batch_size
        self.partial = partial
        self._apply = over_replicas(lambda _, pixels: network.apply(pixels), strategy, batch_size)

    def describe(self, images: Images | Statistics) -> dict[str, Any]:
        """All that the features of `images` depend on, as JSON values."""
        network = {"features": self.network.name, "sha256": self.network.sha256, "resize": self.network.resize}
        return {**images.description, **network}

    def parts(self, images: Images) -> ResumableBatches:
        """The batches of features of `images` that are on disk."""
        return ResumableBatches(
            self.partial, self.describe(images), num_examples=images.count, batch_size=self.batch_size
        )

    def __call__(self, images: Images, label: str) -> Arrays:
        """Extracts features; shows progress with `label`.

        Returns:
          `features` [N, D]; for a classifier also `logits` [N, classes]; and `pixels` [N, D] if the network's distances
          are those of pixels.

        Raises:
          NotFiniteError: a feature is not finite.
        """

        def compute(first: int, count: int) -> Arrays:
            pixels = tf.cast(images.pixels(first, count), tf.float32)
            arrays = {name: value.numpy() for name, value in self._apply(first, pixels).items()}
            for array in arrays.values():
                check_finite(array, f"{self.network.name} features of {label}", first=first)
            return arrays

        parts = list(self.parts(images).compute(compute, f"{self.network.name} features, {label}"))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def reference_path(workdir: Workdir, network: FeatureNetwork, images: Images | Statistics) -> str:
    """The default path of the file that keeps the features of real images."""
    label = images.description.get("split") or images.description["file_sha256"][:8]
    return os.path.join(workdir.path, f"reference_{network.name}_{label}.npz")


def reference_features(extractor: FeatureExtractor, images: Images, path: str) -> Arrays:
    """The features of real images, read from the file at `path`, or computed and written there if it does not exist.

    Raises:
      InputError: the file holds features of other images, or of another network; the message names the difference.
    """
    description = extractor.describe(images)
    if tf.io.gfile.exists(path):
        arrays = read_npz(path)
        try:
            there = parse_json(str(arrays.pop("description", "{}")), dict, path)
        except DamagedFileError as error:
            raise DamagedFileError(f"{path} is not a reference, or is damaged: remove it") from error
        differing = [name for name in {**there, **description} if there.get(name) != description.get(name)]
        if differing:
            name = differing[0]
            raise InputError(
                f"{path} holds a reference with {name} {there.get(name)}, not {description.get(name)}: remove it, or"
                " choose another file with `reference_cache`"
            )
        _check_reference(path, arrays, extractor.network, images)
        return arrays
    arrays = extractor(images, "real images")
    write_npz(path, **arrays, description=np.array(json.dumps(description)))
    extractor.parts(images).remove()
    return arrays


def _check_reference(path: str, arrays: Arrays, network: FeatureNetwork, images: Images) -> None:
    """Raises DamagedFileError unless a file holds the features that `network` computes of `images`."""
    spec = tf.TensorSpec(images.pixels(0, 1).shape, tf.float32)
    outputs = tf.function(network.apply).get_concrete_function(spec).structured_outputs
    wanted = {name: tf.TensorShape([images.count, output.shape[-1]]) for name, output in outputs.items()}
    valid = arrays.keys() == wanted.keys() and all(
        array.dtype == np.float32 and wanted[name].is_compatible_with(array.shape) and np.isfinite(array).all()
        for name, array in arrays.items()
    )
    if not valid:
        expected = listed(f"{name} float32 {tuple(shape)}" for name, shape in wanted.items())
        raise DamagedFileError(
            f"{path} is not a reference, or is damaged: it holds {describe_arrays(arrays)}, not {expected}: remove it"
        )


def choose_metrics(names: Sequence[str] | None, network: str, moments: bool = False) -> list[str]:
    """The metrics `names`; by default all that the features of `network` allow.

    Args:
      names: names out of METRICS.
      network: name of the feature network.
      moments: whether of the real features only mean and covariance are known.

    Raises:
      ConfigError: a name is unknown.
    """
    for name in names or ():
        if name not in METRICS:
            raise ConfigError("metrics", f"={name}: choose from {', '.join(METRICS)}")
    known = (name for name in METRICS if name in (*_NAMES[network], "precision_recall"))
    return list(names or (name for name in known if not moments or name not in _NEED_FEATURES))


def choose_best_by(best_by: str | None, metrics: Sequence[str], network: str) -> str:
    """The score `best_by` of these metrics; by default the first one.

    Raises:
      ConfigError: the metrics have no such score.
    """
    known = [score_names(metric, network)[0] for metric in metrics]
    if best_by and best_by not in known:
        raise ConfigError("best_by", f"={best_by}: choose from {', '.join(known)}")
    return best_by or known[0]


def check_metrics(names: Sequence[str], network: str, num_samples: int, num_real: int | None) -> None:
    """Checks, before the work, that the metrics can be computed.

    Args:
      names: names out of METRICS.
      network: name of the feature network.
      num_samples: number of samples.
      num_real: number of real images; None if only mean and covariance of their features are known.

    Raises:
      ConfigError: there are too few images for a metric, the network is not a classifier, or the metric needs more than
        mean and covariance.
      InputError: TF-GAN is not installed.
    """
    classifier_metrics()
    if "inception_score" in names and "inception_score" not in _NAMES[network]:
        raise ConfigError("metrics", "=inception_score needs a classifier: `features=inception` or digits")
    if num_real is None and (unknown := [name for name in names if name in _NEED_FEATURES]):
        raise ConfigError(
            "metrics", f"={unknown[0]} needs the real images, and the reference holds mean and covariance only"
        )
    num_real = num_real or num_samples
    # TF-GAN splits both sets into the same number of blocks, each of which needs two images of either set.
    blocks = metrics.kernel_blocks(num_real, num_samples)
    least = {"fid": 2, "kid": 2 * blocks, "inception_score": _SPLITS, "precision_recall": _NEIGHBORS + 1}
    for name in names:
        for count, images in ((num_samples, "samples"), (num_real, "real images")):
            if count < least[name] and (name, images) != ("inception_score", "real images"):
                raise ConfigError("metrics", f"={name} needs at least {least[name]} {images}, and there are {count}")


def score_names(metric: str, network: str) -> tuple[str, ...]:
    """Names of the scores that one of METRICS gives with features of `network`."""
    if metric == "precision_recall":
        space = "" if network == "inception" else "_pixels"
        return f"precision{space}", f"recall{space}"
    name = _NAMES[network][metric]
    errors = ("", "_standard_error")
    suffixes = {"fid": errors, "kid": errors, "inception_score": ("", *_SPLIT_SUFFIXES)}
    return tuple(f"{name}{suffix}" for suffix in suffixes[metric])


def compute_scores(
    names: Sequence[str], network: str, real: Arrays | metrics.Gaussian, generated: Arrays
) -> dict[str, float]:
    """Computes metrics of generated against real features.

    Args:
      names: names out of METRICS.
      network: name of the feature network.
      real: features of the real images, as `FeatureExtractor` returns them; or their distribution, for metrics that
        need no more.
      generated: features of the samples.

    Returns:
      The scores by the names of `score_names`.
    """
    if isinstance(real, metrics.Gaussian):
        gaussian, real = real, {}
    elif "fid" in names:
        gaussian = metrics.Gaussian.fit(real["features"])
    compute: dict[str, Callable[[], tuple[float, ...]]] = {
        # The blocks of the kernel distance and of the jackknife are of consecutive images, which must be random.
        "fid": lambda: (
            metrics.frechet_distance(gaussian, generated["features"]),
            metrics.frechet_standard_error(gaussian, _shuffled(generated["features"])),
        ),
        "kid": lambda: metrics.kernel_distance(_shuffled(real["features"]), _shuffled(generated["features"])),
        "inception_score": lambda: (
            metrics.classifier_score(generated["logits"]),
            *metrics.classifier_score_splits(generated["logits"], _SPLITS),
        ),
        "precision_recall": lambda: metrics.precision_recall(
            *(arrays.get("pixels", arrays["features"]) for arrays in (real, generated)), k=_NEIGHBORS
        ),
    }
    scores: dict[str, float] = {}
    for name in names:
        scores.update(zip(score_names(name, network), compute[name](), strict=True))
    return scores


def score_notes(
    names: Sequence[str], network: str, real: Arrays | metrics.Gaussian, generated: Arrays
) -> dict[str, str]:
    """Why a score is doubtful, or undefined, by its name; the arguments are those of `compute_scores`."""
    num_samples, num_features = generated["features"].shape
    num_real = num_features + 1 if isinstance(real, metrics.Gaussian) else len(real["features"])
    notes = {}
    if "fid" in names:
        distance, error = score_names("fid", network)
        for count, images in ((num_samples, "samples"), (num_real, "real images")):
            if count <= num_features:
                notes[distance] = (
                    f"{count} {images} for {num_features} features: their covariance is singular, which biases the"
                    f" distance; take more than {num_features}"
                )
                break
        if num_samples < 3:
            notes[error] = "undefined: it needs three samples"
    if "kid" in names and metrics.kernel_blocks(num_real, num_samples) == 1:
        notes[score_names("kid", network)[1]] = (
            f"undefined: the distance is that of one block, and its error needs several, which is more than"
            f" {metrics.KERNEL_BLOCK:,} samples or real images"
        )
    return notes


def _shuffled(features: np.ndarray) -> np.ndarray:
    return np.random.default_rng(0).permutation(features)
