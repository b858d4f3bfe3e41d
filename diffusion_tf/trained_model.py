"""A network with the weights to use, and its diffusion: what samples and measurements are made of."""

from collections.abc import Callable, Sequence

import tensorflow as tf

from diffusion_tf.diffusion_utils import DenoiseFn, GaussianDiffusion
from diffusion_tf.ops.cpu import onednn, regions
from diffusion_tf.presets import Preset
from diffusion_tf.runtime.replicas import filled_up, over_replicas
from diffusion_tf.storage import checkpoints
from diffusion_tf.storage.checkpoints import assign_arrays
from diffusion_tf.unet import UNet

# Of the images that a CPU works out at once: it is no faster with more, and their feature maps take memory.
_MOST_PIXELS = 2**17


class TrainedModel:
    """The network and the diffusion of a preset, on the devices of a strategy.

    Args:
      preset: which network and diffusion.
      strategy: where they run.
      model: the network; default: a new one, that holds its weights as they are multiplied.
      weights: the weights to use, in the order of `model.trainable_variables`; default: the network's own.
      weights_stay: nothing assigns them once they are used, so that a CPU may keep them in an order of its own and
        overlook what is assigned nevertheless.
    """

    def __init__(
        self,
        preset: Preset,
        strategy: tf.distribute.Strategy,
        model: UNet | None = None,
        weights: Sequence[tf.Variable] | None = None,
        weights_stay: bool = False,
    ):
        self.preset = preset
        self.strategy = strategy
        self.diffusion = GaussianDiffusion.from_preset(preset)
        if model is None:
            with strategy.scope():
                model = UNet.from_preset(preset, for_inference=True)
        self.model = model
        self.weights = weights or [v.value for v in model.trainable_variables]
        self.weights_stay = weights_stay

    @classmethod
    def from_checkpoint(cls, preset: Preset, strategy: tf.distribute.Strategy, path: str) -> "TrainedModel":
        """The network with the EMA weights of the checkpoint at `path`.

        Raises:
          InputError: the file is damaged, or is of another network.
        """
        trained = cls(preset, strategy, weights_stay=True)
        load_ema(trained.model, path)
        return trained

    def denoise_fn(self) -> DenoiseFn:
        """The network as a pure function, its weights read once; call it where a replica runs, outside of loops."""
        denoise = self.model.denoise_fn(self.weights)
        if self.weights_stay:
            denoise = onednn.weights_stay()(denoise)
        return _in_parts(denoise) if regions.in_cpu_graph() else denoise

    def over_replicas(self, function: Callable, batch_size: int) -> Callable:
        """`distribution.over_replicas`, of a function that calls the network."""
        in_regions = regions.suit(self.preset.image_size)
        return over_replicas(function, self.strategy, batch_size, in_regions)


def _in_parts(denoise: DenoiseFn) -> DenoiseFn:
    """The same, a few images after the others where they are large."""

    def denoise_parts(x_t, t):
        batch, height, width, _ = x_t.shape
        most = max(1, _MOST_PIXELS // (height * width))
        if batch <= most:
            return denoise(x_t, t)
        count = -(-batch // most)
        size = -(-batch // count)
        parts = [tf.reshape(filled_up(a, count * size), [count, size, *a.shape[1:]]) for a in (x_t, t)]
        y = tf.map_fn(lambda part: denoise(*part), parts, parallel_iterations=1, fn_output_signature=tf.float32)
        return tf.reshape(y, [count * size, *y.shape[2:]])[:batch]

    return denoise_parts


def load_ema(model: UNet, path: str) -> None:
    """Puts the EMA weights of the checkpoint at `path` into `model`.

    Raises:
      InputError: the file is damaged, or is of another network.
    """
    variables = {f"ema/{n}": v.value for n, v in zip(model.weight_names, model.trainable_variables, strict=True)}
    # A checkpoint holds three more of the kind, and the step.
    size = 4 * sum(4 * v.shape.num_elements() for v in variables.values()) + 8
    arrays = {name: array for name, array in checkpoints.load(path, size).items() if name.startswith("ema/")}
    assign_arrays(variables, arrays, path)
