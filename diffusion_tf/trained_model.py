"""A network with the weights to use, and its diffusion: samplers and measurements start from here."""

from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf
from numpy.typing import ArrayLike

from diffusion_tf.conditioning import NO_LABEL
from diffusion_tf.diffusion_utils import DenoiseFn, GaussianDiffusion, check_finite
from diffusion_tf.presets import Preset
from diffusion_tf.runtime.microbatches import map_microbatches
from diffusion_tf.runtime.replicas import cpu_backend, over_replicas
from diffusion_tf.runtime.workers import assign_on_hosts
from diffusion_tf.storage import checkpoints
from diffusion_tf.storage.checkpoints import assign_arrays
from diffusion_tf.unet import UNet

MICROBATCH_PIXELS = 2**17


class TrainedModel:
    """The network and the diffusion of a preset, on the devices of a strategy.

    Args:
      preset: which network and diffusion.
      strategy: where they run.
      model: the network; default: a new one, with weights for inference. A frozen one is frozen at its first use.
      weights: the weights to use, in the order of `model.trainable_variables`; default: the network's own.

    Attributes:
      name: what errors call the weights, such as the path of a checkpoint.
      eps_scale: factors [T] by which the predicted noise is multiplied, or None.
    """

    eps_scale: np.ndarray | None = None

    name = "these weights"

    frozen = False  # whether programs may keep reordered copies of the weights

    def __init__(
        self,
        preset: Preset,
        strategy: tf.distribute.Strategy,
        model: UNet | None = None,
        weights: Sequence[tf.Variable] | None = None,
    ):
        self.preset = preset
        self.strategy = strategy
        self.diffusion = GaussianDiffusion.from_preset(preset, shows_overflow=True)
        if model is None:
            with strategy.scope():
                model = UNet.from_preset(preset, weights="inference")
        self.model = model
        self.frozen = model.frozen and weights is None
        self.weights = weights or [v.value for v in model.trainable_variables]

    @classmethod
    def from_checkpoint(
        cls, preset: Preset, strategy: tf.distribute.Strategy, path: str, *, group: str = "ema"
    ) -> "TrainedModel":
        """The network with the EMA weights of the checkpoint at `path`, or those of the group `params`, frozen.

        Raises:
          InputError: the file is damaged, or holds another network.
        """
        with strategy.scope():
            model = UNet.from_preset(preset, weights="frozen")
        load_weights(model, path, group)
        model.freeze()
        trained = cls(preset, strategy, model)
        trained.name = path
        return trained

    def check_finite(self, values: ArrayLike, what: str, *, first: int = 0, t: int | None = None) -> None:
        """`diffusion_utils.check_finite` of results of the network, the last of them at timestep `t` if that is known.

        Raises:
          NotFiniteError: some values are NaN or infinite.
        """
        where = "" if t is None else f" at t = {t}"
        remedy = "`precision=float32`" if self.preset.precision == "bfloat16" else "another `checkpoint`"
        check_finite(values, what, first=first, why=f"{where}: the network of {self.name} overflows, use {remedy}")

    def denoise_fn(
        self,
        labels: tf.Tensor | None = None,
        guidance: float = 0.0,
        *,
        microbatch_pixels: int = MICROBATCH_PIXELS,
    ) -> DenoiseFn:
        """The network as a pure function, its weights read once; call it where a replica runs, outside of loops.

        Args:
          labels: int32 [B], the label of each image, -1 for none; default: none. A network without classes ignores it.
          guidance: as in `guided`; 0 is none.
          microbatch_pixels: the most pixels of a microbatch on a CPU.
        """
        if self.frozen:
            self.model.freeze()
        network = self.model.denoise_fn(self.weights)
        max_size = max(1, microbatch_pixels // self.preset.image_pixels)

        def denoise(*arrays: tf.Tensor) -> tf.Tensor:
            return map_microbatches(lambda _, *arrays: network(*arrays), arrays, max_size=max_size)

        with_labels = labels is not None and self.preset.num_classes
        denoise_fn = guided(denoise, labels, guidance, self.preset.channels) if with_labels else denoise
        return denoise_fn if self.eps_scale is None else scaled(denoise_fn, self.eps_scale, self.preset.channels)

    def over_replicas(self, function: Callable, batch_size: int) -> Callable:
        """`runtime.replicas.over_replicas` of a function that calls the network."""
        on_cpu = cpu_backend(self.preset.image_pixels, frozen_weights=self.frozen)
        return over_replicas(function, self.strategy, batch_size, on_cpu)


def guided(network: Callable[..., tf.Tensor], labels: tf.Tensor, guidance: float, channels: int) -> DenoiseFn:
    """Classifier-free guidance (Ho & Salimans 2022, Eq. 6): (1 + w) f(x, label) - w f(x).

    One evaluation of 2 B images; of B without guidance. Images without a label are not guided.

    Args:
      network: f, called as network(x_t, t, labels).
      labels: int32 [B]; -1 is none.
      guidance: w.
      channels: C; f(x, label) gives further channels, the learned variances, alone.
    """

    def denoise(x_t: tf.Tensor, t: tf.Tensor) -> tf.Tensor:
        if not guidance:
            return network(x_t, t, labels)
        both = (tf.concat(pair, axis=0) for pair in ((x_t, x_t), (t, t), (labels, tf.fill(labels.shape, NO_LABEL))))
        conditional, unconditional = tf.split(network(*both), 2)
        mean = (1.0 + guidance) * conditional[..., :channels] - guidance * unconditional[..., :channels]
        return tf.concat([mean, conditional[..., channels:]], axis=-1)

    return denoise


def scaled(network: DenoiseFn, eps_scale: np.ndarray, channels: int) -> DenoiseFn:
    """The network with its predicted noise multiplied by a factor that depends on t.

    Args:
      network: predicts eps, and maybe variances in further channels.
      eps_scale: the factors [T].
      channels: C.
    """

    def denoise(x_t: tf.Tensor, t: tf.Tensor) -> tf.Tensor:
        output = network(x_t, t)
        factor = tf.reshape(tf.gather(tf.constant(eps_scale, output.dtype), t), [-1, 1, 1, 1])
        return tf.concat([factor * output[..., :channels], output[..., channels:]], axis=-1)

    return denoise


def load_ema(model: UNet, path: str) -> None:
    """Loads the EMA weights of the checkpoint at `path` into `model`; errors are those of `load_weights`."""
    load_weights(model, path, "ema")


def load_weights(model: UNet, path: str, group: str) -> None:
    """Loads the weights `ema` or `params` of the checkpoint at `path` into `model`.

    Raises:
      InputError: the file is damaged, or holds another network.
      RuntimeError: the network is frozen.
    """
    prefix = f"{group}/"
    variables = {f"{prefix}{n}": v.value for n, v in zip(model.weight_names, model.trainable_variables, strict=True)}
    # A checkpoint holds four such groups of variables, and the step.
    size = 4 * sum(4 * v.shape.num_elements() for v in variables.values()) + 8
    arrays = {name: array for name, array in checkpoints.load(path, size).items() if name.startswith(prefix)}
    assign_arrays(variables, arrays, path, assign_on_hosts)
