"""The paper's figures for a trained model: each as a picture, and as numbers that say what it shows.

Times are the paper's t: x_t has t steps of noise, x_0 is an image, x_T is noise. The same seed gives the same picture.
The argument `subject` of each figure is the first line of its caption: it says which model draws the samples, and how.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

from diffusion_tf import figures
from diffusion_tf.conditioning import UNGUIDED, UNLABELLED, Condition
from diffusion_tf.data.source import ImageReader, ImageSource
from diffusion_tf.diffusion_utils import images_to_x, x_to_images, x_to_pixels
from diffusion_tf.evaluation.feature_networks import FeatureNetwork, in_batches
from diffusion_tf.evaluation.neighbors import nearest_neighbors
from diffusion_tf.evaluation.scores import compute_scores, score_names, score_notes
from diffusion_tf.progress_bar import progress_bar
from diffusion_tf.reports.xstart_estimate import XstartEstimate
from diffusion_tf.rng import CounterRng
from diffusion_tf.samplers import ReverseProcess, Sampler
from diffusion_tf.schedules import NoiseSchedule
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


@contextlib.contextmanager
def _reverse_process(
    trained: TrainedModel,
    name: str,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    guidance: float,
    shared_noise: bool = False,
) -> Iterator[ReverseProcess]:
    """A reverse process with a progress bar of `steps`, counted for each image."""
    with progress_bar(total=steps, desc=name, unit="image step", unit_scale=True) as bar:
        yield ReverseProcess(
            trained,
            batch_size=batch_size,
            seed=seed,
            shared_noise=shared_noise,
            on_progress=bar.update,
            guidance=guidance,
        )


def samples(
    trained: TrainedModel,
    *,
    count: int,
    batch_size: int,
    seed: int,
    subject: str,
    condition: Condition = UNGUIDED,
    classes: Sequence[str] = (),
) -> PaperFigure:
    """Samples 0, 1, ..., not selected (Figs. 11, 13, 16-19).

    Args:
      trained: the model.
      count: number of samples.
      batch_size: images computed at once, over all replicas.
      seed: seed of the noise.
      subject: the caption.
      condition: labels and guidance of the samples.
      classes: the names of the classes, if known.
    """
    condition = condition.resolve(trained.preset)
    images = Sampler(trained, batch_size=batch_size, seed=seed, condition=condition).draw(count)
    grid = figures.square_grid(images)
    if trained.preset.num_classes:
        grid, legend = figures.class_grid(images, condition.of_images(0, count), classes)
        subject += f"\n{legend}"
    picture = figures.captioned_grids({subject: grid})
    return PaperFigure(picture, {"num_samples": count, "seed": seed}, "Uncurated samples.")


def animation(
    trained: TrainedModel,
    *,
    count: int,
    frames: int,
    batch_size: int,
    seed: int,
    subject: str,
    condition: Condition = UNGUIDED,
) -> PaperFigure:
    """Sampling as a GIF: x_t of some samples over the reverse process.

    Args:
      trained: the model.
      count: number of samples.
      frames: number of frames after x_T, at most.
      batch_size: images computed at once, over all replicas.
      seed: seed of the noise.
      subject: the first line of the caption.
      condition: labels and guidance of the samples.
    """
    num_timesteps, labels = trained.diffusion.num_timesteps, condition.resolve(trained.preset).of_images(0, count)
    times, grids = animation_times(trained.diffusion.schedule, frames), []
    with _reverse_process(
        trained,
        "animation",
        steps=count * num_timesteps,
        batch_size=batch_size,
        seed=seed,
        guidance=condition.guidance,
    ) as process:
        x_t = process.noise(count)
        for before, time in zip([num_timesteps, *times[:-1]], times, strict=True):
            x_t = process(x_t, before, time, labels=labels)
            grids.append(figures.square_grid(_to_images(x_t)))
    captions = [f"{subject}\nx_t at t = {time}" for time in times]
    return PaperFigure(figures.animation(grids, captions, seconds=4.0), {"t": times}, "Sampling, from noise to images.")


def animation_times(schedule: NoiseSchedule, frames: int) -> list[int]:
    """Times T, ..., 0 between which x_t changes by equal amounts: at most `frames` + 1.

    x_t = cos(a) x_0 + sin(a) noise moves as the angle a = arccos(sqrt(alphas_cumprod)) does. With the paper's schedule
    half of the frames have t < T / 4. Even steps of t would spend half of the time on pictures that look like noise.
    """
    angles = np.arccos(np.append(1.0, schedule.sqrt_alphas_cumprod))  # at t = 0, ..., T
    wanted = np.linspace(angles[-1], 0.0, frames + 1)
    return np.unique(np.abs(angles - wanted[:, None]).argmin(axis=1))[::-1].tolist()


# --- Progressive generation (Section 4.3) ----------------------------------------------------------------------


def _progressive_times(num_timesteps: int) -> list[int]:
    """About ten times of the reverse process, in its order: those of Table 4 if T = 1000."""
    every = max(1, num_timesteps // 10)
    return [k * every + 1 for k in range(num_timesteps // every)][::-1]


def _predictions(
    process: ReverseProcess, count: int, condition: Condition, first_image: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Predictions of x_0 at `_progressive_times` [K, count, H, W, C], and the samples x_0 [count, H, W, C]."""
    labels = condition.resolve(process.trained.preset).of_images(first_image, count)
    before = process.trained.diffusion.num_timesteps
    x_t, predictions = process.noise(count, first_image=first_image), []
    for time in _progressive_times(before):
        x_t, before = process(x_t, before, time, first_image=first_image, labels=labels), time
        predictions.append(process.predict_xstart(x_t, time, labels=labels))
    return np.stack(predictions), np.clip(process(x_t, before, 0, first_image=first_image, labels=labels), -1.0, 1.0)


_ESTIMATE = "x_0 as estimated from x_t: the network's prediction (Eq. 15), shrunk to the mean image by least squares"


def progressive(
    trained: TrainedModel,
    *,
    chains: int,
    batch_size: int,
    seed: int,
    subject: str,
    condition: Condition = UNGUIDED,
) -> PaperFigure:
    """The x_0 estimated at ten times of the reverse process (Figs. 6, 14).

    It draws a whole batch to fit `XstartEstimate`.

    Args:
      trained: the model.
      chains: number of samples, one row each.
      batch_size: images computed at once, over all replicas.
      seed: seed of the noise.
      subject: the first line of the caption.
      condition: labels and guidance of the samples.
    """
    num_timesteps, count = trained.diffusion.num_timesteps, max(chains, batch_size)
    with _reverse_process(
        trained,
        "progressive",
        steps=count * num_timesteps,
        batch_size=batch_size,
        seed=seed,
        guidance=condition.guidance,
    ) as process:
        predictions, final = _predictions(process, count, condition)
    times, estimate = _progressive_times(num_timesteps), XstartEstimate(predictions, final)
    estimates = estimate(predictions)
    columns = np.concatenate([estimates, final[None]])[:, :chains]
    picture = figures.labelled_grid(
        [_to_images(row) for row in columns.swapaxes(0, 1)],
        row_labels=[f"sample {i}" for i in range(chains)],
        column_labels=[*(f"t={time}" for time in times), "x_0"],
        caption=f"{subject}\n{_ESTIMATE}",
    )
    numbers = {
        "t": times,
        "chains": count,
        "weight_of_the_prediction": estimate.weights.tolist(),
        "rmse_to_the_sample": _rmse(estimates, final, axis=(1, 2, 3, 4)).tolist(),
        "rmse_of_the_prediction": _rmse(predictions, final, axis=(1, 2, 3, 4)).tolist(),
    }
    return PaperFigure(picture, numbers, "Large features appear first, details last.")


def progressive_quality(
    trained: TrainedModel,
    network: FeatureNetwork,
    real: Arrays,
    *,
    count: int,
    batch_size: int,
    seed: int,
    subject: str,
    condition: Condition = UNGUIDED,
) -> PaperFigure:
    """Scores of the x_0 estimated over the reverse process (Fig. 10).

    Args:
      trained: the model.
      network: a classifier; the scores compare its features.
      real: its outputs for the training images.
      count: how many samples; the first batch fits `XstartEstimate`.
      batch_size: images computed at once.
      seed: seed of the noise.
      subject: the first line of the caption.
      condition: labels and guidance of the samples.
    """
    num_timesteps = trained.diffusion.num_timesteps
    outputs_of = in_batches(network, trained.strategy, batch_size)
    estimate, features = None, []  # of each batch at each time
    with _reverse_process(
        trained,
        "progressive_quality",
        steps=count * num_timesteps,
        batch_size=batch_size,
        seed=seed,
        guidance=condition.guidance,
    ) as process:
        for first in range(0, count, batch_size):
            predictions, final = _predictions(process, min(batch_size, count - first), condition, first)
            estimate = estimate or XstartEstimate(predictions, final)
            features.append([outputs_of(x_to_pixels(x_start)) for x_start in estimate(predictions)])
    metrics = ("fid", "inception_score")
    scores: dict[str, list[float]] = {score_names(metric, network.name)[0]: [] for metric in metrics}
    for batches in zip(*features, strict=True):
        generated = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
        at_time = compute_scores(metrics, network.name, real, generated)
        for name, values in scores.items():
            values.append(at_time[name])
    times = _progressive_times(num_timesteps)
    steps = num_timesteps + 1 - np.array(times)
    panels = [
        figures.Curve(name, "reverse process steps (T - t + 1)", name, steps, np.array(values))
        for name, values in scores.items()
    ]
    picture = figures.curves(panels, caption=f"{subject}, {count:,} samples\n{_ESTIMATE}")
    assert estimate is not None
    notes = score_notes(metrics, network.name, real, generated)
    for name, note in notes.items():
        logging.warning("%s: %s", name, note)
    weights = estimate.weights.tolist()
    numbers = {"num_samples": count, "t": times, "weight_of_the_prediction": weights, **scores, "notes": notes}
    return PaperFigure(picture, numbers, "The estimated x_0 becomes a good sample late in the reverse process.")


# --- Shared latents and interpolation --------------------------------------------------------------------------


def shared_latents(
    trained: TrainedModel,
    network: FeatureNetwork | None,
    *,
    chains: int,
    batch_size: int,
    seed: int,
    subject: str,
    condition: Condition = UNGUIDED,
) -> PaperFigure:
    """Samples of p(x_0 | x_t) that share x_t, at t = T, 3/4 T, T/2 and T/4 of a chain (Fig. 7).

    Sample i has the same reverse noise for every x_t. The picture shows the first chain. With a classifier, the numbers
    say how often two samples that share x_t have the same class, over all chains.

    Args:
      trained: the model.
      network: the classifier, or None.
      chains: how many chains.
      batch_size: images computed at once.
      seed: seed of the noise.
      subject: the first line of the caption.
      condition: labels and guidance of the samples.
    """
    num_timesteps = trained.diffusion.num_timesteps
    times = [num_timesteps * quarter // 4 for quarter in (4, 3, 2, 1)]
    outputs_of = network and in_batches(network, trained.strategy, batch_size)
    rows, shares = [], []
    steps = chains * (num_timesteps - times[-1] + SAMPLES_PER_LATENT * sum(times))
    labels = condition.resolve(trained.preset).of_images(0, chains)
    with _reverse_process(
        trained, "shared_latents", steps=steps, batch_size=batch_size, seed=seed, guidance=condition.guidance
    ) as process:
        x_t, before = process.noise(chains), num_timesteps
        for time in times:
            x_t, before = process(x_t, before, time, labels=labels), time
            # Indices that no chain has, so that the noise of a sample is not that of its chain.
            latents, of_samples = (np.repeat(array, SAMPLES_PER_LATENT, axis=0) for array in (x_t, labels))
            x_start = process(latents, time, 0, first_image=chains, labels=of_samples)
            rows.append(_to_images(np.concatenate([x_t[:1], x_start[:SAMPLES_PER_LATENT]])))
            if outputs_of:
                shares.append(_same_class_share(outputs_of(x_to_pixels(x_start))["logits"]))
    picture = figures.labelled_grid(
        rows,
        row_labels=[f"t={time}" for time in times],
        column_labels=["x_t", *(f"x_0, {i + 1}" for i in range(SAMPLES_PER_LATENT))],
        caption=f"{subject}\n{SAMPLES_PER_LATENT} samples of x_0 that share x_t",
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


def interpolation_time(schedule: NoiseSchedule, image_shape: tuple[int, int, int]) -> int:
    """The t at which `interpolation` mixes by default: x_t keeps what the image shows, but not its details.

    The multiple of T / 8, but 0, nearest to the step where the signal-to-noise ratio of a pixel is
    (64 / (H * W))^(3/8): large images show the same with more pixels, over which noise averages out. With the paper's
    schedule this is T / 4 for digits and T / 2 for 256x256 images, where the paper mixes them (Figure 8).
    """
    snr = schedule.alphas_cumprod / (1.0 - schedule.alphas_cumprod)
    steps = np.count_nonzero(snr >= (64.0 / math.prod(image_shape[:2])) ** 0.375)
    num_timesteps = schedule.num_timesteps
    return max(1, num_timesteps * max(1, round(8 * steps / num_timesteps)) // 8)


def interpolate(
    trained: TrainedModel,
    source_a: np.ndarray,
    source_b: np.ndarray,
    *,
    times: Sequence[int],
    batch_size: int,
    seed: int,
    condition: Condition = UNLABELLED,
) -> np.ndarray:
    """Diffuses two images to t with the same noise, mixes them, and decodes (Section 4.4).

    All mixes have the same reverse noise too, so that they differ by what is mixed only. At t = 0 it mixes the pixels.

    Args:
      trained: the model.
      source_a: uint8 [H, W, C].
      source_b: uint8 [H, W, C].
      times: the values of t, each in [0, T].
      batch_size: images computed at once.
      seed: seed of the noise.
      condition: the label of all mixes, and guidance; default: no label.

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
    steps = len(LAMBDAS) * sum(times)
    with _reverse_process(
        trained,
        "interpolation",
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        guidance=condition.guidance,
        shared_noise=True,
    ) as process:
        x_t, starts = np.concatenate(mixed).astype(np.float32), np.repeat(times, len(LAMBDAS))
        decoded = process(x_t, starts, 0, labels=condition.labels[0])
    return decoded.reshape(len(times), len(LAMBDAS), *source_a.shape)


def interpolation(
    trained: TrainedModel,
    source_a: np.ndarray,
    source_b: np.ndarray,
    *,
    times: Sequence[int],
    batch_size: int,
    seed: int,
    subject: str,
    condition: Condition = UNLABELLED,
) -> PaperFigure:
    """`interpolate` as a picture with a row for each t (Fig. 8; with many values of t, Fig. 9).

    Args:
      trained: the model.
      source_a: uint8 [H, W, C].
      source_b: uint8 [H, W, C].
      times: steps of noise before mixing, each in [0, T].
      batch_size: images computed at once, over all replicas.
      seed: seed of the noise.
      subject: the first line of the caption.
      condition: as for `interpolate`.
    """
    decoded = interpolate(
        trained, source_a, source_b, times=times, batch_size=batch_size, seed=seed, condition=condition
    )
    x_a, x_b = (images_to_x(source).numpy() for source in (source_a, source_b))
    numbers = {
        "t": list(times),
        "rmse_to_source_a": [float(_rmse(row[0], x_a)) for row in decoded],
        "rmse_to_source_b": [float(_rmse(row[-1], x_b)) for row in decoded],
        "rmse_between_sources": float(_rmse(x_a, x_b)),
        "rmse_between_neighboring_columns": [float(_rmse(row[1:], row[:-1])) for row in decoded],
    }
    picture = figures.labelled_grid(
        [np.concatenate([source_a[None], _to_images(row), source_b[None]]) for row in decoded],
        row_labels=[f"t={time}" for time in times],
        column_labels=["source", "rec.", *(f"{mix:.1f}" for mix in LAMBDAS[1:-1]), "rec.", "source"],
        caption=f"{subject}\nTwo images, mixed after t steps of the forward process; all columns share their noise",
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
    subject: str,
    condition: Condition = UNGUIDED,
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
      subject: the first line of the caption.
      condition: labels and guidance of the samples.
    """
    images = Sampler(trained, batch_size=batch_size, seed=seed, condition=condition).draw(count)
    columns, labels = [images[:, None]], ["sample"]
    numbers: dict[str, Any] = {"num_samples": count, "crop": crop}
    reader = ImageReader(source)

    def add_columns(name: str, featurize: Callable[[np.ndarray], np.ndarray]) -> None:
        chunks = (
            featurize(reader(first, min(_CHUNK, source.num_examples - first)))
            for first in progress_bar(range(0, source.num_examples, _CHUNK), desc=f"neighbours by {name}", unit="chunk")
        )
        indices, distances = nearest_neighbors(featurize(images), chunks, _NEIGHBORS)
        numbers[f"{name}_indices"], numbers[f"{name}_distances"] = indices.tolist(), distances.tolist()
        columns.append(np.stack([[reader(index, 1)[0] for index in row] for row in indices.tolist()]))
        labels.extend(f"{name} {i + 1}" for i in range(_NEIGHBORS))

    add_columns("pixels", lambda chunk: _central_crop(chunk, crop).reshape(len(chunk), -1))
    if network is not None:
        outputs_of = in_batches(network, trained.strategy, batch_size)
        add_columns(network.name, lambda chunk: outputs_of(chunk.astype(np.float32))["features"])
    picture = figures.labelled_grid(
        list(np.concatenate(columns, axis=1)),
        row_labels=[f"{i}" for i in range(count)],
        column_labels=labels,
        caption=f"{subject}\nSamples, and the nearest of {source.num_examples:,} training images ({source.name})",
    )
    return PaperFigure(picture, numbers, "Copies of training images would show here.")


def _central_crop(images: np.ndarray, crop: int | None) -> np.ndarray:
    if crop is None:
        return images
    top, left = ((side - crop) // 2 for side in images.shape[1:3])
    return images[:, top : top + crop, left : left + crop]
