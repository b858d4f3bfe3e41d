"""Measures what a training step costs on this machine."""

import dataclasses
import time

import numpy as np
import tensorflow as tf

from diffusion_tf.budgets import Cost
from diffusion_tf.data.arrays import array_source
from diffusion_tf.presets import Preset
from diffusion_tf.training.trainer import Trainer

_STEPS = 3  # that are measured, after the first one


def measure_cost(preset: Preset, strategy: tf.distribute.Strategy) -> Cost:
    """Compiles the training step of `preset` and takes four steps with black images; classes cost nothing.

    Raises:
      ConfigError: the preset cannot be trained.
    """
    start = time.monotonic()
    preset = dataclasses.replace(preset, num_classes=0)
    trainer = Trainer(preset, strategy)
    batches = trainer.batches(array_source(np.zeros((preset.batch_size, *preset.image_shape), np.uint8)))
    trainer.run_steps(batches, tf.constant(1))
    first = time.monotonic()
    trainer.run_steps(batches, tf.constant(_STEPS))
    step_seconds = (time.monotonic() - first) / _STEPS
    return Cost(max(0.0, first - start - step_seconds), step_seconds)
