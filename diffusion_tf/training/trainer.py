"""Training: the step of Algorithm 1 (its optimiser is in train_state.py), and the loop around it."""

import tensorflow as tf

from diffusion_tf.data.source import ImageSource, training_batches
from diffusion_tf.diffusion_utils import GaussianDiffusion
from diffusion_tf.ops.cpu import regions
from diffusion_tf.presets import Preset
from diffusion_tf.runtime.replicas import per_replica_batch_size, replica_function
from diffusion_tf.training.optimizer import apply_gradients
from diffusion_tf.training.state import TrainState
from diffusion_tf.training.step import is_finite_step, train_step

_NEXT_ORDER = 0x9E3779B9  # far from the seeds that people choose


def zero_sums() -> dict[str, tf.Tensor]:
    """What `Trainer.run_steps` adds up, before the first step: float32 scalars.

    `loss` and `grad_norm` over `finite_steps`; `skipped_steps`, how many of them in a row to the end and at most; and,
    no sum, `param_norm` after the last step.
    """
    names = "loss", "grad_norm", "finite_steps", "skipped_steps", "skipped_in_row", "most_in_row", "param_norm"
    return {name: tf.constant(0.0) for name in names}


class Trainer:
    """The compiled training step of a preset under a strategy.

    Raises:
      InputError: the batch size is not divisible by the replicas, or the network cannot be built.
    """

    def __init__(self, preset: Preset, strategy: tf.distribute.Strategy):
        self.preset = preset
        self.strategy = strategy
        self.per_replica = per_replica_batch_size(preset.batch_size, strategy)
        GaussianDiffusion.from_preset(preset)  # refuses what cannot be trained
        self.state = TrainState(preset, strategy)
        self._replica_step = replica_function(self._train_step, strategy, in_regions=True)

    def _train_step(self, images: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """One step in replica context: (loss, gradient norm), both of the global batch."""
        images = tf.ensure_shape(images, (self.per_replica, *self.preset.image_shape))  # several hosts lose it
        context = tf.distribute.get_replica_context()
        in_place = regions.in_cpu_graph()
        state, loss, grad_norm = train_step(
            self.state.model,
            self.preset,
            self.state.tensors(),
            images,
            tf.cast(context.replica_id_in_sync_group, tf.int64) * self.per_replica,
            lambda values: context.all_reduce(tf.distribute.ReduceOp.SUM, values),
            self.state.apply_in_place if in_place else apply_gradients,
        )
        if not in_place:
            self.state.assign(state)
        return loss, grad_norm

    @tf.function
    def run_steps(self, iterator, num_steps: tf.Tensor, sums: dict[str, tf.Tensor] | None = None):
        """Takes `num_steps` steps on the device, and adds what they were to `sums`, which begin as `zero_sums()`."""
        sums = sums or zero_sums()
        for _ in tf.range(num_steps):
            loss, grad_norm = self.strategy.run(self._replica_step, args=(next(iterator),))
            # Equal on all replicas, so any one will do.
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
        param_norm = tf.linalg.global_norm([tf.convert_to_tensor(w) for w in self.state.params])
        return {**sums, "param_norm": param_norm}

    def batches(self, source: ImageSource, data_order: int = 0):
        """An iterator over the training batches from the state's step on, in one of several orders."""

        def worker_batches(context: tf.distribute.InputContext) -> tf.data.Dataset:
            return training_batches(
                source,
                batch_size=self.preset.batch_size,
                per_replica=self.per_replica,
                seed=(self.preset.seed + data_order * _NEXT_ORDER) % 2**32,
                start_step=int(self.state.step.numpy()),
                worker=context.input_pipeline_id,
                workers=context.num_input_pipelines,
            )

        return iter(self.strategy.distribute_datasets_from_function(worker_batches))
