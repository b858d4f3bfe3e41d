"""Sampling loops, each compiled as one loop over timesteps, and the classes that run them for images by their index."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import tensorflow as tf
from numpy.typing import ArrayLike

from diffusion_tf.conditioning import NO_LABEL, UNGUIDED, Condition, labels_of_images
from diffusion_tf.diffusion_utils import DenoiseFn, GaussianDiffusion, images_to_x, x_to_images
from diffusion_tf.errors import ConfigError
from diffusion_tf.progress_bar import progress_bar
from diffusion_tf.rng import CounterRng
from diffusion_tf.runtime.replicas import pad_batch, per_replica_batch_size, shared_batch_size
from diffusion_tf.solvers import (
    SamplerSettings,
    SamplerTable,
    ddim_inversion_table,
    ddim_table,
    sampler_table,
    timesteps,
)
from diffusion_tf.trained_model import TrainedModel

CALLS = 20  # device calls for one batch, between which the progress bar moves

# noise_fn(t) is the standard normal noise [B, H, W, C] of the step at t; noise_fn(T) is x_T itself.
NoiseFn = Callable[[tf.Tensor], tf.Tensor]


# --- Loops: call them inside a tf.function ---------------------------------------------------------------------


def p_sample_loop(
    diffusion: GaussianDiffusion, denoise_fn: DenoiseFn, noise_fn: NoiseFn, *, clip_denoised: bool = True
) -> tf.Tensor:
    """Ancestral sampling (Algorithm 2) as a graph loop of T network evaluations.

    Args:
      diffusion: the process.
      denoise_fn: the network.
      noise_fn: noise_fn(t) is the standard normal noise [B, H, W, C] of the step at t; noise_fn(T) is x_T.
      clip_denoised: clip the predicted x_0 to [-1, 1] in every step.

    Returns:
      x_0 float32 [B, H, W, C]. The last step does not clip it.
    """
    x_T = noise_fn(tf.constant(diffusion.num_timesteps))
    start, stop = (tf.fill([x_T.shape[0]], steps) for steps in (diffusion.num_timesteps, 0))
    return reverse_steps(diffusion, denoise_fn, noise_fn, x_T, start, stop, clip_denoised=clip_denoised)


def reverse_steps(
    diffusion: GaussianDiffusion,
    denoise_fn: DenoiseFn,
    noise_fn: NoiseFn,
    x_t: tf.Tensor,
    start: tf.Tensor,
    stop: tf.Tensor,
    *,
    clip_denoised: bool = True,
) -> tf.Tensor:
    """A stretch of Algorithm 2, for each image its own: from x_t, at the paper's step `start`, to the step `stop`.

    A graph loop of max(start) - min(stop) network evaluations.

    Args:
      diffusion: the process.
      denoise_fn: the network.
      noise_fn: noise_fn(t) is the standard normal noise [B, H, W, C] of the step at t.
      x_t: float32 [B, H, W, C].
      start: int32 [B]: how many steps of noise x_t has, in [0, T].
      stop: int32 [B]: how many the result has, in [0, start]; 0 gives x_0. If stop = start, x_t does not change.
      clip_denoised: clip the predicted x_0 to [-1, 1] in every step.

    Returns:
      float32 [B, H, W, C].
    """

    def body(t: tf.Tensor, x_t: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        x_prev, _ = diffusion.p_sample(
            denoise_fn, x_t, tf.fill([x_t.shape[0]], t), noise_fn(t), clip_denoised=clip_denoised
        )
        active = tf.reshape((t < start) & (t >= stop), [-1, 1, 1, 1])
        return t - 1, tf.where(active, x_prev, x_t)

    last = tf.reduce_min(stop)
    _, x_t = tf.while_loop(lambda t, _: t >= last, body, (tf.reduce_max(start) - 1, x_t))
    return x_t


def table_step(
    diffusion: GaussianDiffusion,
    denoise_fn: DenoiseFn,
    table: SamplerTable,
    i: tf.Tensor,
    x_t: tf.Tensor,
    last_xstart: tf.Tensor,
    noise_fn: NoiseFn,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Step i of a table by one network evaluation: the next x and pred_xstart, each float32 [B, H, W, C].

    Args:
      diffusion: the process.
      denoise_fn: the network.
      table: timesteps and coefficients of the steps.
      i: index of the step, an int32 scalar.
      x_t: float32 [B, H, W, C].
      last_xstart: pred_xstart of step i - 1.
      noise_fn: as in `table_steps`; a deterministic table does not call it.
    """
    t = tf.gather(tf.constant(table.timesteps, tf.int32), i)
    a, b, c, d, s = tf.unstack(tf.gather(tf.constant(table.coefficients, tf.float32), i))
    static = table.clip_sample == "static"
    unclipped = diffusion.p_mean_variance(denoise_fn, x_t, tf.fill([x_t.shape[0]], t), clip_denoised=False).pred_xstart
    pred_xstart = unclipped
    if table.clip_sample != "none":
        pred_xstart = diffusion.clip_xstart(unclipped, dynamic=not static)
    x_t = a * x_t + b * pred_xstart + c * last_xstart
    if table.coefficients[:, 3].any():
        x_t += d * unclipped
    if table.coefficients[:, 4].any():
        x_t += s * noise_fn(t)
    return x_t, pred_xstart


def table_steps(
    diffusion: GaussianDiffusion,
    denoise_fn: DenoiseFn,
    noise_fn: NoiseFn,
    table: SamplerTable,
    x_t: tf.Tensor,
    pred_xstart: tf.Tensor,
    start: tf.Tensor | int,
    stop: tf.Tensor | int,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Steps start, ..., stop - 1 of a table, as a graph loop of stop - start network evaluations.

    Args:
      diffusion: the process.
      denoise_fn: the network.
      noise_fn: noise_fn(t) is the standard normal noise [B, H, W, C] of the step at t.
      table: timesteps and coefficients of the steps.
      x_t: float32 [B, H, W, C].
      pred_xstart: the x_0 predicted in step start - 1, float32 [B, H, W, C]; zeros if start = 0.
      start: the first step, an index into the table.
      stop: the end, at most the table's length.

    Returns:
      x_t and pred_xstart after the last step, each float32 [B, H, W, C]. After all steps of the table, x_t is x_0; the
      last step does not clip it.
    """

    def body(i: tf.Tensor, x_t: tf.Tensor, last_xstart: tf.Tensor) -> tuple[tf.Tensor, ...]:
        return i + 1, *table_step(diffusion, denoise_fn, table, i, x_t, last_xstart, noise_fn)

    _, x_t, pred_xstart = tf.while_loop(lambda i, *_: i < stop, body, (tf.convert_to_tensor(start), x_t, pred_xstart))
    return x_t, pred_xstart


def sample_noise(seed: int | tf.Tensor, first_image: tf.Tensor, shape: Sequence[int]) -> NoiseFn:
    """The noise with which every sampler draws images first_image, first_image + 1, ...; `shape` is [B, H, W, C]."""
    return lambda t: CounterRng(seed, t, first_image).normal("sample", shape)


# --- Samplers: a trained model on the replicas of its strategy -------------------------------------------------


class Sampler:
    """Draws images; image i depends on the seed and i only, and its x_T is the same for every sampler.

    The batch size and the number of replicas decide which images are computed together. Image i differs between them
    only by float rounding.

    Args:
      trained: the network, its weights, and where to run; each replica computes its share of every batch.
      batch_size: images of one call, over all replicas.
      seed: int in [0, 2^32).
      settings: which sampler, in how many steps; default: Algorithm 2 over all steps.
      condition: the labels of the images, and the guidance, which doubles the cost; default: every class in turn.

    Attributes:
      seed: as given; another value takes effect at the next call, which does not compile again.
      condition: as given, with default labels filled in; other labels take effect at the next call, like another seed.
      num_steps: steps of a call: those of the settings, or the last ones if their strength is below 1.
      steps_per_call: steps of one call of the devices; the last one may take fewer.

    Raises:
      ConfigError: the batch size is not divisible by the replicas, or the settings do not fit the process.
    """

    def __init__(
        self,
        trained: TrainedModel,
        *,
        batch_size: int,
        seed: int,
        settings: SamplerSettings | None = None,
        condition: Condition = UNGUIDED,
    ):
        diffusion, settings = trained.diffusion, settings or SamplerSettings()
        table = sampler_table(settings, trained.preset, diffusion)
        shape = (per_replica_batch_size(batch_size, trained.strategy), *trained.preset.image_shape)
        num_steps = settings.last_steps(diffusion.num_timesteps) if table is None else len(table.timesteps)
        self.num_steps = num_steps
        self.steps_per_call = -(-num_steps // CALLS)
        self.seed = seed
        self.condition = condition.resolve(trained.preset)
        self._trained = trained
        self._settings = settings
        self._timesteps = np.arange(num_steps)[::-1] if table is None else table.timesteps
        self._batch_size = batch_size

        def noise(first_image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
            return sample_noise(seed[0], first_image, shape)(tf.constant(diffusion.num_timesteps))

        def steps(
            first_image: tf.Tensor,
            x_t: tf.Tensor,
            pred_xstart: tf.Tensor,
            seed: tf.Tensor,
            labels: tf.Tensor,
            start: tf.Tensor,
            stop: tf.Tensor,
        ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            noise_fn = sample_noise(seed[0], first_image, shape)
            denoise_fn = trained.denoise_fn(labels, condition.guidance)
            if table is None:
                start, stop = (num_steps - steps_done for steps_done in (start, stop))
                x_t = reverse_steps(diffusion, denoise_fn, noise_fn, x_t, start, stop)
            else:
                x_t, pred_xstart = table_steps(
                    diffusion, denoise_fn, noise_fn, table, x_t, pred_xstart, start[0], stop[0]
                )
            return x_t, pred_xstart, tf.reduce_all(tf.math.is_finite(x_t), axis=[1, 2, 3])

        self._noise = trained.over_replicas(noise, batch_size)
        self._steps = trained.over_replicas(steps, batch_size)

    def __call__(self, first_image: int, start_from: np.ndarray | None = None) -> tf.Tensor:
        """Images first_image, ..., first_image + batch_size - 1, float32 [batch_size, H, W, C] in [-1, 1].

        `num_steps` network evaluations. A progress bar appears if they take longer than ten seconds.

        Args:
          first_image: index of the first image.
          start_from: images uint8 [N, H, W, C], N <= batch_size, whose noisy versions the reverse process starts from
            (SDEdit, Meng et al. 2021); default: from x_T, which takes a strength of 1.

        Raises:
          ConfigError: the sampler's strength is below 1, and there are no images to start from.
          NotFiniteError: an image is not finite.
        """
        seed = tf.fill([self._batch_size], tf.constant(self.seed, tf.int64))
        labels = tf.constant(self.condition.of_images(first_image, self._batch_size))
        x_t = self._noise(first_image, seed)
        if start_from is not None:
            x_start = pad_batch(images_to_x(start_from), self._batch_size)
            x_t = self._trained.diffusion.q_sample(x_start, tf.fill([self._batch_size], self._timesteps[0]), x_t)
        elif self._settings.strength < 1:
            raise ConfigError("strength", f"={self._settings.strength} needs images to start from")
        pred_xstart = tf.zeros_like(x_t)
        with progress_bar(total=self.num_steps, unit="step", desc="batch", nested=True) as bar:
            for start in range(0, self.num_steps, self.steps_per_call):
                stop = min(start + self.steps_per_call, self.num_steps)
                steps = (tf.fill([self._batch_size], i) for i in (start, stop))
                x_t, pred_xstart, finite = self._steps(first_image, x_t, pred_xstart, seed, labels, *steps)
                # Reading it waits for the device, so that the bar shows finished steps.
                self._trained.check_finite(finite, "samples", first=first_image, t=self._timesteps[stop - 1])
                bar.update(stop - start)
        return tf.clip_by_value(x_t, -1.0, 1.0)

    def draw(self, num_samples: int, start_from: np.ndarray | None = None) -> np.ndarray:
        """Draws samples 0, ..., num_samples - 1, uint8 [num_samples, H, W, C], with a progress bar.

        `start_from` is that of a call, here with an image for each sample.

        Raises:
          NotFiniteError: a sample is not finite.
        """
        batches = []
        with progress_bar(total=num_samples, unit="sample", desc="sampling") as bar:
            for first in range(0, num_samples, self._batch_size):
                count = min(self._batch_size, num_samples - first)
                given = None if start_from is None else start_from[first : first + count]
                batches.append(self.images(first, count, given))
                bar.update(len(batches[-1]))
        return np.concatenate(batches)

    def images(self, first_image: int, count: int, start_from: np.ndarray | None = None) -> np.ndarray:
        """Samples first_image, ..., first_image + count - 1, uint8 [count, H, W, C], for count <= batch_size.

        `start_from` and the errors are those of a call.
        """
        return x_to_images(self(first_image, start_from)[:count]).numpy()


class ReverseProcess:
    """Runs stretches of the reverse process from any x_t, with the noise that `Sampler` has for the same images.

    Args:
      trained: as in `Sampler`.
      batch_size: images of one call at most, over all replicas.
      seed: as in `Sampler`.
      shared_noise: every image has the noise of image 0, so that results differ by their x_t only.
      on_progress: called with the number of steps done, counted for each image.
      guidance: as in `Condition`; the calls take the labels.

    Raises:
      ConfigError: the batch size is not divisible by the replicas.
    """

    def __init__(
        self,
        trained: TrainedModel,
        *,
        batch_size: int,
        seed: int,
        shared_noise: bool = False,
        on_progress: Callable[[int], object] | None = None,
        guidance: float = 0.0,
    ):
        per_replica_batch_size(batch_size, trained.strategy)
        self.trained = trained
        self.batch_size = batch_size
        self.seed = seed
        self._on_progress = on_progress or (lambda _: None)

        def steps(
            first_image: tf.Tensor, x_t: tf.Tensor, labels: tf.Tensor, start: tf.Tensor, stop: tf.Tensor
        ) -> tf.Tensor:
            first_image, count = (tf.zeros_like(first_image), 1) if shared_noise else (first_image, x_t.shape[0])
            noise_fn = sample_noise(seed, first_image, (count, *x_t.shape[1:]))
            denoise_fn = trained.denoise_fn(labels, guidance)
            return reverse_steps(trained.diffusion, denoise_fn, noise_fn, x_t, start, stop)

        def predict(_: tf.Tensor, x_t: tf.Tensor, labels: tf.Tensor, time: tf.Tensor) -> tf.Tensor:
            denoise_fn = trained.denoise_fn(labels, guidance)
            return trained.diffusion.p_mean_variance(denoise_fn, x_t, time - 1, clip_denoised=True).pred_xstart

        # By batch size.
        self._steps = functools.cache(lambda size: trained.over_replicas(steps, size))
        self._predict = functools.cache(lambda size: trained.over_replicas(predict, size))

    def noise(self, count: int, *, first_image: int = 0) -> np.ndarray:
        """x_T of images first_image, ..., float32 [count, H, W, C]."""
        shape = (count, *self.trained.preset.image_shape)
        return CounterRng(self.seed, self.trained.diffusion.num_timesteps, first_image).normal("sample", shape).numpy()

    def __call__(
        self,
        x_t: np.ndarray,
        start: ArrayLike,
        stop: ArrayLike,
        *,
        first_image: int = 0,
        labels: ArrayLike = NO_LABEL,
    ) -> np.ndarray:
        """Runs `reverse_steps` on any number of images, batch by batch.

        Args:
          x_t: float32 [N, H, W, C].
          start: how many steps of noise x_t has, int or int [N].
          stop: how many the result has, int or int [N].
          first_image: index of the first image, which decides its noise.
          labels: the label of each image, int or int [N].

        Returns:
          float32 [N, H, W, C].

        Raises:
          NotFiniteError: an image is not finite.
        """
        stride = -(-self.trained.diffusion.num_timesteps // CALLS)
        results = []
        for first, count, (x, label, starts, stops) in self._batches(x_t, labels, start, stop):
            for high in range(starts.max(), stops.min(), -stride):
                limits = max(high - stride, stops.min()), high
                spans = [np.clip(steps, *limits) for steps in (starts, stops)]
                x = self._steps(len(x))(first_image + first, x, label, *spans).numpy()
                self.trained.check_finite(x[:count], "samples", first=first_image + first, t=limits[0])
                self._on_progress(int((spans[0] - spans[1])[:count].sum()))
            results.append(x[:count])
        return np.concatenate(results)

    def predict_xstart(self, x_t: np.ndarray, time: ArrayLike, *, labels: ArrayLike = NO_LABEL) -> np.ndarray:
        """The x_0 that the network predicts from x_t, clipped to [-1, 1].

        Args:
          x_t: float32 [N, H, W, C].
          time: how many steps of noise x_t has, in [1, T], int or int [N].
          labels: the label of each image, int or int [N].

        Returns:
          float32 [N, H, W, C].

        Raises:
          NotFiniteError: a prediction is not finite.
        """
        results = []
        for first, count, (x, label, times) in self._batches(x_t, labels, time):
            results.append(self._predict(len(x))(0, x, label, times)[:count].numpy())
            self.trained.check_finite(results[-1], "predicted images", first=first, t=times.max() - 1)
        return np.concatenate(results)

    def _batches(self, x_t: np.ndarray, *numbers: ArrayLike) -> Iterator[tuple[int, int, list[np.ndarray]]]:
        """Yields batches of one size: the index of the first image, their number, and x_t and `numbers` of each."""
        arrays = [x_t, *(np.broadcast_to(np.asarray(n, np.int32), [len(x_t)]) for n in numbers)]
        size = shared_batch_size(-(-len(x_t) // -(-len(x_t) // self.batch_size)), self.trained.strategy)
        for first in range(0, len(x_t), size):
            batch = [array[first : first + size] for array in arrays]
            count = len(batch[0])
            # Pads with copies of the last image: zeros for `stop` would make the loop run down to x_0.
            padding = size - count
            yield first, count, [np.pad(a, [(0, padding)] + [(0, 0)] * (a.ndim - 1), mode="edge") for a in batch]


def ddim_inversion(
    trained: TrainedModel,
    images: np.ndarray,
    *,
    steps: int,
    spacing: str,
    batch_size: int,
    labels: ArrayLike = NO_LABEL,
    guidance: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Runs DDIM backwards from images to latents x_T and forwards again, with a progress bar.

    It adds no noise and does not clip pred_xstart, so the error of the round trip comes from the step size only.
    2 * steps network evaluations for each image.

    Args:
      trained: the network, its weights, and where to run.
      images: uint8 [N, H, W, C].
      steps: network evaluations each way, in [1, T].
      spacing: one of SPACINGS.
      batch_size: images of one call, over all replicas.
      labels: the label of each image, int or int [N].
      guidance: as in `Condition`.

    Returns:
      Latents float32 [N, H, W, C], and the images sampled from them, uint8 [N, H, W, C].

    Raises:
      ConfigError: the batch size is not divisible by the replicas, or the spacing is unknown.
      NotFiniteError: a latent or an image is not finite.
    """
    diffusion = trained.diffusion
    ts = timesteps(diffusion.schedule, steps, spacing)
    tables = [
        dataclasses.replace(table, clip_sample="none")
        for table in (ddim_inversion_table(diffusion.schedule, ts), ddim_table(diffusion.schedule, ts, 0.0))
    ]

    def both_ways(_: tf.Tensor, x: tf.Tensor, labels: tf.Tensor) -> list[tf.Tensor]:
        denoise_fn, results = trained.denoise_fn(labels, guidance), []
        for table in tables:
            x, _ = table_steps(diffusion, denoise_fn, tf.zeros_like, table, x, tf.zeros_like(x), 0, steps)
            results.append(x)
        return results

    invert, batches = trained.over_replicas(both_ways, batch_size), []
    of_images = labels_of_images(labels, len(images))
    for first in progress_bar(range(0, len(images), batch_size), unit="batch", desc="inverting"):
        batch = slice(first, first + batch_size)
        latents, x = invert(first, images_to_x(images[batch]), of_images[batch])
        for values, what in ((latents, "latents"), (x, "samples")):
            trained.check_finite(values, what, first=first)
        batches.append((latents.numpy(), x_to_images(x).numpy()))
    latents, samples = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
    return latents, samples
