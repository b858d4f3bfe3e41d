"""A training step: Algorithm 1 on a replica's images, and the optimizer's step by the gradients of all replicas."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from diffusion_tf.conditioning import NO_LABEL
from diffusion_tf.diffusion_utils import GaussianDiffusion, images_to_x
from diffusion_tf.presets import Preset
from diffusion_tf.rng import CounterRng
from diffusion_tf.runtime.microbatches import map_microbatches
from diffusion_tf.training.optimizer import Gradients, StateTensors, adam_step, clip_and_check
from diffusion_tf.unet import UNet

# Bytes of one channel of a microbatch, at most.
MICROBATCH_BYTES = 2**17

# Called as `loss_and_gradients` below; labels are passed only if the preset has classes.
LossAndGradients = Callable[..., tuple[tf.Tensor, list[tf.Tensor]]]


def loss_and_gradients(
    model: UNet,
    preset: Preset,
    params: Sequence[tf.Tensor],
    images: tf.Tensor,
    rng: CounterRng,
    labels: tf.Tensor | None = None,
) -> tuple[tf.Tensor, list[tf.Tensor]]:
    """The loss (Algorithm 1) of these images as a share of the global batch's, and its gradients.

    Args:
      model: the network.
      preset: the recipe.
      params: the weights, in the order of `model.trainable_variables`.
      images: uint8 [B, H, W, C].
      rng: at the training step and the first of these examples.
      labels: int32 [B], if the preset has classes; some are hidden (`label_dropout`).
    """
    batch = images.shape[0]
    x_start = augmented(images_to_x(images), preset, rng)
    t = tf.cast(rng.uniform("t", (batch,)) * preset.num_timesteps, tf.int32)
    noise = rng.normal("noise", x_start.shape)
    if labels is not None:
        labels = tf.where(rng.uniform("label_dropout", (batch,)) < preset.label_dropout, NO_LABEL, labels)

    with tf.GradientTape() as tape:
        tape.watch(params)
        denoise_fn = functools.partial(model.denoise_fn(params, rng), labels=labels)
        losses = GaussianDiffusion.from_preset(preset).training_losses(denoise_fn, x_start, t, noise)
        # The gradients are summed over replicas, so each divides by the global batch.
        loss = tf.reduce_sum(losses) / preset.batch_size
    return loss, tape.gradient(loss, params)


def augmented(x_start: tf.Tensor, preset: Preset, rng: CounterRng) -> tf.Tensor:
    """Images [B, H, W, C], each flipped and shifted at random as `preset` asks."""
    batch = x_start.shape[0]
    if preset.random_flip:
        flip = tf.reshape(rng.uniform("flip", (batch,)) < 0.5, [-1, 1, 1, 1])
        x_start = tf.where(flip, tf.reverse(x_start, axis=[2]), x_start)
    if preset.random_shift:
        choices = 2 * preset.random_shift + 1
        begin = tf.cast(rng.uniform("shift", (batch, 2)) * choices, tf.int32)
        for axis in (1, 2):
            x_start = _shifted(x_start, begin[:, axis - 1], axis, preset.random_shift)
    return x_start


def _shifted(images: tf.Tensor, begin: tf.Tensor, axis: int, most: int) -> tf.Tensor:
    """Each image's window of an axis from `begin`, int32 [B] in [0, 2 most], on, once `most` mirrored pixels pad it."""
    padded = tf.pad(images, [[most, most] if i == axis else [0, 0] for i in range(4)], "REFLECT")
    begin = tf.reshape(begin, [-1, 1, 1, 1])
    for i in range(2 * most + 1):  # by selection, because TPUs are slow to gather
        window = tf.slice(padded, [i if axis == other else 0 for other in range(4)], images.shape)
        images = tf.where(begin == i, window, images)
    return images


def reduced_gradients(
    model: UNet,
    preset: Preset,
    params: Sequence[tf.Tensor],
    images: tf.Tensor,
    rng: CounterRng,
    all_reduce: Callable[[Any], Any],
    *,
    labels: tf.Tensor | None = None,
    loss_and_gradients: LossAndGradients = loss_and_gradients,
    microbatch_bytes: int = MICROBATCH_BYTES,
) -> tuple[tf.Tensor, Gradients]:
    """The loss of the global batch, and its gradients: equal on all replicas.

    Args:
      model: the network.
      preset: the recipe.
      params: the weights, in the order of `model.trainable_variables`.
      images: uint8 [per_replica, H, W, C].
      rng: at the training step and this replica's first example.
      all_reduce: sums a structure of tensors over the replicas.
      labels: int32 [per_replica], if the preset has classes.
      loss_and_gradients: computes a microbatch's share of both.
      microbatch_bytes: largest size of one channel of a microbatch, in bytes; unused where the batch is not split.
    """

    def share(first: int | tf.Tensor, images: tf.Tensor, *labels: tf.Tensor) -> tuple[tf.Tensor, list[tf.Tensor]]:
        return loss_and_gradients(model, preset, params, images, rng.skip(first), *labels)

    zeros = lambda: (tf.constant(0.0), [tf.zeros(w.shape) for w in params])
    examples = [images] if labels is None else [images, labels]
    loss, grads = all_reduce(
        map_microbatches(share, examples, max_size=microbatch_size(preset, microbatch_bytes), zeros=zeros)
    )
    return loss, clip_and_check(loss, grads, preset.grad_clip)


def microbatch_size(preset: Preset, microbatch_bytes: int = MICROBATCH_BYTES) -> int:
    """The most images of a microbatch of which one channel has at most `microbatch_bytes` bytes."""
    image_bytes = preset.image_pixels * tf.as_dtype(preset.precision).size
    return min(preset.batch_size, max(1, microbatch_bytes // image_bytes))


class TrainStep(NamedTuple):
    """The result of a training step: the next state, and the global batch's loss and gradient norm before clipping."""

    state: StateTensors
    loss: tf.Tensor
    grad_norm: tf.Tensor


def train_step(
    model: UNet,
    preset: Preset,
    state: StateTensors,
    images: tf.Tensor,
    rng: CounterRng,
    all_reduce: Callable[[Any], Any],
    labels: tf.Tensor | None = None,
) -> TrainStep:
    """One step of a replica as a pure function; its result is equal on all replicas.

    If the loss or the gradient is not finite, only the number of steps moves.

    Args:
      model: the network; its own weights do not matter.
      preset: the recipe.
      state: the state before.
      images: uint8 [per_replica, H, W, C].
      rng: at the training step and this replica's first example.
      all_reduce: sums a structure of tensors over the replicas.
      labels: int32 [per_replica], if the preset has classes.
    """
    loss, gradients = reduced_gradients(model, preset, state.params, images, rng, all_reduce, labels=labels)
    return TrainStep(adam_step(state, gradients, preset), loss, gradients.norm)
