"""Trains a network under a strategy: the compiled training step, and the batches that it takes."""

from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from diffusion_tf.data.order import order_seed
from diffusion_tf.data.source import ImageSource, training_batches
from diffusion_tf.diffusion_utils import GaussianDiffusion
from diffusion_tf.errors import ConfigError
from diffusion_tf.presets import Preset
from diffusion_tf.rng import CounterRng
from diffusion_tf.runtime.replicas import cpu_backend, per_replica_batch_size, replica_function
from diffusion_tf.runtime.workers import slice_servers
from diffusion_tf.training.optimizer import assign_adam_step, is_finite_step
from diffusion_tf.training.progress import SUMS
from diffusion_tf.training.state import TrainState
from diffusion_tf.training.step import MICROBATCH_BYTES, LossAndGradients, loss_and_gradients, reduced_gradients


def zero_sums() -> dict[str, tf.Tensor]:
    """The sums of `Trainer.run_steps` before the first step: float32 scalars by the names SUMS."""
    return {name: tf.constant(0.0) for name in SUMS}


class Trainer:
    """The compiled training step of a preset under a strategy.

    Args:
      preset: the recipe.
      strategy: where to train.
      make_rng: makes the random numbers of a step, as `CounterRng(seed, step, first_example)`.
      loss_and_gradients: computes a microbatch's share of the loss and the gradients.
      microbatch_bytes: as in `reduced_gradients`.

    Raises:
      ConfigError: the batch size is not divisible by the replicas, or the network cannot be built.
    """

    def __init__(
        self,
        preset: Preset,
        strategy: tf.distribute.Strategy,
        *,
        make_rng: Callable[[int, tf.Tensor, tf.Tensor], CounterRng] = CounterRng,
        loss_and_gradients: LossAndGradients = loss_and_gradients,
        microbatch_bytes: int = MICROBATCH_BYTES,
    ):
        self.preset = preset
        self.strategy = strategy
        self.per_replica = per_replica_batch_size(preset.batch_size, strategy)
        GaussianDiffusion.from_preset(preset)  # raises ConfigError for what cannot be trained
        self.state = TrainState(preset, strategy)
        self._make_rng = make_rng
        self._loss_and_gradients = loss_and_gradients
        self._microbatch_bytes = microbatch_bytes
        on_cpu = cpu_backend(preset.image_pixels, training=True)
        self._replica_step = replica_function(self._train_step, strategy, on_cpu)
        self._replica_param_norm = replica_function(self._param_norm, strategy, on_cpu)

    def _train_step(self, images: tf.Tensor, labels: tf.Tensor | None = None) -> tuple[tf.Tensor, tf.Tensor]:
        """`train_step` on the state's variables, in replica context: (loss, gradient norm) of the global batch."""
        images = tf.ensure_shape(images, (self.per_replica, *self.preset.image_shape))  # several hosts lose it
        if labels is not None:
            labels = tf.ensure_shape(labels, (self.per_replica,))
        context = tf.distribute.get_replica_context()
        before = self.state.tensors()
        first_example = tf.cast(context.replica_id_in_sync_group, tf.int64) * self.per_replica
        loss, gradients = reduced_gradients(
            self.state.model,
            self.preset,
            before.params,
            images,
            self._make_rng(self.preset.seed, before.step, first_example),
            lambda values: context.all_reduce(tf.distribute.ReduceOp.SUM, values),
            labels=labels,
            loss_and_gradients=self._loss_and_gradients,
            microbatch_bytes=self._microbatch_bytes,
        )
        assign_adam_step(self.state, before, gradients, self.preset)
        return loss, gradients.norm

    def _param_norm(self) -> tf.Tensor:
        """The global norm of the weights, in replica context."""
        return tf.linalg.global_norm([tf.convert_to_tensor(w) for w in self.state.params])

    @tf.function
    def run_steps(
        self, iterator: Iterator[Any], num_steps: tf.Tensor, sums: dict[str, tf.Tensor] | None = None
    ) -> dict[str, tf.Tensor]:
        """Takes `num_steps` steps on the device, and returns `sums` (default: `zero_sums()`) with them added."""
        sums = sums or zero_sums()
        for _ in tf.range(num_steps):
            batch = next(iterator)
            examples = batch if self.preset.num_classes else (batch,)
            loss, grad_norm = self.strategy.run(self._replica_step, args=examples)
            # Equal on all replicas, so take the first one.
            loss = self.strategy.experimental_local_results(loss)[0]
            grad_norm = self.strategy.experimental_local_results(grad_norm)[0]
            finite = is_finite_step(loss, grad_norm)
            skipped_in_row = tf.where(finite, 0.0, sums["skipped_in_row"] + 1.0)
            sums = {
                "loss": sums["loss"] + tf.where(finite, loss, 0.0),
                "grad_norm": sums["grad_norm"] + tf.where(finite, grad_norm, 0.0),
                "finite_steps": sums["finite_steps"] + tf.where(finite, 1.0, 0.0),
                "skipped_steps": sums["skipped_steps"] + tf.where(finite, 0.0, 1.0),
                "skipped_in_row": skipped_in_row,
                "most_in_row": tf.maximum(sums["most_in_row"], skipped_in_row),
                "param_norm": sums["param_norm"],
            }
        # On the device, so that the host reads one number and not every weight; equal on all replicas.
        param_norm = self.strategy.run(self._replica_param_norm)
        return {**sums, "param_norm": self.strategy.experimental_local_results(param_norm)[0]}

    def batches(self, source: ImageSource, data_order: int = 0) -> Iterator[Any]:
        """An iterator over `training_batches` from the state's step on, with labels if the preset has classes.

        `data_order` selects their order. Each host of the strategy reads and decodes the images of its replicas.

        Raises:
          ConfigError: this process alone can read the source, and other hosts should.
        """
        if source.in_python and slice_servers(self.strategy):
            raise ConfigError(
                "data_dir",
                f": {source.name} is in array_record files, which the workers of a TPU slice cannot read: prepare it"
                " with `tfds build --file_format=tfrecord`",
            )

        def worker_batches(context: tf.distribute.InputContext) -> tf.data.Dataset:
            return training_batches(
                source,
                batch_size=self.preset.batch_size,
                per_replica=self.per_replica,
                seed=order_seed(self.preset.seed, data_order),
                start_step=int(self.state.step.numpy()),
                worker=context.input_pipeline_id,
                workers=context.num_input_pipelines,
                with_labels=self.preset.num_classes > 0,
            )

        return iter(self.strategy.distribute_datasets_from_function(worker_batches))
