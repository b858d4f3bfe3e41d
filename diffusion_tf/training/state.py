"""What a run is made of: weights, EMA, Adam's moments and the step; how they move, and how they are saved."""

import numpy as np
import tensorflow as tf

from diffusion_tf.presets import Preset
from diffusion_tf.storage import checkpoints
from diffusion_tf.storage.checkpoints import assign_arrays
from diffusion_tf.storage.files import Arrays
from diffusion_tf.training.optimizer import StateTensors
from diffusion_tf.unet import UNet


class TrainState:
    """What a run is made of: the model, its EMA, Adam's moments and the step, as variables of one strategy."""

    def __init__(self, preset: Preset, strategy: tf.distribute.Strategy):
        with strategy.scope():
            self.model = UNet.from_preset(preset)
            self.params = [v.value for v in self.model.trainable_variables]
            # The shadow weights start as the weights (Appendix B: decay 0.9999, no correction for the start).
            self.ema = [tf.Variable(w.numpy(), trainable=False, name="ema") for w in self.params]
            self.adam_m = [tf.Variable(tf.zeros(w.shape), trainable=False, name="adam_m") for w in self.params]
            self.adam_v = [tf.Variable(tf.zeros(w.shape), trainable=False, name="adam_v") for w in self.params]
            self.step = tf.Variable(0, trainable=False, dtype=tf.int64, name="step")

    def _named_variables(self) -> dict[str, tf.Variable]:
        groups = {"params": self.params, "ema": self.ema, "adam_m": self.adam_m, "adam_v": self.adam_v}
        names = self.model.weight_names
        named = {f"{group}/{name}": v for group, vs in groups.items() for name, v in zip(names, vs, strict=True)}
        return {**named, "step": self.step}

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Every variable by name, as a checkpoint holds it."""
        return {name: np.asarray(variable.numpy()) for name, variable in self._named_variables().items()}

    def restore(self, path: str) -> None:
        """Takes every variable from the checkpoint at `path`; nothing changes where it does not fit.

        Raises:
          InputError: the file is damaged, or its names, shapes or dtypes are not this state's.
        """
        variables = self._named_variables()
        size = sum(v.shape.num_elements() * v.dtype.size for v in variables.values())
        assign_arrays(variables, checkpoints.load(path, size), path)

    def tensors(self) -> StateTensors:
        """The state as a step in replica context reads it."""
        variables = StateTensors(self.params, self.ema, self.adam_m, self.adam_v, self.step)
        return tf.nest.map_structure(tf.convert_to_tensor, variables)

    def assign(self, tensors: StateTensors) -> None:
        """Takes over the state after a step, in replica context; it is equal on all replicas."""
        variables = [*self.params, *self.ema, *self.adam_m, *self.adam_v, self.step]

        def assign_all(strategy, values):
            for variable, value in zip(variables, values, strict=True):
                strategy.extended.update(variable, lambda v, new: v.assign(new), args=(value,))

        tf.distribute.get_replica_context().merge_call(assign_all, args=(tf.nest.flatten(tensors),))


def state_arrays(weights: Arrays, ema: Arrays, adam: tuple[Arrays, Arrays] | None = None, step: int = 0) -> Arrays:
    """What a run's checkpoint holds; Adam's moments are zeros where there are none, and then the step is 0.

    At a later step Adam would take zeros for converged averages and make steps that are several times too large.
    """
    if adam is None:
        zeros = {name: np.zeros_like(w) for name, w in weights.items()}
        adam, step = (zeros, zeros), 0
    groups = {"params": weights, "ema": ema, "adam_m": adam[0], "adam_v": adam[1]}
    named = {f"{group}/{name}": array for group, arrays in groups.items() for name, array in arrays.items()}
    return {**named, "step": np.asarray(step, np.int64)}
