"""The training state: weights, their EMA, Adam's moments and the step, as variables and as a checkpoint's arrays."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf

from diffusion_tf.presets import Preset
from diffusion_tf.runtime.workers import assign_on_hosts
from diffusion_tf.storage import checkpoints
from diffusion_tf.storage.checkpoints import assign_arrays
from diffusion_tf.storage.files import Arrays
from diffusion_tf.training.optimizer import StateTensors
from diffusion_tf.unet import CLASSES, UNet


@dataclasses.dataclass(frozen=True)
class InitialWeights:
    """Weights with which a new run starts.

    Attributes:
      path: where they come from.
      sha256: what identifies them.
      weights: float32 arrays by weight name.
    """

    path: str
    sha256: str
    weights: Arrays


class TrainState:
    """The training state as variables of a strategy.

    Attributes:
      model: the network.
      params: its weights, in the order of `model.trainable_variables`, as all lists here.
      ema: the exponential moving average of the weights.
      adam_m: Adam's first moments.
      adam_v: Adam's second moments.
      step: training steps taken, int64.
    """

    def __init__(self, preset: Preset, strategy: tf.distribute.Strategy):
        with strategy.scope():
            self.model = UNet.from_preset(preset)
            self.params = [v.value for v in self.model.trainable_variables]
            # The EMA starts as the weights themselves, with no bias correction.
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
        """Every variable by its name in a checkpoint."""
        return {name: np.asarray(variable.numpy()) for name, variable in self._named_variables().items()}

    def restore(self, path: str) -> None:
        """Assigns every variable from the checkpoint at `path`; if it does not fit, nothing changes.

        Raises:
          InputError: the file is damaged, or its names, shapes or dtypes are not this state's.
        """
        variables = self._named_variables()
        size = sum(v.shape.num_elements() * v.dtype.size for v in variables.values())
        assign_arrays(variables, checkpoints.load(path, size), path, assign_on_hosts)

    def start_from(self, initial: InitialWeights) -> None:
        """Assigns weights to `params` and to their EMA.

        A table of classes keeps its initial values unless the weights have one of the same shape.

        Raises:
          InputError: the weights are those of another network; nothing has changed.
        """
        for values in (self.params, self.ema):
            variables = dict(zip(self.model.weight_names, values, strict=True))
            weights = dict(initial.weights)
            table, given = variables.get(CLASSES), weights.get(CLASSES)
            if table is None or given is None or given.shape != table.shape:
                variables.pop(CLASSES, None)
                weights.pop(CLASSES, None)
            assign_arrays(variables, weights, initial.path, assign_on_hosts)

    def tensors(self) -> StateTensors:
        """The state as tensors. Call it in replica context."""
        variables = StateTensors(self.params, self.ema, self.adam_m, self.adam_v, self.step)
        return tf.nest.map_structure(tf.convert_to_tensor, variables)

    def assign(self, tensors: StateTensors) -> None:
        """Assigns the state after a step, equal on all replicas. Call it in replica context."""
        variables = [*self.params, *self.ema, *self.adam_m, *self.adam_v, self.step]

        def assign_all(strategy: tf.distribute.Strategy, values: Sequence[tf.Tensor]) -> None:
            for variable, value in zip(variables, values, strict=True):
                strategy.extended.update(variable, lambda v, new: v.assign(new), args=(value,))

        tf.distribute.get_replica_context().merge_call(assign_all, args=(tf.nest.flatten(tensors),))


def state_arrays(
    weights: Mapping[str, np.ndarray],
    ema: Mapping[str, np.ndarray],
    adam: tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]] | None = None,
    step: int = 0,
) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint, as `TrainState.to_arrays` names them, from those of its groups by weight name.

    Args:
      weights: the weights.
      ema: their EMA.
      adam: Adam's first and second moments. Without them both are zeros and the step is 0: at a later step, Adam's bias
        correction would take the zeros for converged averages, and its steps would be several times too large.
      step: training steps taken.
    """
    if adam is None:
        zeros = {name: np.zeros_like(w) for name, w in weights.items()}
        adam, step = (zeros, zeros), 0
    groups = {"params": weights, "ema": ema, "adam_m": adam[0], "adam_v": adam[1]}
    named = {f"{group}/{name}": array for group, arrays in groups.items() for name, array in arrays.items()}
    return {**named, "step": np.asarray(step, np.int64)}
