"""Whether samples copy training images: their distances to these, against those of held-out images.

A network that learned the distribution makes samples that are as far from the training images as new images of the
same kind are. The Mann-Whitney U test compares the two sets of distances, as Meehan, Chaudhuri & Dasgupta (2020, "A
Non-Parametric Test to Detect Data-Copying in Generative Models") do. A few copies among many samples hardly move that
test, so a second one counts the samples that are as near to a training image as the nearest held-out images are.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import scipy.stats

from diffusion_tf.data.source import ImageReader, ImageSource
from diffusion_tf.evaluation.neighbors import nearest_neighbors
from diffusion_tf.progress_bar import progress_bar

_CHUNK = 500  # training images read at once
_SIGNIFICANT = 0.001  # the largest p-value that counts
_NEAREST = 0.01  # the share of held-out images that the near samples are compared with
_MANY = 5.0  # samples copy if this many times as many are near as of held-out images
_CLEAR = 0.6  # least probability that one of a pair is nearer for the sets to differ


@dataclasses.dataclass(frozen=True)
class Neighbors:
    """The nearest training image of each of N images.

    Attributes:
      distances: of their features, float64 [N].
      indices: of the training images, int64 [N].
      is_mirrored: whether the mirrored training image is the nearest, bool [N].
      num_copies: how many images are equal to a training image.
      num_mirrored: how many others are equal to a mirrored one.
    """

    distances: np.ndarray
    indices: np.ndarray
    is_mirrored: np.ndarray
    num_copies: int
    num_mirrored: int

    def images(self, source: ImageSource, order: np.ndarray) -> np.ndarray:
        """The training images beside the images `order`, int [n]; reads the source once for each."""
        reader = ImageReader(source)
        pairs = zip(self.indices[order], self.is_mirrored[order], strict=True)
        return np.stack([reader(int(i), 1)[0][:, :: -1 if mirrored else 1] for i, mirrored in pairs])


def training_neighbors(
    images: np.ndarray,
    source: ImageSource,
    features: Callable[[np.ndarray], np.ndarray],
    *,
    mirrored: bool,
    label: str,
    own: np.ndarray | None = None,
) -> Neighbors:
    """Finds the nearest training image of each image; reads all of them, and shows progress.

    Args:
      images: uint8 [N, H, W, C].
      source: the training images.
      features: maps uint8 [n, H, W, C] to features [n, D], whose Euclidean distance counts.
      mirrored: whether a mirrored training image is one too, as it is if training mirrors images.
      label: what the images are, beside the progress bar.
      own: for training images, the index of each, int [N]: its neighbour is another one.

    Raises:
      InputError: a training image cannot be read.
      NotFiniteError: a feature is not finite.
    """
    reader, count = ImageReader(source), source.num_examples
    places: list[np.ndarray] = []  # of each candidate: its index, and whether it is mirrored
    contents, flipped = _contents(images), _contents(images[:, :, ::-1])
    copied: set[bytes] = set()
    copied_mirrored: set[bytes] = set()

    def candidates() -> Iterator[np.ndarray]:
        for first in progress_bar(range(0, count, _CHUNK), desc=f"neighbours of {label}", unit="chunk"):
            chunk = reader(first, min(_CHUNK, count - first))
            copied.update(set(contents).intersection(there := set(_contents(chunk))))
            copied_mirrored.update(set(flipped).intersection(there))
            for flip in (False, True) if mirrored else (False,):
                places.append(np.stack([np.arange(first, first + len(chunk)), np.full(len(chunk), flip)]))
                yield features(chunk[:, :, ::-1] if flip else chunk)

    # Of a training image, the first two may be itself and its mirror image.
    nearest, distances = nearest_neighbors(features(images), candidates(), 1 if own is None else 3)
    indices, flips = np.concatenate(places, axis=1)[:, nearest]
    first = np.zeros(len(images), int) if own is None else np.argmax(indices != own[:, None], axis=1)
    rows = np.arange(len(images))
    is_copy = np.array([content in copied for content in contents])
    is_mirror = np.array([content in copied_mirrored for content in flipped])
    return Neighbors(
        distances[rows, first],
        indices[rows, first],
        flips[rows, first].astype(bool),
        int(is_copy.sum()),
        int((is_mirror & ~is_copy).sum()),
    )


def _contents(images: np.ndarray) -> list[bytes]:
    return [np.ascontiguousarray(image).tobytes() for image in images]


def compare(samples: np.ndarray, held_out: np.ndarray) -> dict[str, Any]:
    """Compares the distances of samples to the training images with those of held-out images.

    The tests are one-sided and exact or asymptotic for distances in any units. `p_value` is that of the Mann-Whitney U
    test, under the hypothesis that both sets have one distribution, of samples this much nearer; `p_value_farther` of
    samples this much farther. `near_share` is the share of samples that are nearer than the k-th nearest held-out
    image, k being 1% of these; `near_p_value` is the probability of so many, by the hypergeometric distribution.

    Args:
      samples: distances float [N], N >= LEAST_COMPARED.
      held_out: distances float [M], M >= LEAST_COMPARED.

    Returns:
      JSON values: the verdict (`copies`, `nearer`, `farther` or `no copies`), and the numbers that it rests on.
    """
    n, m = len(samples), len(held_out)
    nearer = scipy.stats.mannwhitneyu(samples, held_out, alternative="less")
    farther = scipy.stats.mannwhitneyu(samples, held_out, alternative="greater")
    rank = math.ceil(_NEAREST * m)
    near = int((samples < np.sort(held_out)[rank - 1]).sum())
    # In random order, the near-th sample comes before the rank-th held-out image if the first near + rank - 1 images
    # hold at least so many samples.
    near_p_value = scipy.stats.hypergeom.sf(near - 1, n + m, n, near + rank - 1)
    result = {
        "median_distance": float(np.median(samples)),
        "held_out_median_distance": float(np.median(held_out)),
        "p_value": float(nearer.pvalue),
        "p_value_farther": float(farther.pvalue),
        "probability_nearer": float(1.0 - nearer.statistic / (n * m)),
        "near_share": near / n,
        "near_share_expected": rank / (m + 1),
        "near_p_value": float(near_p_value),
    }
    return {"verdict": _verdict(result), **result}


def _verdict(result: dict[str, Any]) -> str:
    many = result["near_share"] >= _MANY * result["near_share_expected"]
    if many and result["near_p_value"] <= _SIGNIFICANT:
        return "copies"
    if result["p_value"] <= _SIGNIFICANT and result["probability_nearer"] >= _CLEAR:
        return "nearer"
    if result["p_value_farther"] <= _SIGNIFICANT and result["probability_nearer"] <= 1.0 - _CLEAR:
        return "farther"
    return "no copies"


def sentence(result: dict[str, Any]) -> str:
    """What `compare` found, as one sentence."""
    nearer, farther = result["probability_nearer"], 1.0 - result["probability_nearer"]
    match result["verdict"]:
        case "copies":
            return (
                f"The samples copy training pictures: {result['near_share']:.1%} of them are nearer to one than all but"
                f" {result['near_share_expected']:.1%} of held-out pictures are (p = {result['near_p_value']:.2g})."
            )
        case "nearer":
            return (
                f"The samples stay nearer to training pictures than held-out pictures do, in {nearer:.0%} of pairs"
                f" (p = {result['p_value']:.2g}): they vary training pictures, or are smoother than pictures are."
            )
        case "farther":
            return (
                f"The samples do not copy, but are farther from training pictures than held-out pictures are, in"
                f" {farther:.0%} of pairs (p = {result['p_value_farther']:.2g}): they do not look like pictures yet."
            )
        case _:
            return (
                "The samples do not copy training pictures: they are about as far from them as held-out pictures are"
                f" (nearer in {nearer:.0%} of pairs, p = {result['p_value']:.2g})."
            )
