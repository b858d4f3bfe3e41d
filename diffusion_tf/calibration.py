"""How large the predicted noise is beside the true noise, by timestep; and samples that make up for the difference."""

import copy
import math
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from numpy.typing import ArrayLike

from diffusion_tf.conditioning import NO_LABEL, labels_of_images
from diffusion_tf.data.source import ImageReader, ImageSource
from diffusion_tf.diffusion_utils import images_to_x, mean_flat
from diffusion_tf.errors import ConfigError, InputError
from diffusion_tf.progress_bar import progress_bar
from diffusion_tf.rng import CounterRng
from diffusion_tf.runtime.replicas import shared_batch_size
from diffusion_tf.storage.files import check_writable
from diffusion_tf.storage.json_files import read_json, write_json
from diffusion_tf.storage.records import Calibration as CalibrationRecord
from diffusion_tf.trained_model import TrainedModel

_TIMESTEPS, _VALUES, _LEAST_IMAGES, _BATCH_SIZE = 12, 2**16, 16, 64  # of the calibration of a run


class Calibration(NamedTuple):
    """Moments of the true noise eps and the predicted noise eps_hat at K timesteps, each a mean over all dimensions.

    Attributes:
      timesteps: int [K].
      cross: E[eps eps_hat], float64 [K].
      power: E[eps_hat^2], float64 [K].
      loss: E[(eps - eps_hat)^2], float64 [K]; for a network that predicts eps, L_simple at these timesteps.
    """

    timesteps: np.ndarray
    cross: np.ndarray
    power: np.ndarray
    loss: np.ndarray

    @property
    def scale(self) -> np.ndarray:
        """The factor c of eps_hat with the least squared error, E[eps eps_hat] / E[eps_hat^2], float64 [K].

        It is 1 for the optimal network. Above 1, the network predicts too little noise.
        """
        return self.cross / self.power


def run_calibration(
    folder: str, trained: TrainedModel, checkpoint_digest: str, step: int, open_train: Callable[[], ImageSource]
) -> Calibration:
    """The calibration of a run's checkpoint, read from its file, or measured on training images and written there.

    Measuring takes 12 network evaluations for each of 1,024 digits, or of 21 CIFAR-10 images.

    Args:
      folder: folder of the files, by convention `calibration` in the run's; may be gs://.
      trained: the network with the checkpoint's EMA weights.
      checkpoint_digest: digest of the checkpoint (`checkpoints.load_digest`).
      step: step of the checkpoint, part of the file's name.
      open_train: opens the training images; called only to measure.

    Raises:
      ConfigError: the run has no training images.
      InputError: the file is damaged, or belongs to other weights or another precision; or it cannot be written.
    """
    path = os.path.join(folder, f"step_{step:08d}.json")
    subject = {"checkpoint": checkpoint_digest, "precision": trained.preset.precision}
    if tf.io.gfile.exists(path):
        record = read_json(path, CalibrationRecord)
        if {name: record[name] for name in subject} != subject:
            raise InputError(f"{path} was made for other weights or another `precision`: remove it to make a new one")
        return Calibration(*(np.array(record[name]) for name in Calibration._fields))
    check_writable(path)
    try:
        source, last = open_train(), trained.diffusion.num_timesteps - 1
    except ConfigError as error:
        raise ConfigError("calibrate", f"needs the run's training images: {error}") from error
    count = min(max(_LEAST_IMAGES, _VALUES // math.prod(trained.preset.image_shape)), source.num_examples)
    calibration = measure_calibration(
        trained,
        np.asarray(ImageReader(source)(0, count)),
        timesteps=np.unique(np.round(last * np.linspace(0.0, 1.0, _TIMESTEPS) ** 2).astype(int)).tolist(),
        seed=0,
        batch_size=shared_batch_size(min(count, _BATCH_SIZE), trained.strategy),
    )
    arrays = {name: value.tolist() for name, value in calibration._asdict().items()}
    write_json(path, {**subject, "num_images": count, **arrays})
    return calibration


def calibrated(trained: TrainedModel, calibration: Calibration) -> TrainedModel:
    """The same model with its predicted noise multiplied by `calibration.scale`, interpolated over t.

    Raises:
      ConfigError: the network does not predict eps.
    """
    if trained.preset.model_mean_type != "eps":
        raise ConfigError("calibrate", f"scales eps, and this run predicts {trained.preset.model_mean_type}")
    order = np.argsort(calibration.timesteps)
    scaled = copy.copy(trained)
    scaled.eps_scale = np.interp(
        np.arange(trained.diffusion.num_timesteps), calibration.timesteps[order], calibration.scale[order]
    )
    return scaled


def measure_calibration(
    trained: TrainedModel,
    images: np.ndarray,
    *,
    timesteps: Sequence[int],
    seed: int,
    batch_size: int,
    labels: ArrayLike = NO_LABEL,
) -> Calibration:
    """Compares predicted and true noise on x_t ~ q(x_t | x_0), with a progress bar.

    One network evaluation for each image and timestep. The noise of an image depends on the seed, t and its index.

    Args:
      trained: the network, its weights, and where to run.
      images: uint8 [N, H, W, C].
      timesteps: the timesteps to measure, in [0, T).
      seed: int in [0, 2^32).
      batch_size: images of one call, over all replicas.
      labels: the label of each image, int or int [N]; -1 is none.

    Raises:
      ConfigError: the batch size is not divisible by the replicas.
      NotFiniteError: a prediction is not finite.
    """
    diffusion, of_images = trained.diffusion, labels_of_images(labels, len(images))
    abar = diffusion.schedule.alphas_cumprod
    signal_to_noise = np.sqrt(abar / (1.0 - abar))

    def moments(first: tf.Tensor, images: tf.Tensor, labels: tf.Tensor, t: tf.Tensor) -> list[tf.Tensor]:
        x_start = images_to_x(images)
        eps = CounterRng(seed, t[0], first).normal("calibration", images.shape)
        x_t = diffusion.q_sample(x_start, t, eps)
        p = diffusion.p_mean_variance(trained.denoise_fn(labels), x_t, t, clip_denoised=False)
        # Whatever the network predicts, eps_hat is the noise that leads from pred_xstart to x_t. So eps - eps_hat is
        # sqrt(abar / (1 - abar)) (pred_xstart - x_start).
        error = tf.reshape(tf.gather(tf.constant(signal_to_noise, tf.float32), t), [-1, 1, 1, 1])
        error *= p.pred_xstart - x_start
        eps_hat = eps - error
        return [mean_flat(values) for values in (eps * eps_hat, eps_hat**2, error**2)]

    call = trained.over_replicas(moments, batch_size)
    means = np.zeros((3, len(timesteps)))
    for i, t in enumerate(progress_bar(timesteps, unit="timestep", desc="calibration")):
        for first in range(0, len(images), batch_size):
            batch = slice(first, first + batch_size)
            ts = np.full(len(images[batch]), t, np.int32)
            values = np.stack(call(first, images[batch], of_images[batch], ts))
            trained.check_finite(values.T, "noise predicted of images", first=first, t=t)
            means[:, i] += values.astype(np.float64).sum(axis=1) / len(images)
    return Calibration(np.asarray(timesteps), *means)
