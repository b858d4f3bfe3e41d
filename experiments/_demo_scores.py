"""What the demos on digits and on pictures have in common: samples, a picture of them, and scores for the report."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_tf import figures
from diffusion_tf.evaluation.feature_networks import FeatureNetwork
from diffusion_tf.evaluation.scores import compute_scores
from diffusion_tf.samplers import Sampler
from diffusion_tf.solvers import SamplerSettings
from diffusion_tf.storage import checkpoints
from diffusion_tf.storage.files import Arrays, write_file
from diffusion_tf.storage.npz_files import write_npz
from diffusion_tf.storage.workdir import Workdir
from diffusion_tf.trained_model import TrainedModel

_SHOWN = 100  # images of each kind
_SEED = 0


def draw_samples(
    workdir: Workdir, trained: TrainedModel, step: int, settings: SamplerSettings, *, num_samples: int, batch_size: int
) -> tuple[np.ndarray, str]:
    """Draws samples and writes them to the workdir: (uint8 [num_samples, H, W, C], the path of the .npz file)."""
    samples = Sampler(trained, batch_size=batch_size, seed=_SEED, settings=settings).draw(num_samples)
    path = os.path.join(workdir.samples, f"samples_{step:08d}.npz")
    write_npz(path, samples=samples)
    return samples, path


def write_picture(workdir: Workdir, step: int, samples: np.ndarray, real: np.ndarray, what: str) -> str:
    """Writes a picture of samples beside real images, which it calls `what`, and returns its path."""
    shown = {f"{_SHOWN} samples, step {step}": samples[:_SHOWN], f"{len(real[:_SHOWN])} {what}": real[:_SHOWN]}
    path = os.path.join(workdir.samples, "samples_and_real.png")
    write_file(path, figures.captioned_grids({name: figures.square_grid(images) for name, images in shown.items()}))
    return path


def record_scores(
    workdir: Workdir,
    trained: TrainedModel,
    step: int,
    checkpoint: str,
    settings: SamplerSettings,
    network: FeatureNetwork,
    metrics: Sequence[str],
    *,
    samples: np.ndarray,
    real: np.ndarray,
    images: str,
) -> tuple[dict[str, Any], Arrays]:
    """Scores samples against real images, called `images`, and records it for the report.

    Returns:
      The scores, and the outputs of `network` for the real images.
    """
    real_features, features = (
        {name: value.numpy() for name, value in network.apply(tf.cast(pixels, tf.float32)).items()}
        for pixels in (real, samples)
    )
    scores = compute_scores(metrics, network.name, real_features, features)
    evaluation = {
        "step": step,
        "checkpoint_sha256": checkpoints.load_digest(checkpoint),
        "seed": _SEED,
        "compute_dtype": trained.preset.precision,
        **settings.describe(trained.preset),
        "num_samples": len(samples),
        "metrics": list(metrics),
        "reference": {"images": images, "num_images": len(real), "features": network.name},
        **scores,
    }
    if evaluation not in workdir.read_evaluations():
        workdir.append_evaluation(evaluation)
    return scores, real_features
