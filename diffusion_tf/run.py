"""The public API: `load` a trained run or `train` one, then sample, denoise, measure and compress with it."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import tensorflow as tf
from absl import logging

from diffusion_tf.calibration import calibrated, run_calibration
from diffusion_tf.compression.archive import pack_archive
from diffusion_tf.compression.codec import Codec
from diffusion_tf.compression.image_files import Targets, decode_images, encode_images, open_files
from diffusion_tf.compression.tables import TableStore
from diffusion_tf.conditioning import NO_LABEL, Condition, labels_of_images
from diffusion_tf.data import conditional_preset, open_images, open_source
from diffusion_tf.data.arrays import array_source, check_images, materialize
from diffusion_tf.data.source import ImageSource
from diffusion_tf.data_settings import PRESETS_OWN, DataSettings
from diffusion_tf.errors import ConfigError
from diffusion_tf.inpainting import Inpainter, check_masks
from diffusion_tf.interop.diffusers import check_size, read_ema
from diffusion_tf.interop.diffusers_config import is_diffusers_folder, preset_from_folder
from diffusion_tf.interop.fine_tuning import fine_tuning_preset, initial_weights
from diffusion_tf.likelihood import bound_of_images
from diffusion_tf.presets import Preset, get_preset
from diffusion_tf.pretrained import resolve
from diffusion_tf.progress_bar import progress_bar
from diffusion_tf.recipes import choose_preset, copying_warning
from diffusion_tf.runtime.replicas import shared_batch_size
from diffusion_tf.runtime.strategies import make_strategy
from diffusion_tf.samplers import Sampler
from diffusion_tf.solvers import JUMP_LENGTH, RESAMPLINGS, SamplerSettings
from diffusion_tf.storage import checkpoints
from diffusion_tf.storage.workdir import Workdir
from diffusion_tf.trained_model import TrainedModel
from diffusion_tf.training.loop import train_in_workdir
from diffusion_tf.training.reporter import MetricsCallback
from diffusion_tf.unet import UNet

Images: TypeAlias = np.ndarray | str | os.PathLike[str] | tf.data.Dataset  # what `train` takes
_BATCH_SIZE = 64  # the most images of one call unless `batch_size` says otherwise


class Run:
    """A trained network with its EMA weights and its diffusion process. `load` and `train` return one.

    Images are uint8 [N, H, W, C]. `denoise` compiles once for each number of images, `sample` once for each batch size,
    sampler, number of steps and guidance. Every call of another method compiles: seconds for `digits`, up to a minute
    for the larger networks. So make few calls with many images.

    Attributes:
      preset: the configuration of network, diffusion and training.
      step: training steps that the weights have taken; 0 for a diffusers folder, which does not record them.
      path: the workdir or diffusers folder.
      classes: the names of the classes that the network is conditioned on, in the order of their indices; empty without
        classes, or where the folder names none.
    """

    def __init__(
        self,
        trained: TrainedModel,
        *,
        path: str,
        step: int,
        weights_digest: str,
        data: DataSettings = PRESETS_OWN,
        classes: Sequence[str] = (),
    ):
        self.preset = trained.preset
        self.step = step
        self.path = path
        self.classes = tuple(classes)
        self._trained = trained
        self._weights_digest = weights_digest
        self._data = data
        self._denoise_calls: dict[int, Callable] = {}
        self._samplers: dict[tuple[int, SamplerSettings, float, bool], Sampler] = {}

    def __repr__(self) -> str:
        return f"<Run {self.path}: {self.preset.dataset} {self.preset.image_shape}, step {self.step}>"

    @property
    def unet(self) -> UNet:
        """The network as a Keras model: `run.unet(x_t, t)` maps float32 [N, H, W, C] and int32 [N].

        With classes, `run.unet(x_t, t, labels)` takes labels int32 [N], -1 for none.

        `summary()`, `count_params()`, `get_config()` and `save("unet.keras")` work as for any Keras model;
        `keras.saving.load_model` restores a model with equal outputs once `diffusion_tf.UNet` is imported. Its weights
        are frozen: assigning to them raises. `compile` and `fit` do not apply, because a training step is more than a
        loss of inputs and targets: it draws t and noise for each image, clips the gradient averaged over replicas,
        skips steps that are not finite and updates the EMA weights. Train with `diffusion_tf.train`.
        """
        return self._trained.model

    def sample(
        self,
        num_samples: int,
        *,
        seed: int = 0,
        sampler: str | SamplerSettings | None = None,
        steps: int | None = None,
        batch_size: int | None = None,
        labels: Sequence[int] = (),
        guidance: float = 0.0,
        calibrate: bool = False,
    ) -> np.ndarray:
        """Draws samples; shows progress. Costs `steps` network evaluations per sample, and twice that with guidance.

        Sample i is a function of the weights, the sampler, its label, `guidance`, `seed` and i alone. The batch size
        changes it by float rounding only.

        Args:
          num_samples: N.
          seed: in [0, 2^32).
          sampler: `ancestral` (Algorithm 2), `ddim`, `dpm_solver++`, `sde_dpm_solver++` or `heun`; default: `ancestral`
            for all T steps, `sde_dpm_solver++` for fewer. A `SamplerSettings` also chooses eta, spacing and clipping.
          steps: network evaluations per sample, in [1, T]; default: T, 50, 20, 20 and 35 for these samplers.
          batch_size: images computed at once, over all replicas; default: at most 64.
          labels: the classes that the samples take in turn, as indices of `classes`, -1 for none; default: all classes.
          guidance: w in (1 + w) f(x, label) - w f(x), 0 or more, for a run with classes.
          calibrate: multiply the predicted noise at each t by the factor that has the least squared error on training
            images, measured once and kept in `calibration` of the run's folder.

        Returns:
          uint8 [N, H, W, C].

        Raises:
          ConfigError: an argument is out of range, or there are no training images to calibrate on.
          NotFiniteError: a sample is not finite, since the network overflows.
        """
        if num_samples < 1:
            raise ConfigError("num_samples", f"={num_samples} must be greater than 0")
        seed, batch_size = _check_seed(seed), self._batch_size(batch_size, num_samples)
        condition = Condition(tuple(labels), guidance).resolve(self.preset)
        settings = _sampler_settings(sampler, steps)
        compiled = batch_size, settings, guidance, calibrate
        if compiled not in self._samplers:
            trained = self._calibrated() if calibrate else self._trained
            self._samplers[compiled] = Sampler(
                trained, batch_size=batch_size, seed=seed, settings=settings, condition=condition
            )
        self._samplers[compiled].seed, self._samplers[compiled].condition = seed, condition
        return self._samplers[compiled].draw(num_samples)

    def vary(
        self,
        images: np.ndarray,
        *,
        strength: float = 0.6,
        seed: int = 0,
        sampler: str | SamplerSettings | None = None,
        steps: int | None = None,
        batch_size: int | None = None,
        labels: Sequence[int] = (NO_LABEL,),
        guidance: float = 0.0,
    ) -> np.ndarray:
        """Makes a picture like each image by adding noise and removing it (SDEdit, Meng et al. 2021); shows progress.

        Costs `strength` times as many network evaluations per image as a sample.

        Args:
          images: uint8 [N, H, W, C].
          strength: the share of the process to go back to, in (0, 1]: near 0 the image returns, at 1 almost nothing of
            it is left.
          seed: of the noise, in [0, 2^32); picture i has noise of its own.
          sampler: as for `sample`.
          steps: of the whole process, as for `sample`.
          batch_size: images computed at once, over all replicas; default: at most 64.
          labels: the classes that the pictures take in turn, as for `sample`; default: none.
          guidance: as for `sample`.

        Returns:
          uint8 [N, H, W, C].

        Raises:
          ConfigError: an argument does not fit the run.
          NotFiniteError: a picture is not finite, since the network overflows.
        """
        check_images(images, self.preset.image_shape)
        settings = dataclasses.replace(_sampler_settings(sampler, steps), strength=strength)
        batch_size = self._batch_size(batch_size, len(images))
        sampler_from = Sampler(
            self._trained, batch_size=batch_size, seed=_check_seed(seed), settings=settings,
            condition=Condition(tuple(labels), guidance),
        )  # fmt: skip
        return sampler_from.draw(len(images), start_from=images)

    def inpaint(
        self,
        images: np.ndarray,
        masks: np.ndarray,
        *,
        resamplings: int = RESAMPLINGS,
        jump_length: int = JUMP_LENGTH,
        seed: int = 0,
        sampler: str | SamplerSettings | None = None,
        steps: int | None = None,
        batch_size: int | None = None,
        labels: Sequence[int] = (NO_LABEL,),
        guidance: float = 0.0,
    ) -> np.ndarray:
        """Paints the masked pixels of images to fit the others (RePaint, Lugmayr et al. 2022); shows progress.

        Costs about `resamplings` times `steps` network evaluations per image, by default 910.

        Args:
          images: uint8 [N, H, W, C].
          masks: bool [H, W] for all images or [N, H, W]: True where to paint.
          resamplings: how often each stretch of steps is taken; more fit better what is painted to what is known.
          jump_length: steps in a stretch.
          seed: of the noise, in [0, 2^32); picture i has noise of its own.
          sampler: `ancestral`, the default, or `ddim`.
          steps: of the sampler, in [1, T]; default: 100, or 50 for `ddim`.
          batch_size: images computed at once, over all replicas; default: at most 64.
          labels: the classes that the pictures take in turn, as for `sample`; default: none.
          guidance: as for `sample`.

        Returns:
          uint8 [N, H, W, C]; pixels that are not masked are those of `images`.

        Raises:
          ConfigError: an argument does not fit the run.
          NotFiniteError: a picture is not finite, since the network overflows.
        """
        check_images(images, self.preset.image_shape)
        batch_size, painted = self._batch_size(batch_size, len(images)), check_masks(masks, images)
        inpainter = Inpainter(
            self._trained, batch_size=batch_size, seed=_check_seed(seed), settings=_sampler_settings(sampler, steps),
            condition=Condition(tuple(labels), guidance), resamplings=resamplings, jump_length=jump_length,
        )  # fmt: skip
        starts = progress_bar(range(0, len(images), batch_size), unit="batch", desc="inpainting")
        batches = ((first, slice(first, first + batch_size)) for first in starts)
        return np.concatenate([inpainter(images[batch], painted[batch], first_image=first) for first, batch in batches])

    def denoise(self, x_t: npt.ArrayLike, t: npt.ArrayLike, *, labels: npt.ArrayLike = NO_LABEL) -> np.ndarray:
        """Evaluates the network once per image.

        Args:
          x_t: float32 [N, H, W, C], images in [-1, 1] after t + 1 steps of noise.
          t: int32 [N] or one int, in [0, T): index t is the paper's step t + 1.
          labels: indices of `classes`, int [N] or one int; -1 is none.

        Returns:
          What the network predicts (`preset.model_mean_type`; by default eps), float32 [N, H, W, C]; 2 C channels where
          it also predicts variances.

        Raises:
          ConfigError: a shape or a timestep does not fit the run, or x_t is not finite.
          NotFiniteError: an output is not finite.
        """
        x_t, t = np.asarray(x_t, np.float32), np.asarray(t)
        if x_t.ndim != 4 or x_t.shape[1:] != self.preset.image_shape or not len(x_t):
            raise ConfigError("x_t", f"must be [N, {_comma(self.preset.image_shape)}], not {list(x_t.shape)}")
        if not np.isfinite(x_t).all():
            raise ConfigError("x_t", "holds NaN or infinity")
        if t.dtype.kind not in "iu" or t.shape not in ((), (len(x_t),)):
            raise ConfigError("t", f"must be an int or int [{len(x_t)}], not {t.dtype} {list(t.shape)}")
        if t.min() < 0 or t.max() >= self.preset.num_timesteps:
            raise ConfigError("t", f"must be in [0, {self.preset.num_timesteps})")
        labels, batch_size = self._labels(labels, len(x_t)), self._batch_size(None, len(x_t), most=len(x_t))
        if batch_size not in self._denoise_calls:
            self._denoise_calls[batch_size] = self._trained.over_replicas(
                lambda _, x_t, t, labels: self._trained.denoise_fn(labels)(x_t, t), batch_size
            )
        t = np.broadcast_to(t, len(x_t)).astype(np.int32)
        output = self._denoise_calls[batch_size](0, x_t, t, labels).numpy()
        self._trained.check_finite(output, "outputs")
        return output

    def bits_per_dim(
        self,
        images: np.ndarray,
        *,
        seed: int = 0,
        num_timesteps_estimate: int | None = None,
        batch_size: int | None = None,
        labels: npt.ArrayLike = NO_LABEL,
    ) -> np.ndarray:
        """Measures the variational bound (Eq. 5) of each image; shows progress.

        Costs T network evaluations per image, or `num_timesteps_estimate` + 1. The result of image i is a function of
        the weights, the image, `seed` and i.

        Args:
          images: uint8 [N, H, W, C].
          seed: of the noise, in [0, 2^32).
          num_timesteps_estimate: estimate the sum of the bound without bias from L_0 and this many random terms per
            image; default: all T terms.
          batch_size: images computed at once, over all replicas; default: at most 64.
          labels: indices of `classes`, int [N] or one int, for the bound of log p(x_0 | label); -1 is none.

        Returns:
          Bits/dim, float64 [N].

        Raises:
          ConfigError: an argument does not fit the run.
        """
        check_images(images, self.preset.image_shape)
        if num_timesteps_estimate is not None and num_timesteps_estimate < 1:
            raise ConfigError("num_timesteps_estimate", f"={num_timesteps_estimate} must be greater than 0")
        return bound_of_images(
            self._trained,
            images,
            batch_size=self._batch_size(batch_size, len(images)),
            seed=_check_seed(seed),
            labels=self._labels(labels, len(images)),
            num_timesteps_estimate=num_timesteps_estimate,
        ).total_bpd

    def encode(
        self,
        images: np.ndarray,
        *,
        seed: int = 0,
        target_rmse: float | None = None,
        target_bits_per_dim: float | None = None,
        lossless: bool = False,
        archive: bool = False,
        chunk_bits: int = 24,
        table_images: np.ndarray | None = None,
    ) -> list[bytes]:
        """Compresses images (Section 4.3, Algorithm 3); shows progress. Every prefix of a file decodes.

        The first call for a checkpoint and `chunk_bits` makes a table, up to 150 network evaluations for each of 256
        images, fewer for larger ones, and keeps it in `compression` of the run's folder. A decoder needs this table.

        Args:
          images: uint8 [N, H, W, C].
          seed: image i uses the stream (seed + i) mod 2^16 of random numbers.
          target_rmse: stop at the first step with at most this RMSE on [0, 255]; default: encode all steps.
          target_bits_per_dim: stop at the last step of at most this size, with the header.
          lossless: add the difference between the image and the last prediction.
          archive: put all images into one file, in which they share the header; each still decodes by itself.
          chunk_bits: the largest KL that one index stands for, in [4, 24]. With more, files are smaller, and encoding
            takes longer.
          table_images: uint8 [M, H, W, C], training images to make the table from; default: the preset's own.

        Returns:
          The contents of N .dtfc files, or of one .dtfa archive.

        Raises:
          ConfigError: an argument does not fit the run, or the table needs `table_images`.
          InputError: the table in the run's folder is damaged, or belongs to other weights.
        """
        check_images(images, self.preset.image_shape)
        targets = Targets(target_rmse, target_bits_per_dim, lossless)
        targets.check(images[0].size)
        tables = self._tables(table_images)
        codec = Codec(self._trained, tables.get(chunk_bits))
        files = [image.data for image in encode_images(codec, images, seed=_check_seed(seed), targets=targets)]
        return [pack_archive(files, codec.table.digest)] if archive else files

    def decode(self, files: Sequence[bytes], *, table_images: np.ndarray | None = None) -> np.ndarray:
        """Decompresses files (Algorithm 4), whole or cut off beyond their headers; shows progress.

        Args:
          files: the contents of .dtfc files and .dtfa archives of this run, with N images.
          table_images: as for `encode`, where the run's folder has no table yet.

        Returns:
          uint8 [N, H, W, C].

        Raises:
          InputError: a file is damaged, or belongs to another model or table.
        """
        if not files:
            raise ConfigError("files", "is empty")
        named = {f"files[{i}]": data for i, data in enumerate(files)}
        return np.stack(list(decode_images(self._tables(table_images), open_files(named))))

    def _calibrated(self) -> TrainedModel:
        folder = os.path.join(self.path, "calibration")
        open_train = lambda: open_source(self.preset, "train", self._data)
        return calibrated(
            self._trained, run_calibration(folder, self._trained, self._weights_digest, self.step, open_train)
        )

    def _tables(self, table_images: np.ndarray | None) -> TableStore:
        def open_train() -> ImageSource:
            if table_images is not None:
                check_images(table_images, self.preset.image_shape)
                return array_source(table_images)
            try:
                return open_source(self.preset, "train", self._data)
            except ConfigError as error:
                raise ConfigError("table_images", f"is required: {error}") from error

        folder = os.path.join(self.path, "compression")
        return TableStore(folder, self._trained, self._weights_digest, self.step, open_train=open_train)

    def _labels(self, labels: npt.ArrayLike, num_images: int) -> np.ndarray:
        """Labels of images, one each or one for all, as int32 [num_images].

        Raises:
          ConfigError: their shape or dtype is wrong, or there is no such class.
        """
        labels = np.asarray(labels)
        if labels.dtype.kind not in "iu" or labels.shape not in ((), (num_images,)):
            raise ConfigError(
                "labels", f"must be an int or int [{num_images}], not {labels.dtype} {list(labels.shape)}"
            )
        Condition(tuple(np.unique(labels).tolist())).resolve(self.preset)
        return labels_of_images(labels, num_images)

    def _batch_size(self, batch_size: int | None, num_images: int, most: int = _BATCH_SIZE) -> int:
        """The batch size to use: a multiple of the replicas by default."""
        if batch_size is not None:
            return batch_size
        return shared_batch_size(min(num_images, most), self._trained.strategy)


def load(
    path: str,
    *,
    checkpoint: int | None = None,
    strategy: str | tf.distribute.Strategy = "auto",
    precision: str | None = None,
) -> Run:
    """Loads the EMA weights of a trained run, or the weights of a diffusers folder.

    Args:
      path: a workdir that `train` wrote (may be gs://), a folder of a DDPMPipeline or UNet2DModel in safetensors, or
        the name of weights that ship with the package, `digits` or `cifar10_small`.
      checkpoint: the step of the checkpoint to load; default: the newest. A diffusers folder has none.
      strategy: where to run: `auto`, `tpu`, `mirrored` or `one_device`, or a `tf.distribute.Strategy`. `auto` is a TPU
        where one is attached, all GPUs where there are several, else one device.
      precision: `float32` or `bfloat16` for convolutions and matmuls; default: as in training.

    Raises:
      ConfigError: an argument is wrong.
      InputError: there is no run at `path`, a file is damaged, or no preset describes a diffusers network.
    """
    path = resolve(os.path.expanduser(path))
    is_diffusers = is_diffusers_folder(path)
    preset = preset_from_folder(path) if is_diffusers else Workdir(path).read_preset()
    if precision is not None:
        preset = dataclasses.replace(preset, precision=precision)
    resolved = _resolve_strategy(strategy)
    if is_diffusers:
        return _load_diffusers(path, preset, resolved, checkpoint)
    workdir = Workdir(path)
    step, file = checkpoints.find(workdir.checkpoints, checkpoint)
    trained = TrainedModel.from_checkpoint(preset, resolved, file)
    digest = checkpoints.load_digest(file)
    data, classes = workdir.read_data(), workdir.read_classes()
    return Run(trained, path=path, step=step, weights_digest=digest, data=data, classes=classes)


def train(
    preset: str | Preset | None,
    workdir: str,
    images: Images | None = None,
    *,
    labels: npt.ArrayLike | None = None,
    conditional: bool = False,
    callbacks: Sequence[MetricsCallback] = (),
    data_dir: str | None = None,
    tfrecord: str | None = None,
    strategy: str | tf.distribute.Strategy = "auto",
    init_from: str | None = None,
    allow_recipe_change: bool = False,
) -> Run:
    """Trains up to `preset.num_steps` (Algorithm 1), or resumes from the newest checkpoint in `workdir`.

    A resumed run has the same bits as one that was never stopped. `digits` takes about five minutes on two CPU cores.

    Args:
      preset: a name in `PRESETS`, or a preset: `get_preset("cifar10", num_steps=1000)`. None takes the
        recipe of the run in `workdir`, or of `init_from`, or chooses one by the images.
      workdir: the run's folder (may be gs://). It gets config.json, checkpoints, metrics.jsonl, TensorBoard events and
        sample grids; the command-line programs read it too.
      images: what to train on; default: the preset's own data. An array uint8 [N, H, W, C]; an .npz file; a folder of
        pictures, which are cut and scaled to the preset's shape (64x64 RGB if `preset` is None), and kept as TFRecords
        in ~/.cache; or a `tf.data.Dataset` of images uint8 [H, W, C] or of pairs of these and labels, which is read
        into memory once, 16 GB at most.
      labels: int or str [N], the class of each image of an array; default: none.
      conditional: condition the network on the classes of the images, which need labels.
      callbacks: called as `callback(step, metrics)` after each `steps_per_loop` steps.
      data_dir: the folder of prepared TFDS datasets; default: ~/tensorflow_datasets.
      tfrecord: StyleGAN TFRecords to train on, a file or a glob.
      strategy: as for `load`.
      init_from: start a new run with the EMA weights of another run, by its folder or a checkpoint, or with those of a
        diffusers folder, or that ship with the package (`cifar10_small`). A resumed run does not read them again.
      allow_recipe_change: whether a run that is there may go on with another learning_rate, warmup_steps, grad_clip,
        ema_decay, dropout, loss_type or precision; config.json records the change.

    Returns:
      The run with the EMA weights of its last step.

    Raises:
      ConfigError: an argument is wrong, or `workdir` holds another run or is in use.
      InputError: the data cannot be read, or a file cannot be written.
      DivergedError: training diverged, also after it went back to a checkpoint once.
      PreemptedError: the machine is about to be taken away; the run is saved.
    """
    init_from = init_from and resolve(init_from)
    wanted = _wanted_preset(preset, workdir, init_from)
    if images is not None and (data_dir or tfrecord):
        raise ConfigError("images", ": leave out `data_dir` and `tfrecord`, which name other images")
    if labels is not None and not (isinstance(images, np.ndarray) and conditional):
        raise ConfigError("labels", "go with `conditional=True` and `images` that are an array")
    source, data = _open_images(wanted, images, labels, DataSettings(data_dir=data_dir, tfrecord=tfrecord))
    chosen = wanted or choose_preset(source.image_shape, source.num_examples)
    if not wanted and (warning := copying_warning(chosen, source.num_examples)):
        logging.warning("%s", warning)
    if conditional:
        chosen = conditional_preset(chosen, source)
    resolved = _resolve_strategy(strategy)
    train_in_workdir(
        chosen,
        resolved,
        source,
        workdir,
        command=f"diffusion_tf.train({chosen}, {workdir!r})\n",
        data=data,
        initial=initial_weights(Workdir(workdir), init_from, chosen),
        callbacks=callbacks,
        allow_recipe_change=allow_recipe_change,
    )
    return load(workdir, strategy=resolved)


def _wanted_preset(preset: str | Preset | None, workdir: str, init_from: str | None) -> Preset | None:
    """The recipe that `train` asks for; None if the images are to decide."""
    if isinstance(preset, str):
        return get_preset(preset)
    if preset is None and Workdir(workdir).holds_run():
        return Workdir(workdir).read_preset()
    return fine_tuning_preset(init_from, {}) if preset is None and init_from else preset


def _open_images(
    preset: Preset | None, images: Images | None, labels: npt.ArrayLike | None, data: DataSettings
) -> tuple[ImageSource, DataSettings]:
    """The training images as `train` takes them, and where measurements find them."""
    shape = preset.image_shape if preset else None
    if isinstance(images, str | os.PathLike):
        path = os.fspath(images)
        data = DataSettings(npz=path) if path.lower().endswith(".npz") else DataSettings(images=path)
        return open_images(data, "train", lambda own: shape or own), data
    if images is None:
        if preset is None:
            raise ConfigError("preset", "is required without `images` to choose one by")
        return open_source(preset, "train", data), data
    if isinstance(images, tf.data.Dataset):
        images, labels = materialize(images)
    check_images(images, shape)
    return array_source(images, labels=labels), PRESETS_OWN


def _load_diffusers(folder: str, preset: Preset, strategy: tf.distribute.Strategy, checkpoint: int | None) -> Run:
    if checkpoint is not None:
        raise ConfigError("checkpoint", f"={checkpoint}: {folder} is a diffusers folder, which has no checkpoints")
    check_size(folder, preset)
    with strategy.scope():
        model = UNet.from_preset(preset, weights="frozen")
    weights, digest = read_ema(folder, preset, model)
    for name, variable in zip(model.weight_names, model.trainable_variables, strict=True):
        variable.assign(weights[name])
    model.freeze()
    trained = TrainedModel(preset, strategy, model)
    trained.name = folder
    return Run(trained, path=folder, step=0, weights_digest=digest)


def _resolve_strategy(strategy: str | tf.distribute.Strategy) -> tf.distribute.Strategy:
    if strategy == "multi_worker" or isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        raise ConfigError(
            "strategy", "=multi_worker trains by the command `diffusion-tf train`, one process per worker"
        )
    return make_strategy(strategy) if isinstance(strategy, str) else strategy


def _sampler_settings(sampler: str | SamplerSettings | None, steps: int | None) -> SamplerSettings:
    """The settings of a sampler by name, or these settings with other `steps` if those are given."""
    if isinstance(sampler, SamplerSettings):
        return sampler if steps is None else dataclasses.replace(sampler, steps=steps)
    return SamplerSettings(sampler, steps)


def _check_seed(seed: int) -> int:
    if not 0 <= seed < 2**32:
        raise ConfigError("seed", f"={seed} must be in [0, 2^32)")
    return seed


def _comma(shape: Sequence[Any]) -> str:
    return ", ".join(map(str, shape))
