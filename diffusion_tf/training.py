"""Training: the step of Algorithm 1 (its optimiser is in train_state.py), and the loop around it."""

import contextlib
import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import tensorflow as tf
import tqdm
from absl import logging

from diffusion_tf import checkpoints, figures, regions
from diffusion_tf.datasets import READ_ERRORS, ImageSource, training_batches
from diffusion_tf.diffusion_utils import GaussianDiffusion, images_to_x, x_to_images
from diffusion_tf.distribution import (
    any_worker,
    is_chief,
    is_multi_worker,
    per_replica_batch_size,
    replica_function,
    several_workers,
)
from diffusion_tf.errors import DamagedFileError, DivergedError, InputError, PreemptedError
from diffusion_tf.files import write_file
from diffusion_tf.preemption import PreemptionNotice
from diffusion_tf.presets import Preset
from diffusion_tf.rng import CounterRng
from diffusion_tf.samplers import Sampler
from diffusion_tf.train_state import StateTensors, TrainState, apply_gradients, warmed_up_learning_rate
from diffusion_tf.trained_model import TrainedModel
from diffusion_tf.unet import UNet
from diffusion_tf.workdir import Workdir

_NUM_GRID_SAMPLES = 64
_NEXT_ORDER = 0x9E3779B9  # far from the seeds that people choose
# Of a channel of what a CPU works out at once: it is as quick with so little, and keeps fewer maps for the gradients.
_MOST_BYTES = 2**17
_SECONDS_UNSEEN = 4.0  # on the device, at most: Compute Engine takes a machine 30 seconds after its notice


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


@dataclasses.dataclass
class Progress:
    """How far a run is beside its state: what a checkpoint's manifest holds, so that a resumed run is the run.

    Attributes:
      data_order: which order of the data; the second once the run has gone back.
      sums: of the steps since the last line of metrics, as `Trainer.run_steps` has them.
    """

    data_order: int = 0
    sums: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(zero_sums(), 0.0))

    @classmethod
    def of_checkpoint(cls, path: str) -> "Progress":
        """As the manifest at `path` states it; one of format 1 states nothing."""
        stated = checkpoints.load_manifest(path).get("progress")
        try:
            return (
                cls(int(stated["data_order"]), {k: float(stated["sums"][k]) for k in zero_sums()}) if stated else cls()
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedFileError(f"{path} does not tell the run's progress: remove it") from error

    def take_metrics(self) -> dict[str, float]:
        """The means since the last line of metrics; the sums begin again."""
        sums, count = self.sums, self.sums["finite_steps"]
        means = {name: sums[name] / count if count else math.nan for name in ("loss", "grad_norm")}
        self.sums = {**dict.fromkeys(sums, 0.0), "skipped_in_row": sums["skipped_in_row"]}
        return {**means, "param_norm": sums["param_norm"], "skipped_steps": int(sums["skipped_steps"])}

    def has_diverged(self, max_skipped_steps: int) -> bool:
        """Whether to stop: too many steps in a row were skipped, or the weights themselves are not finite."""
        return self.sums["most_in_row"] >= max_skipped_steps or not math.isfinite(self.sums["param_norm"])


def train(trainer: Trainer, workdir: Workdir, source: ImageSource) -> None:
    """Trains up to `num_steps`, from the newest sound checkpoint of `workdir` where there is one.

    Raises:
      InputError: the checkpoint does not fit, the data cannot be read, or a file cannot be written.
      DivergedError: too many steps in a row were skipped, also after going back once.
      PreemptedError: the machine is wanted back; the run is saved.
    """
    preset, strategy = trainer.preset, trainer.strategy
    progress = _restore(trainer, workdir) or Progress()
    step = int(trainer.state.step.numpy())
    batches = trainer.batches(source, progress.data_order)
    reporter = _Reporter(trainer, workdir, step) if is_chief(strategy) else None
    # Several processes must take the same steps between their meetings, however long those last.
    pace = preset.steps_per_loop if is_multi_worker(strategy) else 1
    closing = contextlib.closing(reporter) if reporter else contextlib.nullcontext()
    with PreemptionNotice() as notice, several_workers(strategy), closing:
        while step < preset.num_steps:
            start = time.monotonic()
            num_steps = min(pace, preset.steps_per_loop - step % preset.steps_per_loop, preset.num_steps - step)
            progress.sums = _run_steps(trainer, batches, num_steps, progress.sums, source)
            step += num_steps
            if progress.has_diverged(preset.max_skipped_steps):
                progress = _go_back(trainer, workdir, reporter, progress)
                step = int(trainer.state.step.numpy())
                batches = trainer.batches(source, progress.data_order)
                continue
            if not is_multi_worker(strategy):
                pace = _next_pace(pace, time.monotonic() - start)
            if step % preset.steps_per_loop == 0 or step == preset.num_steps:
                metrics = progress.take_metrics()
                if source.bad_records:
                    metrics["bad_records"] = source.bad_records
                if reporter:
                    reporter.report(step, metrics, progress)
            if any_worker(strategy, notice.reason is not None) and step < preset.num_steps:
                if reporter:
                    reporter.save(step, progress)
                    reporter.finish_saving()
                any_worker(strategy, True)  # none leaves before the file is whole
                raise PreemptedError(f"{notice.reason or 'another process'}: saved step {step}, run it again to go on")


def _next_pace(pace: int, seconds: float) -> int:
    """How many steps to take unseen, after `pace` took so long. It changes when one looks, and no value."""
    if seconds > _SECONDS_UNSEEN:
        return max(1, pace // 2)
    return 2 * pace if seconds < _SECONDS_UNSEEN / 2 else pace


def _restore(trainer: Trainer, workdir: Workdir) -> Progress | None:
    """Takes over the newest sound checkpoint; None where there is none."""
    path = checkpoints.restore_newest(workdir.checkpoints, trainer.state.restore)
    if path is None:
        return None
    manifest, ours = checkpoints.load_manifest(path), trainer.preset.recipe_sha256()
    if manifest.get("packages", checkpoints.PACKAGES) != checkpoints.PACKAGES:
        logging.warning("%s was written by %s: the run goes on, not bit for bit", path, manifest["packages"])
    if manifest.get("config_sha256", ours) != ours:
        logging.warning("%s is of another recipe than config.json, or of another version", path)
    return Progress.of_checkpoint(path)


def _go_back(trainer: Trainer, workdir: Workdir, reporter: "_Reporter | None", progress: Progress) -> Progress:
    """Takes the run back to its last checkpoint, from where it goes on with the data in another order.

    Raises:
      DivergedError: it has gone back before, or there is no checkpoint.
    """
    preset, step = trainer.preset, int(trainer.state.step.numpy())
    first = (step - 1) // preset.steps_per_loop * preset.steps_per_loop
    what = f"the run diverged between steps {first} and {step}"
    if reporter:
        reporter.finish_saving()
        norms = {
            name: float(np.linalg.norm(array.astype(np.float64))) for name, array in trainer.state.to_arrays().items()
        }
        evidence = {
            "step": step,
            **dataclasses.asdict(progress),
            "norms": norms,
            "metrics": workdir.read_metrics()[-10:],
        }
        what += f" (see {workdir.write_divergence(step, evidence)})"
    any_worker(trainer.strategy, True)  # the last checkpoint is whole
    restored = None if progress.data_order else _restore(trainer, workdir)
    if restored is None:
        raise DivergedError(
            f"{what}: start again in another --workdir with a learning rate below {preset.learning_rate}"
        )
    step = int(trainer.state.step.numpy())
    logging.warning("%s: going back to step %d, with the data in another order", what, step)
    if reporter:
        workdir.rewind_metrics(step)
        reporter.start(step)
    return dataclasses.replace(restored, data_order=1)


def _run_steps(
    trainer: Trainer, batches, num_steps: int, sums: dict[str, float], source: ImageSource
) -> dict[str, float]:
    before = {name: tf.constant(value) for name, value in sums.items()}
    try:
        after = trainer.run_steps(batches, tf.constant(num_steps), before)
        return {name: float(value) for name, value in after.items()}
    except READ_ERRORS as error:
        raise source.read_error(error) from error
    except tf.errors.ResourceExhaustedError as error:
        raise InputError("out of memory: a smaller --batch_size, or more replicas, may fit") from error


def samples_path(workdir: Workdir, step: int) -> str:
    """Where the grid of EMA samples of `step` lies."""
    return os.path.join(workdir.samples, f"step_{step:08d}.png")


def report_samples(workdir: Workdir, writer: tf.summary.SummaryWriter, step: int, samples: np.ndarray) -> None:
    """Shows EMA samples uint8 [N, H, W, C] of `step` in TensorBoard and as `samples/step_*.png`."""
    grid = figures.square_grid(samples)
    picture = figures.captioned_grids({f"EMA samples at step {step}": grid})
    write_file(samples_path(workdir, step), picture)
    with writer.as_default(step=step):
        tf.summary.image("ema_samples", grid[np.newaxis])
    writer.flush()


class _Reporter:
    """What a run tells while it goes: progress bar, metrics.jsonl, TensorBoard, sample grids, checkpoints."""

    def __init__(self, trainer: Trainer, workdir: Workdir, step: int):
        self.trainer, self.workdir, self.preset = trainer, workdir, trainer.preset
        workdir.rewind_metrics(step)
        checkpoints.remove_unfinished(workdir.checkpoints)
        self.bar = tqdm.tqdm(initial=step, total=self.preset.num_steps, unit="step", desc=self.preset.dataset)
        self.writer = tf.summary.create_file_writer(workdir.tensorboard)
        self.sampler: Sampler | None = None
        # Digesting and writing a checkpoint takes seconds, in which the device can train on.
        self.executor = ThreadPoolExecutor(1)
        self.saving: Future[None] | None = None
        self.sound: set[int] = set()  # steps of checkpoints that this process has verified
        self.start(step)

    def start(self, step: int) -> None:
        """Begins, or begins again, with the checkpoint of `step`."""
        self.saved_step = step
        self.bar.update(step - self.bar.n)
        # A process may have died between the checkpoint and its samples.
        if step and self._is_time_to_sample(step) and not tf.io.gfile.exists(samples_path(self.workdir, step)):
            self._write_samples(step)
        self.last_report = step, time.monotonic()

    def report(self, step: int, metrics: dict[str, float], progress: Progress) -> None:
        """Reports the loop that ended at `step`, and saves and samples where it is time."""
        last_step, last_time = self.last_report
        metrics = {
            "step": step,
            **metrics,
            # The rate of the loop's last step, which had step - 1 steps before it.
            "learning_rate": float(
                warmed_up_learning_rate(self.preset.learning_rate, self.preset.warmup_steps, tf.constant(step - 1))
            ),
            "images_per_sec": (step - last_step) * self.preset.batch_size / (time.monotonic() - last_time),
        }
        self.workdir.append_metrics(metrics)
        with self.writer.as_default(step=step):
            for name, value in metrics.items():
                if name != "step":
                    tf.summary.scalar(name, value)
        self.bar.set_postfix_str(f"loss={metrics['loss']:.4f}, {metrics['images_per_sec']:.0f} images/s", refresh=False)
        self.bar.update(step - self.bar.n)
        if step % self.preset.checkpoint_every == 0 or step == self.preset.num_steps:
            self.save(step, progress)
        if self._is_time_to_sample(step):
            self._write_samples(step)
        self.last_report = step, time.monotonic()

    def close(self) -> None:
        """Ends the bar and the event file, and waits for the last checkpoint.

        Raises:
          InputError: it could not be written.
        """
        self.bar.close()
        self.writer.close()
        with self.executor:
            self.finish_saving()

    def save(self, step: int, progress: Progress) -> None:
        """Has a checkpoint written while training goes on, unless there is one of this step."""
        if step == self.saved_step:
            return
        self.finish_saving()
        manifest = {"config_sha256": self.preset.recipe_sha256(), "progress": dataclasses.asdict(progress)}
        self.saving = self.executor.submit(self._write_checkpoint, step, self.trainer.state.to_arrays(), manifest)
        self.saved_step = step
        self.writer.flush()

    def finish_saving(self) -> None:
        """Waits for the last checkpoint.

        Raises:
          InputError: it could not be written.
        """
        saving, self.saving = self.saving, None
        if saving:
            saving.result()

    def _write_checkpoint(self, step: int, arrays: dict[str, np.ndarray], manifest: dict[str, Any]) -> None:
        self.workdir.sync_metrics()
        checkpoints.save(self.workdir.checkpoints, step, arrays, manifest)
        self.sound.discard(step)  # a new file is verified before an old one goes
        checkpoints.remove_old(
            self.workdir.checkpoints,
            keep=self.preset.keep_checkpoints,
            keep_every=self.preset.keep_every,
            sound=self.sound,
        )

    def _is_time_to_sample(self, step: int) -> bool:
        return self.preset.sample_every > 0 and step % self.preset.sample_every == 0

    def _write_samples(self, step: int) -> None:
        trainer = self.trainer
        if self.sampler is None:
            # Of several processes only this one is here, so that it samples on its own.
            strategy = tf.distribute.get_strategy() if is_multi_worker(trainer.strategy) else trainer.strategy
            replicas = strategy.num_replicas_in_sync
            self.sampler = Sampler(
                TrainedModel(self.preset, strategy, trainer.state.model, trainer.state.ema),
                batch_size=-(-_NUM_GRID_SAMPLES // replicas) * replicas,
                seed=self.preset.seed,
            )
        report_samples(self.workdir, self.writer, step, x_to_images(self.sampler(0)[:_NUM_GRID_SAMPLES]).numpy())
