"""Inpainting by RePaint (Lugmayr et al. 2022): painting a part of given images with any trained network."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_tf.conditioning import UNGUIDED, Condition
from diffusion_tf.diffusion_utils import DenoiseFn, GaussianDiffusion, images_to_x, x_to_images
from diffusion_tf.errors import ConfigError
from diffusion_tf.progress_bar import progress_bar
from diffusion_tf.rng import CounterRng
from diffusion_tf.runtime.replicas import per_replica_batch_size
from diffusion_tf.samplers import CALLS, table_step
from diffusion_tf.solvers import (
    JUMP_LENGTH,
    RESAMPLINGS,
    RepaintTable,
    SamplerSettings,
    SamplerTable,
    repaint_settings,
    repaint_table,
    sampler_table,
)
from diffusion_tf.trained_model import TrainedModel

# noise_fn(stream, left) is standard normal noise [B, H, W, C], a different one for each stream and each number of
# network evaluations that are left.
RepaintNoiseFn = Callable[[str, tf.Tensor], tf.Tensor]


def repaint_steps(
    diffusion: GaussianDiffusion,
    denoise_fn: DenoiseFn,
    noise_fn: RepaintNoiseFn,
    sampler: SamplerTable | None,
    table: RepaintTable,
    x_t: tf.Tensor,
    x_start: tf.Tensor,
    painted: tf.Tensor,
    start: tf.Tensor | int,
    stop: tf.Tensor | int,
    *,
    clip_denoised: bool = True,
) -> tf.Tensor:
    """Network evaluations start, ..., stop - 1 of RePaint (Algorithm 1), as a graph loop.

    After each step, the known pixels are drawn from q(x_{t-1} | x_0) and the others from p(x_{t-1} | x_t); then the
    table may jump back by adding noise to both.

    Args:
      diffusion: the process.
      denoise_fn: the network.
      noise_fn: the noise of the streams `sample` (of p), `known` (of q) and `jump`.
      sampler: the sampler's steps, each from what the step before gave alone; None: Algorithm 2.
      table: which of these steps each evaluation takes, and the jumps.
      x_t: float32 [B, H, W, C].
      x_start: the images whose pixels are known, float32 [B, H, W, C].
      painted: bool [B, H, W, 1]: which pixels are not known.
      start: the first evaluation.
      stop: the end, at most the table's length.
      clip_denoised: clip the predicted x_0 of Algorithm 2 to [-1, 1] in every step; a sampler has its own way.

    Returns:
      float32 [B, H, W, C]; after the last evaluation it is x_0, with the known pixels as in `x_start`.
    """
    num_evaluations = len(table.steps)
    steps = tf.constant(table.steps, tf.int32)
    ends, jumps = (tf.constant(values, tf.float32) for values in (table.ends, table.jumps))

    def step(i: tf.Tensor, x_t: tf.Tensor, noise: tf.Tensor) -> tf.Tensor:
        """Step i of the sampler."""
        if sampler is not None:
            return table_step(diffusion, denoise_fn, sampler, i, x_t, tf.zeros_like(x_t), lambda _: noise)[0]
        t = tf.fill([x_t.shape[0]], diffusion.num_timesteps - 1 - i)
        return diffusion.p_sample(denoise_fn, x_t, t, noise, clip_denoised=clip_denoised)[0]

    def body(i: tf.Tensor, x_t: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        left = num_evaluations - 1 - i
        x_prev = step(tf.gather(steps, i), x_t, noise_fn("sample", left))
        end, jump = tf.gather(ends, i), tf.gather(jumps, i)
        known = tf.sqrt(end) * x_start + tf.sqrt(1.0 - end) * noise_fn("known", left)
        x_prev = tf.where(painted, x_prev, known)
        if (table.jumps != 1.0).any():
            x_prev = tf.sqrt(jump) * x_prev + tf.sqrt(1.0 - jump) * noise_fn("jump", left)
        return i + 1, x_prev

    _, x_t = tf.while_loop(lambda i, _: i < stop, body, (tf.convert_to_tensor(start), x_t))
    return x_t


class Inpainter:
    """Paints the masked part of images; the other pixels stay as they are, byte for byte.

    Picture i of a run is a function of the weights, the image, the mask, the seed and i. The batch size and the number
    of replicas change it by float rounding only. With everything painted and without resampling it is sample i.

    Args:
      trained: the network, its weights, and where to run; each replica computes its share of every batch.
      batch_size: images of one call at most, over all replicas.
      seed: int in [0, 2^32).
      settings: which sampler, in how many steps; default: Algorithm 2 in 100 steps.
      condition: as in `Sampler`.
      resamplings: how often each step is taken, the paper's r. More of them fit what is painted to what is known, and
        cost as many times the network evaluations.
      jump_length: how many steps a jump takes back, the paper's j.

    Attributes:
      num_evaluations: network evaluations of a call, about `resamplings` times the steps.

    Raises:
      ConfigError: the batch size is not divisible by the replicas, a setting does not fit the process, or the sampler
        needs more than the step before.
    """

    def __init__(
        self,
        trained: TrainedModel,
        *,
        batch_size: int,
        seed: int,
        settings: SamplerSettings | None = None,
        condition: Condition = UNGUIDED,
        resamplings: int = RESAMPLINGS,
        jump_length: int = JUMP_LENGTH,
    ):
        diffusion = trained.diffusion
        settings = repaint_settings(settings or SamplerSettings(), trained.preset)
        sampler = sampler_table(settings, trained.preset, diffusion)
        if sampler is not None and sampler.coefficients[:, 2].any():
            raise ConfigError(
                "sampler",
                f"={settings.name} uses the step before, and a jump has none: inpaint with ancestral or ddim",
            )
        self._timesteps = np.arange(diffusion.num_timesteps)[::-1] if sampler is None else sampler.timesteps
        self._table = repaint_table(
            diffusion.schedule, self._timesteps, resamplings=resamplings, jump_length=jump_length
        )
        self.num_evaluations = len(self._table.steps)
        self._trained = trained
        self._condition = condition.resolve(trained.preset)
        self._seed = seed
        self._shape = (per_replica_batch_size(batch_size, trained.strategy), *trained.preset.image_shape)

        def steps(
            first_image: tf.Tensor,
            x_t: tf.Tensor,
            x_start: tf.Tensor,
            painted: tf.Tensor,
            labels: tf.Tensor,
            start: tf.Tensor,
            stop: tf.Tensor,
        ) -> tuple[tf.Tensor, tf.Tensor]:
            noise_fn = functools.partial(self._noise, first_image, self._shape)
            denoise_fn = trained.denoise_fn(labels, condition.guidance)
            x_t = repaint_steps(
                diffusion, denoise_fn, noise_fn, sampler, self._table, x_t, x_start, painted, start[0], stop[0]
            )
            return x_t, tf.reduce_all(tf.math.is_finite(x_t), axis=[1, 2, 3])

        self._steps = trained.over_replicas(steps, batch_size)

    def _noise(self, first_image: Any, shape: Sequence[int], stream: str, left: Any) -> tf.Tensor:
        """A `RepaintNoiseFn` of the images first_image, ..., when its first two arguments are given."""
        return CounterRng(self._seed, left, first_image).normal(stream, shape)

    def __call__(self, images: np.ndarray, painted: np.ndarray, *, first_image: int = 0) -> np.ndarray:
        """Paints images; a progress bar appears if that takes longer than ten seconds.

        Args:
          images: uint8 [N, H, W, C], N at most the batch size.
          painted: bool [N, H, W, 1]: which pixels to paint.
          first_image: index of the first image, which decides its noise.

        Returns:
          uint8 [N, H, W, C].

        Raises:
          NotFiniteError: an image is not finite.
        """
        x_start, count = images_to_x(images), len(images)
        x_t = self._noise(first_image, (count, *self._shape[1:]), "sample", self.num_evaluations)
        labels = tf.constant(self._condition.of_images(first_image, count))
        stride = -(-self.num_evaluations // CALLS)
        with progress_bar(total=self.num_evaluations, unit="step", desc="batch", nested=True) as bar:
            for start in range(0, self.num_evaluations, stride):
                stop = min(start + stride, self.num_evaluations)
                limits = (tf.fill([count], i) for i in (start, stop))
                x_t, finite = self._steps(first_image, x_t, x_start, painted, labels, *limits)
                t = self._timesteps[self._table.steps[stop - 1]]
                self._trained.check_finite(finite, "pictures", first=first_image, t=t)
                bar.update(stop - start)
        return np.where(painted, x_to_images(x_t).numpy(), images)


def check_masks(masks: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Masks bool [H, W] or [N, H, W] of images [N, H, W, C] as bool [N, H, W, 1].

    Raises:
      ConfigError: they have another type or shape, or one of them paints nothing.
    """
    masks = np.asarray(masks)
    if masks.dtype != bool or masks.shape not in (images.shape[:3], images.shape[1:3]):
        shapes = f"{list(images.shape[1:3])} or {list(images.shape[:3])}"
        raise ConfigError("masks", f"must be bool {shapes}, not {masks.dtype} {list(masks.shape)}")
    masks = np.broadcast_to(masks, images.shape[:3])
    if not masks.any(axis=(1, 2)).all():
        raise ConfigError("masks", ": a mask must select at least one pixel to paint")
    return masks[..., None]
