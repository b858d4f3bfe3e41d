"""The paper's figures for a trained model: each as a picture, and as numbers that say what it shows.

Times are the paper's t: x_t has t steps of noise, x_0 is an image, x_T is noise. The same seed gives the same picture.
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
from diffusion_tf.samplers import ProgressiveSampler, ReverseProcess, Sampler
from diffusion_tf.storage.files import Arrays
from diffusion_tf.trained_model import TrainedModel

SAMPLES_PER_LATENT = 9  # as in Figure 7
LAMBDAS = tuple(tenth / 10 for tenth in range(11))
_NEIGHBORS = 5
_CHUNK = 200  # training images compared at once


@dataclasses.dataclass(frozen=True)
class PaperFigure:
    """A figure.

    Attributes:
      picture: a PNG or a GIF.
      numbers: what the picture shows, in a form that JSON can hold.
      explanation: one or two sentences for the reader.
    """

    picture: bytes
    numbers: dict[str, Any]
    explanation: str


def _to_images(x: np.ndarray) -> np.ndarray:
    return x_to_images(tf.constant(x)).numpy()


def _rmse(x: np.ndarray, y: np.ndarray, axis: tuple[int, ...] | None = None) -> np.ndarray:
    """Root mean squared difference of images in [-1, 1], on the scale [0, 255]."""
    return np.sqrt(np.square(x - y).mean(axis=axis)) * 127.5


def _in_batches(
    network: FeatureNetwork, strategy: tf.distribute.Strategy, batch_size: int
) -> Callable[[np.ndarray | tf.Tensor], Arrays]:
    """A function that applies `network` to pixels [N, H, W, C] in [0, 255] for any N, batch by batch."""
    apply = over_replicas(lambda _, pixels: network.apply(pixels), strategy, batch_size)

    def outputs_of(pixels: np.ndarray | tf.Tensor) -> Arrays:
        batches = [apply(0, pixels[i : i + batch_size]) for i in range(0, len(pixels), batch_size)]
        return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}

    return outputs_of


def samples(trained: TrainedModel, *, count: int, batch_size: int, seed: int, caption: str) -> PaperFigure:
    """Samples 0, 1, ..., not selected, under a caption (Figs. 11, 13, 16-19).

    Args:
      trained: the model.
      count: number of samples.
      batch_size: images computed at once, over all replicas.
      seed: seed of the noise.
      caption: text above the grid.
    """
    images = Sampler(trained, batch_size=batch_size, seed=seed).draw(count)
    picture = figures.captioned_grids({caption: figures.square_grid(images)})
    return PaperFigure(picture, {"num_samples": count, "seed": seed}, "Uncurated samples.")


def animation(trained: TrainedModel, *, count: int, frames: int, batch_size: int, seed: int) -> PaperFigure:
    """Sampling as a GIF: x_t of some samples over the reverse process.

    Args:
      trained: the model.
      count: number of samples.
      frames: number of frames after x_T.
      batch_size: images computed at once, over all replicas.
      seed: seed of the noise.
    """
    num_timesteps = trained.diffusion.num_timesteps
    process = ReverseProcess(trained, batch_size=batch_size, seed=seed)
    times = np.unique(np.linspace(num_timesteps, 0, frames + 1).astype(int))[::-1].tolist()
    x_t, grids = process.noise(count), []
    for before, time in zip([num_timesteps, *times[:-1]], times, strict=True):
        x_t = process(x_t, before, time)
        grids.append(figures.square_grid(_to_images(x_t)))
    return PaperFigure(figures.animation(grids, seconds=4.0), {"t": times}, "Sampling, from noise to images.")


# --- Progressive generation (Section 4.3) ----------------------------------------------------------------------


def _progressive_sampler(trained: TrainedModel, batch_size: int, seed: int) -> tuple[ProgressiveSampler, list[int]]:
    """A sampler that returns about ten predictions of x_0, and the t of the x_t from which it makes each."""
    num_timesteps = trained.diffusion.num_timesteps
    freq = max(1, num_timesteps // 10)
    sampler = ProgressiveSampler(trained, batch_size=batch_size, seed=seed, include_xstartpred_freq=freq)
    return sampler, [k * freq + 1 for k in range(num_timesteps // freq)]


def progressive(trained: TrainedModel, *, chains: int, batch_size: int, seed: int) -> PaperFigure:
    """The x_0 predicted at ten times of the reverse process (Figs. 6, 14).

    Args:
      trained: the model.
      chains: number of samples, one row each.
      batch_size: images computed at once, over all replicas.
      seed: seed of the noise.
    """
    sampler, times = _progressive_sampler(trained, batch_size, seed)
    batches = [sampler(first) for first in range(0, chains, batch_size)]
    final, predictions = (np.concatenate([batch[i].numpy() for batch in batches])[:chains] for i in range(2))
    times, predictions = times[::-1], predictions[:, ::-1]  # in the order of the reverse process
    picture = figures.labelled_grid(
        [_to_images(np.concatenate([row, last[None]])) for row, last in zip(predictions, final, strict=True)],
        row_labels=[f"sample {i}" for i in range(chains)],
        column_labels=[*(f"t={time}" for time in times), "x_0"],
        caption="The x_0 that is predicted from x_t, over the reverse process",
    )
    distance = _rmse(predictions, final[:, None], axis=(0, 2, 3, 4))
    numbers = {"t": times, "rmse_to_the_sample": distance.tolist()}
    return PaperFigure(picture, numbers, "Large features appear first, details last.")


def progressive_quality(
    trained: TrainedModel, network: FeatureNetwork, real: Arrays, *, count: int, batch_size: int, seed: int
) -> PaperFigure:
    """Scores of the predicted x_0 over the reverse process (Fig. 10).

    Args:
      trained: the model.
      network: a classifier; the scores compare its features.
      real: its outputs for the training images.
      count: how many samples.
      batch_size: images computed at once.
      seed: seed of the noise.
    """
    sampler, times = _progressive_sampler(trained, batch_size, seed)
    outputs_of = _in_batches(network, trained.strategy, batch_size)
    features: list[list[Arrays]] = []  # of each batch at each time
    for first in tqdm.trange(0, count, batch_size, desc="samples", unit="batch"):
        _, predictions = sampler(first)
        pixels = x_to_pixels(predictions[: count - first])
        features.append([outputs_of(pixels[:, k]) for k in range(len(times))])
    times = times[::-1]
    metrics = ("fid", "inception_score")
    scores: dict[str, list[float]] = {score_names(metric, network.name)[0]: [] for metric in metrics}
    for batches in reversed(list(zip(*features, strict=True))):
        generated = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
        at_time = compute_scores(metrics, network.name, real, generated)
        for name, values in scores.items():
            values.append(at_time[name])
    steps = trained.diffusion.num_timesteps + 1 - np.array(times)
    panels = [
        figures.Curve(
            f"{name} of the predicted x_0", "reverse process steps (T - t + 1)", name, steps, np.array(values)
        )
        for name, values in scores.items()
    ]
    numbers = {"num_samples": count, "t": times, **scores}
    explanation = "The predicted x_0 becomes a good sample late in the reverse process."
    return PaperFigure(figures.curves(panels), numbers, explanation)


# --- Shared latents and interpolation --------------------------------------------------------------------------


def shared_latents(
    trained: TrainedModel, network: FeatureNetwork | None, *, chains: int, batch_size: int, seed: int
) -> PaperFigure:
    """Samples of p(x_0 | x_t) that share x_t, at t = T, 3/4 T, T/2 and T/4 of a chain (Fig. 7).

    The picture shows the first chain. With a classifier, the numbers say how often two samples that share x_t have the
    same class, over all chains.

    Args:
      trained: the model.
      network: the classifier, or None.
      chains: how many chains.
      batch_size: images computed at once.
      seed: seed of the noise.
    """
    num_timesteps = trained.diffusion.num_timesteps
    process = ReverseProcess(trained, batch_size=batch_size, seed=seed)
    outputs_of = network and _in_batches(network, trained.strategy, batch_size)
    x_t, before = process.noise(chains), num_timesteps
    rows, shares, times = [], [], [num_timesteps * quarter // 4 for quarter in (4, 3, 2, 1)]
    for row, time in enumerate(times):
        x_t, before = process(x_t, before, time), time
        first = chains * (1 + row * SAMPLES_PER_LATENT)  # indices of their own, so each sample has its own noise
        x_start = process(np.repeat(x_t, SAMPLES_PER_LATENT, axis=0), time, 0, first_image=first)
        rows.append(_to_images(np.concatenate([x_t[:1], x_start[:SAMPLES_PER_LATENT]])))
        if outputs_of:
            shares.append(_same_class_share(outputs_of(x_to_pixels(x_start))["logits"]))
    picture = figures.labelled_grid(
        rows,
        row_labels=[f"t={time}" for time in times],
        column_labels=["x_t", *(f"x_0, {i + 1}" for i in range(SAMPLES_PER_LATENT))],
        caption=f"{SAMPLES_PER_LATENT} samples of x_0 that share x_t",
    )
    numbers: dict[str, Any] = {"t": times, "chains": chains}
    if shares:
        numbers["same_class_share"] = shares
    return PaperFigure(picture, numbers, "The later the samples part, the more they have in common.")


def _same_class_share(logits: np.ndarray) -> float:
    """How often two samples of one latent have the same class; logits [latents * SAMPLES_PER_LATENT, classes]."""
    classes = np.argmax(logits, axis=1).reshape(-1, SAMPLES_PER_LATENT)
    same = (classes[:, :, None] == classes[:, None, :]).sum(axis=(1, 2)) - SAMPLES_PER_LATENT
    return float(same.mean() / (SAMPLES_PER_LATENT * (SAMPLES_PER_LATENT - 1)))


def interpolate(
    trained: TrainedModel,
    source_a: np.ndarray,
    source_b: np.ndarray,
    *,
    times: Sequence[int],
    batch_size: int,
    seed: int,
) -> np.ndarray:
    """Diffuses two images to t with the same noise, mixes them, and decodes (Section 4.4).

    At t = 0 it mixes the pixels.

    Args:
      trained: the model.
      source_a: uint8 [H, W, C].
      source_b: uint8 [H, W, C].
      times: the values of t, each in [0, T].
      batch_size: images computed at once.
      seed: seed of the noise.

    Returns:
      The decoded mixes x_0 for each t and each of LAMBDAS, float32 [len(times), 11, H, W, C].
    """
    noise = CounterRng(seed, 0, 0).normal("interpolation", (1, *source_a.shape))

    def diffused(image: np.ndarray, time: int) -> np.ndarray:
        x_start = images_to_x(tf.constant(image[None]))
        return (trained.diffusion.q_sample(x_start, tf.fill([1], time - 1), noise) if time else x_start).numpy()

    mixed = [
        (1.0 - mix) * diffused(source_a, time) + mix * diffused(source_b, time) for time in times for mix in LAMBDAS
    ]
    process = ReverseProcess(trained, batch_size=batch_size, seed=seed)
    decoded = process(np.concatenate(mixed).astype(np.float32), np.repeat(times, len(LAMBDAS)), 0)
    return decoded.reshape(len(times), len(LAMBDAS), *source_a.shape)


def interpolation(
    trained: TrainedModel,
    source_a: np.ndarray,
    source_b: np.ndarray,
    *,
    times: Sequence[int],
    batch_size: int,
    seed: int,
) -> PaperFigure:
    """`interpolate` as a picture with a row for each t (Fig. 8; with many values of t, Fig. 9).

    Args:
      trained: the model.
      source_a: uint8 [H, W, C].
      source_b: uint8 [H, W, C].
      times: steps of noise before mixing, each in [0, T].
      batch_size: images computed at once, over all replicas.
      seed: seed of the noise.
    """
    decoded = interpolate(trained, source_a, source_b, times=times, batch_size=batch_size, seed=seed)
    x_a, x_b = (images_to_x(source).numpy() for source in (source_a, source_b))
    numbers = {
        "t": list(times),
        "rmse_to_source_a": [float(_rmse(row[0], x_a)) for row in decoded],
        "rmse_to_source_b": [float(_rmse(row[-1], x_b)) for row in decoded],
        "rmse_between_sources": float(_rmse(x_a, x_b)),
    }
    picture = figures.labelled_grid(
        [np.concatenate([source_a[None], _to_images(row), source_b[None]]) for row in decoded],
        row_labels=[f"t={time}" for time in times],
        column_labels=["source", "rec.", *(f"{mix:.1f}" for mix in LAMBDAS[1:-1]), "rec.", "source"],
        caption="Two images, mixed after t steps of the forward process",
    )
    return PaperFigure(picture, numbers, "With little noise it mixes pixels, with much noise what the images show.")


# --- Nearest neighbours ----------------------------------------------------------------------------------------


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
    """Samples beside their nearest training images, by pixels and by features of a network (Figs. 12, 15).

    Args:
      trained: the model.
      source: the training images; it searches all of them.
      network: the network of the features, or None for pixels only.
      count: how many samples.
      crop: compare the pixels of the central crop x crop only, as the paper does for faces; None compares all.
      batch_size: images computed at once.
      seed: seed of the noise.
    """
    images = Sampler(trained, batch_size=batch_size, seed=seed).draw(count)
    columns, labels = [images[:, None]], ["sample"]
    numbers: dict[str, Any] = {"num_samples": count, "crop": crop}
    reader = ImageReader(source)

    def add_columns(name: str, featurize: Callable[[np.ndarray], np.ndarray]) -> None:
        chunks = (
            featurize(reader(first, min(_CHUNK, source.num_examples - first)))
            for first in tqdm.trange(0, source.num_examples, _CHUNK, desc=f"neighbours by {name}", unit="chunk")
        )
        indices, distances = nearest_neighbors(featurize(images), chunks, _NEIGHBORS)
        numbers[f"{name}_indices"], numbers[f"{name}_distances"] = indices.tolist(), distances.tolist()
        columns.append(np.stack([[reader(index, 1)[0] for index in row] for row in indices.tolist()]))
        labels.extend(f"{name} {i + 1}" for i in range(_NEIGHBORS))

    add_columns("pixels", lambda chunk: _central_crop(chunk, crop).reshape(len(chunk), -1))
    if network is not None:
        outputs_of = _in_batches(network, trained.strategy, batch_size)
        add_columns(network.name, lambda chunk: outputs_of(chunk.astype(np.float32))["features"])
    picture = figures.labelled_grid(
        list(np.concatenate(columns, axis=1)),
        row_labels=[f"{i}" for i in range(count)],
        column_labels=labels,
        caption=f"Samples, and the nearest of {source.num_examples:,} training images ({source.name})",
    )
    return PaperFigure(picture, numbers, "Copies of training images would show here.")


def _central_crop(images: np.ndarray, crop: int | None) -> np.ndarray:
    if crop is None:
        return images
    top, left = ((side - crop) // 2 for side in images.shape[1:3])
    return images[:, top : top + crop, left : left + crop]
