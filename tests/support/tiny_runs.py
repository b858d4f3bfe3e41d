"""Training runs of six steps of a tiny network."""

import pathlib

import numpy as np

from diffusion_tf.data import open_source
from diffusion_tf.presets import Preset, get_preset
from diffusion_tf.runtime.strategies import make_strategy
from diffusion_tf.storage.workdir import Workdir
from diffusion_tf.training.loop import train
from diffusion_tf.training.trainer import Trainer

TINY = get_preset(
    "digits", num_steps=6, steps_per_loop=2, checkpoint_every=2, sample_every=0, batch_size=16, warmup_steps=2,
    num_timesteps=20, dropout=0.1, random_flip=True, ch_mult=(1,),
)  # fmt: skip


def run(folder: pathlib.Path, preset: Preset = TINY, **options) -> dict[str, np.ndarray]:
    """Trains in `folder` on one device, with the options of `train`, and returns the arrays of the final state."""
    trainer = Trainer(preset, make_strategy("one_device"))
    train(trainer, Workdir(str(folder)), open_source(preset), **options)
    return trainer.state.to_arrays()


def assert_equal_arrays(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
