"""The paper's figures of a trained model: for each a picture, and in numbers what it shows.

Times are the paper's: x_t after t steps of noise, x_0 an image, x_T noise.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tqdm

from diffusion_tf import figures
from diffusion_tf.data.source import ImageReader, ImageSource
from diffusion_tf.diffusion_utils import images_to_x, x_to_images, x_to_pixels
from diffusion_tf.evaluation.feature_networks import FeatureNetwork
from diffusion_tf.evaluation.neighbors import nearest_neighbors
from diffusion_tf.evaluation.scores import compute_scores, score_names
from diffusion_tf.rng import CounterRng
from diffusion_tf.runtime.replicas import over_replicas
from diffusion_tf.samplers import ProgressiveSampler, ReverseProcess, draw_samples
from diffusion_tf.storage.files import Arrays
from diffusion_tf.trained_model import TrainedModel

DRAWS = 9  # of one x_t, as in Figure 7
LAMBDAS = tuple(tenth / 10 for tenth in range(11))
_NEIGHBORS = 5
_CHUNK = 200  # training images that are compared at once


@dataclasses.dataclass(frozen=True)
class PaperFigure:
    """A figure.

    Attributes:
      picture: a PNG or a GIF.
      numbers: what it shows, as JSON can hold it.
      explanation: one or two sentences, for people.
    """

    picture: bytes
    numbers: dict[str, Any]
    explanation: str


def _to_images(x: np.ndarray) -> np.ndarray:
    return x_to_images(tf.constant(x)).numpy()


def samples(trained: TrainedModel, *, count: int, batch_size: int, seed: int, caption: str) -> PaperFigure:
    """Uncurated samples 0 .. count - 1 (Figs. 11, 13, 16-19)."""
    images = draw_samples(trained, num_samples=count, batch_size=batch_size, seed=seed)
    picture = figures.captioned_grids({caption: figures.square_grid(images)})
    return PaperFigure(picture, {"num_samples": count, "seed": seed}, "Samples as they come, none chosen.")


def _progressive_sampler(trained: TrainedModel, batch_size: int, seed: int) -> tuple[ProgressiveSampler, list[int]]:
    """A sampler that keeps some ten predictions of x_0, and the t of the x_t that each was made from."""
    num_timesteps = trained.diffusion.num_timesteps
    freq = max(1, num_timesteps // 10)
    sampler = ProgressiveSampler(trained, batch_size=batch_size, seed=seed, include_xstartpred_freq=freq)
    return sampler, [k * freq + 1 for k in range(num_timesteps // freq)]


def progressive(trained: TrainedModel, *, chains: int, batch_size: int, seed: int) -> PaperFigure:
    """The x_0 that is predicted on the way from x_T to x_0, at ten times (Figs. 6, 14)."""
    sampler, times = _progressive_sampler(trained, batch_size, seed)
    batches = [sampler(first) for first in range(0, chains, batch_size)]
    final, predictions = (np.concatenate([batch[i].numpy() for batch in batches])[:chains] for i in range(2))
    # The reverse process goes from the last prediction to the first.
    rows = [_to_images(np.concatenate([row[::-1], last[None]])) for row, last in zip(predictions, final, strict=True)]
    distance = np.sqrt(np.square(predictions - final[:, None]).mean(axis=(0, 2, 3, 4))) * 127.5
    picture = figures.labelled_grid(
        rows,
        row_labels=[f"sample {i}" for i in range(chains)],
        column_labels=[*(f"t={time}" for time in reversed(times)), "x_0"],
        caption="The x_0 that is predicted from x_t, over the reverse process",
    )
    numbers = {"t": times[::-1], "rmse_to_the_sample": distance[::-1].tolist()}
    return PaperFigure(picture, numbers, "What is large appears first, details come last.")


def progressive_quality(
    trained: TrainedModel, network: FeatureNetwork, real: Arrays, *, count: int, batch_size: int, seed: int
) -> PaperFigure:
    """The quality of the predicted x_0 over the reverse process, by `network`'s scores against `real` (Fig. 10)."""
    sampler, times = _progressive_sampler(trained, batch_size, seed)
    outputs_of = _in_batches(network, trained.strategy, batch_size)
    features: list[list[Arrays]] = []  # by time and by batch
    for first in tqdm.trange(0, count, batch_size, desc="samples", unit="batch"):
        _, predictions = sampler(first)
        pixels = x_to_pixels(predictions[: count - first])
        features.append([outputs_of(pixels[:, k]) for k in range(len(times))])
    metrics = ("fid", "inception_score")
    keys = [score_names(metric, network.name)[0] for metric in metrics]
    numbers: dict[str, list] = {"t": times[::-1], **{key: [] for key in keys}}
    for batches in reversed(list(zip(*features, strict=True))):
        joined = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
        scores = compute_scores(metrics, network.name, real, joined)
        for key in keys:
            numbers[key].append(scores[key])
    steps = trained.diffusion.num_timesteps + 1 - np.array(times[::-1])
    panels = [
        figures.Curve(f"{key} of the predicted x_0", "reverse process steps (T - t + 1)", key, steps, np.array(scores))
        for key, scores in numbers.items()
        if key in keys
    ]
    explanation = "The predicted x_0 becomes a good sample late in the reverse process."
    return PaperFigure(figures.curves(panels), {"num_samples": count, **numbers}, explanation)


def _in_batches(
    network: FeatureNetwork, strategy: tf.distribute.Strategy, batch_size: int
) -> Callable[[np.ndarray | tf.Tensor], Arrays]:
    """`network` as a function of pixels [N, H, W, C] in [0, 255] for any N, in the memory of one batch."""
    apply = over_replicas(lambda _, pixels: network.apply(pixels), strategy, batch_size)

    def outputs_of(pixels):
        parts = [apply(0, pixels[i : i + batch_size]) for i in range(0, len(pixels), batch_size)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    return outputs_of


def shared_latents(
    trained: TrainedModel, network: FeatureNetwork | None, *, chains: int, batch_size: int, seed: int
) -> PaperFigure:
    """Draws of p(x_0 | x_t) that share x_t, at t = T, 3/4 T, T/2 and T/4 of one chain (Fig. 7).

    With a classifier the numbers tell how often two draws of one x_t are of the same predicted class, over all chains.
    """
    num_timesteps = trained.diffusion.num_timesteps
    process = ReverseProcess(trained, batch_size=batch_size, seed=seed)
    outputs_of = network and _in_batches(network, trained.strategy, batch_size)
    x_t, before = process.noise(chains), num_timesteps
    rows, shares, times = [], [], [num_timesteps * quarter // 4 for quarter in (4, 3, 2, 1)]
    for row, time in enumerate(times):
        x_t, before = process(x_t, before, time), time
        first = chains * (1 + row * DRAWS)  # each draw has noise of its own
        draws = process(np.repeat(x_t, DRAWS, axis=0), time, 0, first_image=first)
        rows.append(_to_images(np.concatenate([x_t[:1], draws[:DRAWS]])))
        if outputs_of:
            classes = np.argmax(outputs_of(x_to_pixels(draws))["logits"], axis=1).reshape(chains, DRAWS)
            agree = (classes[:, :, None] == classes[:, None, :]).sum(axis=(1, 2)) - DRAWS
            shares.append(float(agree.mean() / (DRAWS * (DRAWS - 1))))
    picture = figures.labelled_grid(
        rows,
        row_labels=[f"t={time}" for time in times],
        column_labels=["x_t", *(f"x_0, {i + 1}" for i in range(DRAWS))],
        caption=f"{DRAWS} draws of x_0 that share x_t",
    )
    numbers: dict[str, Any] = {"t": times, "chains": chains}
    if shares:
        numbers["same_class_share"] = shares
    return PaperFigure(picture, numbers, "The later the chain is split, the more the draws have in common.")


def interpolation(
    trained: TrainedModel,
    source_a: np.ndarray,
    source_b: np.ndarray,
    *,
    times: Sequence[int],
    batch_size: int,
    seed: int,
) -> PaperFigure:
    """Two images uint8 [H, W, C], diffused to t with shared noise, mixed and decoded (Fig. 8; Fig. 9 with many t).

    At t = 0 this is mixing of pixels, exactly.
    """
    noise = CounterRng(seed, 0, 0).normal("interpolation", (1, *source_a.shape))

    def diffused(image, time):
        x_start = images_to_x(tf.constant(image[None]))
        return (trained.diffusion.q_sample(x_start, tf.fill([1], time - 1), noise) if time else x_start).numpy()

    mixed = [
        (1.0 - mix) * diffused(source_a, time) + mix * diffused(source_b, time) for time in times for mix in LAMBDAS
    ]
    process = ReverseProcess(trained, batch_size=batch_size, seed=seed)
    decoded = process(np.concatenate(mixed).astype(np.float32), np.repeat(times, len(LAMBDAS)), 0)
    decoded = decoded.reshape(len(times), len(LAMBDAS), *source_a.shape)
    ends = [np.concatenate([source_a[None], _to_images(row), source_b[None]]) for row in decoded]

    def rmse(x, source):
        return float(np.sqrt(np.square(x - images_to_x(source).numpy()).mean()) * 127.5)

    numbers = {
        "t": list(times),
        "rmse_to_source_a": [rmse(row[0], source_a) for row in decoded],
        "rmse_to_source_b": [rmse(row[-1], source_b) for row in decoded],
        "rmse_between_sources": rmse(images_to_x(source_a), source_b),
    }
    picture = figures.labelled_grid(
        ends,
        row_labels=[f"t={time}" for time in times],
        column_labels=["source", "rec.", *(f"{mix:.1f}" for mix in LAMBDAS[1:-1]), "rec.", "source"],
        caption="Two images, mixed after t steps of the forward process",
    )
    return PaperFigure(picture, numbers, "Little noise mixes pixels; much noise mixes what the images are of.")


def animation(trained: TrainedModel, *, count: int, frames: int, batch_size: int, seed: int) -> PaperFigure:
    """A sampling run as a GIF: x_t of `count` samples at `frames` + 1 times."""
    num_timesteps = trained.diffusion.num_timesteps
    process = ReverseProcess(trained, batch_size=batch_size, seed=seed)
    times = np.unique(np.linspace(num_timesteps, 0, frames + 1).astype(int))[::-1].tolist()
    x_t, grids = process.noise(count), []
    for before, time in zip([num_timesteps, *times[:-1]], times, strict=True):
        x_t = process(x_t, before, time)
        grids.append(figures.square_grid(_to_images(x_t)))
    return PaperFigure(figures.animation(grids, seconds=4.0), {"t": times}, "Sampling, from noise to images.")


def neighbors(
    trained: TrainedModel,
    source: ImageSource,
    network: FeatureNetwork | None,
    *,
    count: int,
    crop: int | None,
    batch_size: int,
    seed: int,
) -> PaperFigure:
    """Samples beside their nearest images of `source`, by pixels and by a network's features (Figs. 12, 15).

    Args:
      trained: the model.
      source: the training images, all of which are searched.
      network: whose features.
      count: how many samples.
      crop: compare pixels of the central crop x crop only, as the paper does for faces; None: of all.
      batch_size: images at once.
      seed: of the samples.
    """
    images = draw_samples(trained, num_samples=count, batch_size=batch_size, seed=seed)
    columns, labels = [images[:, None]], ["sample"]
    numbers: dict[str, Any] = {"num_samples": count, "crop": crop}
    reader = ImageReader(source)

    def found(name: str, featurise: Callable[[np.ndarray], np.ndarray]) -> None:
        chunks = (
            featurise(reader(first, min(_CHUNK, source.num_examples - first)))
            for first in tqdm.trange(0, source.num_examples, _CHUNK, desc=f"neighbours by {name}", unit="chunk")
        )
        indices, distances = nearest_neighbors(featurise(images), chunks, _NEIGHBORS)
        numbers[f"{name}_indices"], numbers[f"{name}_distances"] = indices.tolist(), distances.tolist()
        columns.append(np.stack([[reader(index, 1)[0] for index in row] for row in indices.tolist()]))
        labels.extend(f"{name} {i + 1}" for i in range(_NEIGHBORS))

    found("pixels", lambda part: _central_crop(part, crop).reshape(len(part), -1))
    if network is not None:
        outputs_of = _in_batches(network, trained.strategy, batch_size)
        found(network.name, lambda part: outputs_of(part.astype(np.float32))["features"])
    picture = figures.labelled_grid(
        list(np.concatenate(columns, axis=1)),
        row_labels=[f"{i}" for i in range(count)],
        column_labels=labels,
        caption=f"Samples, and the nearest of {source.num_examples:,} training images ({source.name})",
    )
    return PaperFigure(picture, numbers, "Samples beside their nearest training images: copies would show.")


def _central_crop(images: np.ndarray, crop: int | None) -> np.ndarray:
    if crop is None:
        return images
    top, left = ((side - crop) // 2 for side in images.shape[1:3])
    return images[:, top : top + crop, left : left + crop]
