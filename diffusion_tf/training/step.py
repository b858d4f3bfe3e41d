"""Training: the step of Algorithm 1 (its optimiser is in train_state.py), and the loop around it."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from diffusion_tf.diffusion_utils import GaussianDiffusion, images_to_x
from diffusion_tf.ops.cpu import regions
from diffusion_tf.presets import Preset
from diffusion_tf.rng import CounterRng
from diffusion_tf.training.optimizer import StateTensors, apply_gradients
from diffusion_tf.unet import UNet

# Of a channel of what a CPU works out at once: it is as quick with so little, and keeps fewer maps for the gradients.
_MOST_BYTES = 2**17


def loss_and_gradients(
    model: UNet, preset: Preset, params: Sequence[tf.Tensor], images: tf.Tensor, rng: CounterRng
) -> tuple[tf.Tensor, list[tf.Tensor]]:
    """A replica's share of the loss (Algorithm 1) over the global batch, and its gradients.

    Args:
      model: the network.
      preset: the recipe.
      params: the weights, in the order of `model.trainable_variables`.
      images: uint8 [per_replica, H, W, C].
      rng: at the training step and this replica's first example.
    """
    batch = images.shape[0]
    x_start = images_to_x(images)
    if preset.random_flip:
        flip = tf.reshape(rng.uniform("flip", (batch,)) < 0.5, [-1, 1, 1, 1])
        x_start = tf.where(flip, tf.reverse(x_start, axis=[2]), x_start)
    t = tf.cast(rng.uniform("t", (batch,)) * preset.num_timesteps, tf.int32)
    noise = rng.normal("noise", x_start.shape)

    with tf.GradientTape() as tape:
        tape.watch(params)
        denoise_fn = model.denoise_fn(params, rng)
        losses = GaussianDiffusion.from_preset(preset).training_losses(denoise_fn, x_start, t, noise)
        # The gradients are summed over replicas, so each divides by the global batch.
        loss = tf.reduce_sum(losses) / preset.batch_size
    return loss, tape.gradient(loss, params)


def _in_parts(
    of_images: Callable[[tf.Tensor, CounterRng], tuple[tf.Tensor, list[tf.Tensor]]],
    preset: Preset,
    params: Sequence[tf.Tensor],
    images: tf.Tensor,
    rng: CounterRng,
) -> tuple[tf.Tensor, list[tf.Tensor]]:
    """The sum of `of_images(images, rng)`, loss and gradients, over equal parts of a batch, a few images each.

    They are between half of the images that `_MOST_BYTES` allows and all; a batch without such parts is taken whole.
    """
    batch, *shape = images.shape
    most = max(1, _MOST_BYTES // (preset.image_size**2 * tf.as_dtype(preset.precision).size))
    size = next((size for size in range(most, most // 2, -1) if batch % size == 0), batch)
    if size == batch:
        return of_images(images, rng)

    def add(i, loss, grads):
        part = tf.reshape(images, [-1, size, *shape])[i]
        more_loss, more_grads = of_images(part, rng.skip(i * size))
        return i + 1, loss + more_loss, [a + b for a, b in zip(grads, more_grads, strict=True)]

    zeros = 0, tf.constant(0.0), [tf.zeros(w.shape) for w in params]
    # One after the other, or all of them would keep their feature maps at the same time.
    return tf.while_loop(lambda i, *_: i < batch // size, add, zeros, parallel_iterations=1)[1:]


def train_step(
    model: UNet,
    preset: Preset,
    state: StateTensors,
    images: tf.Tensor,
    first_example: tf.Tensor,
    all_reduce: Callable[[Any], Any],
    apply: Callable[..., Any] = apply_gradients,
) -> tuple[Any, tf.Tensor, tf.Tensor]:
    """One step of a replica: (what `apply` returns, loss, gradient norm), equal on all replicas.

    A pure function, but for what `apply` does. Where loss or gradient is not finite, only the number of steps moves.

    Args:
      model: the network.
      preset: the recipe.
      state: the state before.
      images: uint8 [per_replica, H, W, C].
      first_example: int64, the place of the first of them in the global batch.
      all_reduce: sums a structure of tensors over the replicas.
      apply: takes the step, as `apply_gradients` does, which returns the next state.
    """
    rng = CounterRng(preset.seed, state.step, first_example)
    of_images = functools.partial(loss_and_gradients, model, preset, state.params)
    if regions.in_cpu_graph() and regions.suit(preset.image_size):
        share = _in_parts(of_images, preset, state.params, images, rng)
    else:
        share = regions.one_program(lambda: of_images(images, rng))
    loss, grads = all_reduce(share)
    # Differs from the authors, who clip each replica's gradient before the average: the result then depends on the
    # number of replicas.
    grad_norm = tf.linalg.global_norm(grads)
    clip = tf.minimum(1.0, preset.grad_clip / grad_norm)
    return apply(state, grads, clip, is_finite_step(loss, grad_norm), preset), loss, grad_norm


def is_finite_step(loss: tf.Tensor, grad_norm: tf.Tensor) -> tf.Tensor:
    """Whether a step's weights may be used."""
    return tf.math.is_finite(loss) & tf.math.is_finite(grad_norm)
