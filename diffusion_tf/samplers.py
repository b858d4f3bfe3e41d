"""Sampling loops, each one compiled loop over timesteps, and the `Sampler` that draws image i by its index."""

from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf
import tqdm

from diffusion_tf.diffusion_utils import DenoiseFn, GaussianDiffusion, images_to_x, x_to_images
from diffusion_tf.rng import CounterRng
from diffusion_tf.runtime.replicas import per_replica_batch_size
from diffusion_tf.solvers import (
    SamplerSettings,
    SamplerTable,
    ddim_inversion_table,
    ddim_table,
    sampler_table,
    timesteps,
)
from diffusion_tf.trained_model import TrainedModel

_CALLS = 20  # to the device for one batch, so that progress can be told
_QUIET_SECONDS = 10  # before it is

# noise_fn(t) is the standard normal noise [B, H, W, C] of the step at t; noise_fn(T) is x_T itself.
NoiseFn = Callable[[tf.Tensor], tf.Tensor]


def p_sample_loop(
    diffusion: GaussianDiffusion, denoise_fn: DenoiseFn, noise_fn: NoiseFn, *, clip_denoised: bool = True
) -> tf.Tensor:
    """Ancestral sampling (Algorithm 2): x_0 float32 [B, H, W, C], not clipped at the end.

    A graph loop over T network evaluations; call it inside a tf.function.
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
    """A stretch of Algorithm 2 for each image: from x_t after `start` steps of noise to `stop`, 0 being the image.

    A graph loop over as many network evaluations as the longest stretch spans; call it inside a tf.function.

    Args:
      diffusion: the process.
      denoise_fn: the network.
      noise_fn: noise_fn(t) is the standard normal noise [B, H, W, C] of the step at t.
      x_t: float32 [B, H, W, C].
      start: int32 [B], in the paper's t.
      stop: int32 [B], at most `start`; an image with stop = start stays as it is.
      clip_denoised: clips the predicted x_0 to [-1, 1].
    """

    def body(t, x_t):
        x_prev, _ = diffusion.p_sample(
            denoise_fn, x_t, tf.fill([x_t.shape[0]], t), noise_fn(t), clip_denoised=clip_denoised
        )
        active = tf.reshape((t < start) & (t >= stop), [-1, 1, 1, 1])
        return t - 1, tf.where(active, x_prev, x_t)

    last = tf.reduce_min(stop)
    _, x_t = tf.while_loop(lambda t, _: t >= last, body, (tf.reduce_max(start) - 1, x_t))
    return x_t


def table_steps(
    diffusion: GaussianDiffusion,
    denoise_fn: DenoiseFn,
    noise_fn: NoiseFn,
    table: SamplerTable,
    x_t: tf.Tensor,
    pred_xstart: tf.Tensor,
    start: tf.Tensor | int,
    stop: tf.Tensor | int,
    *,
    clip_denoised: bool = True,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Steps `start` .. `stop` - 1 of a table: x_t and the x_0 predicted last, float32 [B, H, W, C] both.

    A graph loop over that many network evaluations; call it inside a tf.function. After all steps x_t is x_0, not
    clipped at the end. Before the first step `pred_xstart` is not read; give zeros.
    """
    table_timesteps = tf.constant(table.timesteps, tf.int32)
    coefficients = tf.constant(table.coefficients, tf.float32)

    def body(i, x_t, last_xstart):
        t = tf.gather(table_timesteps, i)
        ts = tf.fill([x_t.shape[0]], t)
        pred_xstart = diffusion.p_mean_variance(denoise_fn, x_t, ts, clip_denoised=clip_denoised).pred_xstart
        a, b, c, s = tf.unstack(tf.gather(coefficients, i))
        x_t = a * x_t + b * pred_xstart + c * last_xstart
        if table.coefficients[:, 3].any():
            x_t += s * noise_fn(t)
        return i + 1, x_t, pred_xstart

    _, x_t, pred_xstart = tf.while_loop(lambda i, *_: i < stop, body, (tf.convert_to_tensor(start), x_t, pred_xstart))
    return x_t, pred_xstart


def p_sample_loop_progressive(
    diffusion: GaussianDiffusion,
    denoise_fn: DenoiseFn,
    noise_fn: NoiseFn,
    *,
    include_xstartpred_freq: int,
    clip_denoised: bool = True,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Ancestral sampling that keeps the predictions of x_0 on the way (progressive generation, Section 4.3).

    Returns:
      x_0 [B, H, W, C], and predictions [B, T // include_xstartpred_freq, H, W, C] of which entry k was made at
      t = k * include_xstartpred_freq.
    """
    num_recorded = diffusion.num_timesteps // include_xstartpred_freq

    def body(t, x_t, xstartpreds):
        x_prev, pred_xstart = diffusion.p_sample(
            denoise_fn, x_t, tf.fill([x_t.shape[0]], t), noise_fn(t), clip_denoised=clip_denoised
        )
        # Every t of a slot writes to it, so that the lowest one stays: no branch, and static shapes.
        slot = tf.reshape(tf.range(num_recorded) == t // include_xstartpred_freq, [1, -1, 1, 1, 1])
        return t - 1, x_prev, tf.where(slot, pred_xstart[:, None], xstartpreds)

    last = tf.constant(diffusion.num_timesteps - 1)
    x_T = noise_fn(last + 1)
    xstartpreds = tf.zeros([x_T.shape[0], num_recorded, *x_T.shape[1:]])
    _, x_start, xstartpreds = tf.while_loop(lambda t, *_: t >= 0, body, (last, x_T, xstartpreds))
    return x_start, xstartpreds


def sample_noise(seed: int, first_image: tf.Tensor, shape: Sequence[int]) -> NoiseFn:
    """The noise [B, H, W, C] of images first_image ..., whoever samples them."""
    return lambda t: CounterRng(seed, t, first_image).normal("sample", shape)


def draw(diffusion: GaussianDiffusion, denoise_fn: DenoiseFn, noise_fn: NoiseFn) -> tf.Tensor:
    """What `Sampler` draws by Algorithm 2: x_0 float32 [B, H, W, C], clipped to [-1, 1]."""
    return tf.clip_by_value(p_sample_loop(diffusion, denoise_fn, noise_fn), -1.0, 1.0)


class Sampler:
    """Draws images; image i is a function of the seed and i alone, and its x_T is the same for every sampler.

    The batch size and the number of replicas only decide which images are computed together: image i differs
    between them by float rounding.

    Args:
      trained: the network, its weights, and where to run; every replica computes its share of each batch.
      batch_size: images of one call, over all replicas.
      seed: int in [0, 2^32).
      settings: which sampler, in how many steps; default: ancestral sampling over all steps (Algorithm 2).

    Raises:
      InputError: the batch size is not divisible by the replicas, or the settings do not fit the process.
    """

    def __init__(self, trained: TrainedModel, *, batch_size: int, seed: int, settings: SamplerSettings | None = None):
        diffusion = trained.diffusion
        table = sampler_table(settings or SamplerSettings(), trained.preset, diffusion)
        shape = (per_replica_batch_size(batch_size, trained.strategy), *trained.preset.image_shape)
        self.num_steps = diffusion.num_timesteps if table is None else len(table.timesteps)
        self._batch_size = batch_size

        def noise(first_image):
            return sample_noise(seed, first_image, shape)(tf.constant(diffusion.num_timesteps))

        def steps(first_image, x_t, pred_xstart, start, stop):
            noise_fn, denoise_fn = sample_noise(seed, first_image, shape), trained.denoise_fn()
            if table is None:
                start, stop = (diffusion.num_timesteps - steps_done for steps_done in (start, stop))
                return reverse_steps(diffusion, denoise_fn, noise_fn, x_t, start, stop), pred_xstart
            return table_steps(diffusion, denoise_fn, noise_fn, table, x_t, pred_xstart, start[0], stop[0])

        self._noise = trained.over_replicas(noise, batch_size)
        self._steps = trained.over_replicas(steps, batch_size)

    def __call__(self, first_image: int) -> tf.Tensor:
        """Images first_image .. first_image + batch_size - 1, float32 [batch_size, H, W, C] in [-1, 1].

        Shows progress over the steps where it takes long.
        """
        x_t = self._noise(first_image)
        pred_xstart = tf.zeros_like(x_t)
        stride = -(-self.num_steps // _CALLS)
        with tqdm.tqdm(total=self.num_steps, unit="step", desc="batch", leave=False, delay=_QUIET_SECONDS) as bar:
            for start in range(0, self.num_steps, stride):
                stop = min(start + stride, self.num_steps)
                steps = (tf.fill([self._batch_size], i) for i in (start, stop))
                x_t, pred_xstart = self._steps(first_image, x_t, pred_xstart, *steps)
                x_t[:1].numpy()  # waits for the device, which is what the bar tells
                bar.update(stop - start)
        return tf.clip_by_value(x_t, -1.0, 1.0)


class ProgressiveSampler:
    """The images of `Sampler`, and the x_0 that the network predicted on the way to them (progressive generation).

    Args:
      trained, batch_size, seed: as of `Sampler`.
      include_xstartpred_freq: steps between the predictions that are kept.

    Raises:
      InputError: the batch size is not divisible by the replicas.
    """

    def __init__(self, trained: TrainedModel, *, batch_size: int, seed: int, include_xstartpred_freq: int):
        shape = (per_replica_batch_size(batch_size, trained.strategy), *trained.preset.image_shape)

        def sample(first_image):
            noise_fn = sample_noise(seed, first_image, shape)
            x_start, xstartpreds = p_sample_loop_progressive(
                trained.diffusion, trained.denoise_fn(), noise_fn, include_xstartpred_freq=include_xstartpred_freq
            )
            return tf.clip_by_value(x_start, -1.0, 1.0), xstartpreds

        self._sample = trained.over_replicas(sample, batch_size)

    def __call__(self, first_image: int) -> tuple[tf.Tensor, tf.Tensor]:
        """Images first_image ... float32 [batch_size, H, W, C] in [-1, 1], and predictions [batch_size, K, H, W, C].

        Prediction k was made at t = k * include_xstartpred_freq.
        """
        return self._sample(first_image)


class ReverseProcess:
    """Stretches of the reverse process from any x_t; the noise of image i is a function of the seed and i alone.

    Args:
      trained, batch_size, seed: as of `Sampler`, whose chains these are.

    Raises:
      InputError: the batch size is not divisible by the replicas.
    """

    def __init__(self, trained: TrainedModel, *, batch_size: int, seed: int):
        self.trained = trained
        self.batch_size = batch_size
        self.seed = seed

        def steps(first_image, x_t, start, stop):
            noise_fn = sample_noise(seed, first_image, x_t.shape)
            return reverse_steps(trained.diffusion, trained.denoise_fn(), noise_fn, x_t, start, stop)

        self._steps = trained.over_replicas(steps, batch_size)

    def noise(self, count: int) -> np.ndarray:
        """x_T of images 0 .. count - 1, float32 [count, H, W, C]."""
        shape = (count, *self.trained.preset.image_shape)
        return CounterRng(self.seed, self.trained.diffusion.num_timesteps, 0).normal("sample", shape).numpy()

    def __call__(self, x_t: np.ndarray, start, stop, *, first_image: int = 0) -> np.ndarray:
        """`reverse_steps` of x_t [N, H, W, C] for images first_image ...; start and stop are int, or int [N]."""
        start, stop = (np.broadcast_to(np.asarray(steps, np.int32), [len(x_t)]) for steps in (start, stop))
        batches = []
        for i in range(0, len(x_t), self.batch_size):
            parts = [array[i : i + self.batch_size] for array in (x_t, start, stop)]
            count = len(parts[0])
            # Filled up with its last image, whose stretch the loop spans anyway; zeros would make it run to the end.
            fill = self.batch_size - count
            parts = [np.pad(part, [(0, fill)] + [(0, 0)] * (part.ndim - 1), mode="edge") for part in parts]
            batches.append(self._steps(first_image + i, *parts)[:count].numpy())
        return np.concatenate(batches)


def draw_samples(
    trained: TrainedModel, *, num_samples: int, batch_size: int, seed: int, settings: SamplerSettings | None = None
) -> np.ndarray:
    """Samples 0 .. num_samples - 1 of `Sampler`, uint8 [num_samples, H, W, C]; shows progress.

    Raises:
      InputError: the batch size is not divisible by the replicas, or the settings do not fit the process.
    """
    sampler = Sampler(trained, batch_size=batch_size, seed=seed, settings=settings)
    batches = []
    with tqdm.tqdm(total=num_samples, unit="sample", desc="sampling") as bar:
        for first in range(0, num_samples, batch_size):
            batches.append(x_to_images(sampler(first)[: num_samples - first]).numpy())
            bar.update(len(batches[-1]))
    return np.concatenate(batches)


def encode_and_decode(
    trained: TrainedModel, images: np.ndarray, *, steps: int, spacing: str, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """DDIM inversion: images to latents x_T, and those back to images, in `steps` network evaluations each way.

    No noise is added and no pred_xstart clipped, so that the way back is the inverse but for the size of the steps.

    Args:
      trained: the network, its weights, and where to run.
      images: uint8 [N, H, W, C].
      steps: in [1, T].
      spacing: one of SPACINGS.
      batch_size: images of one call, over all replicas.

    Returns:
      Latents float32 [N, H, W, C], and the images that they decode to, uint8 [N, H, W, C]; shows progress.

    Raises:
      InputError: the batch size is not divisible by the replicas, or the spacing is unknown.
    """
    diffusion = trained.diffusion
    ts = timesteps(diffusion.schedule, steps, spacing)
    tables = ddim_inversion_table(diffusion.schedule, ts), ddim_table(diffusion.schedule, ts, 0.0)

    def both_ways(_, x):
        denoise_fn, results = trained.denoise_fn(), []
        for table in tables:
            x, _ = table_steps(
                diffusion, denoise_fn, tf.zeros_like, table, x, tf.zeros_like(x), 0, steps, clip_denoised=False
            )
            results.append(x)
        return results

    call, batches = trained.over_replicas(both_ways, batch_size), []
    for first in tqdm.trange(0, len(images), batch_size, unit="batch", desc="encoding"):
        latents, x = call(first, images_to_x(images[first : first + batch_size]))
        batches.append((latents.numpy(), x_to_images(x).numpy()))
    latents, decoded = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    return latents, decoded
