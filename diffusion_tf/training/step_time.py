"""Measures what a training step costs on this machine."""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_tf.budgets import Cost
from diffusion_tf.data.arrays import array_source
from diffusion_tf.presets import Preset
from diffusion_tf.training.trainer import Trainer

_STEPS = 3  # that are measured, after the first one


def measure_cost(preset: Preset, strategy: tf.distribute.Strategy) -> Cost:
    """Compiles the training step of `preset` twice and takes five steps with black images; classes cost nothing.

    The second compilation counts, as training compiles the step again: on a CPU it takes a fifth of the first.

    Raises:
      ConfigError: the preset cannot be trained.
    """
    preset = dataclasses.replace(preset, num_classes=0)
    _first_step(preset, strategy)
    start = time.monotonic()
    trainer, batches = _first_step(preset, strategy)
    first = time.monotonic()
    trainer.run_steps(batches, tf.constant(_STEPS))
    step_seconds = (time.monotonic() - first) / _STEPS
    return Cost(max(0.0, first - start - step_seconds), step_seconds)


def _first_step(preset: Preset, strategy: tf.distribute.Strategy) -> tuple[Trainer, Iterator[Any]]:
    """A trainer that has compiled and taken its first step, and the batches of black images to go on with."""
    trainer = Trainer(preset, strategy)
    batches = trainer.batches(array_source(np.zeros((preset.batch_size, *preset.image_shape), np.uint8)))
    trainer.run_steps(batches, tf.constant(1))
    return trainer, batches
