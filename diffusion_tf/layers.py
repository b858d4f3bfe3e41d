"""The Keras layers of the U-Net, and the model that holds them: variables, names, seeds and dtypes.

The layers call `ops` for what they compute.
"""

import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn, get_args

import keras
import tensorflow as tf

from diffusion_tf import ops
from diffusion_tf.errors import ConfigError
from diffusion_tf.ops import attention
from diffusion_tf.rng import CounterRng

WeightsMode = Literal["trainable", "inference", "frozen"]

NUM_GROUPS = 32

# The scale of the last layer of each branch: near zero, so that every block starts as the identity.
NEAR_ZERO = 1e-10


class GroupNorm(keras.layers.Layer):
    """Group normalisation with 32 groups, in float32: maps [B, H, W, C_i], side by side, to one [B, H, W, sum C_i]."""

    def __init__(self, channels: int, name: str, epsilon: float, swish: bool = False):
        super().__init__(name=name, dtype="float32", autocast=False)
        self.epsilon, self.swish = epsilon, swish
        _built(self, channels)

    def build(self, shape: Sequence[int | None]) -> None:
        """Creates the variables for maps that have this shape side by side."""
        self.gamma = self.add_weight(name="gamma", shape=shape[-1:], initializer="ones")
        self.beta = self.add_weight(name="beta", shape=shape[-1:], initializer="zeros")

    def call(
        self,
        maps: Sequence[tf.Tensor],
        offset: tf.Tensor | None = None,
        keep: tf.Tensor | None = None,
        rate: float = 0.0,
    ) -> tf.Tensor:
        """Normalises maps + offset, then applies swish (if the layer has it) and the dropout mask `keep`.

        Args:
          maps: [B, H, W, C_i].
          offset: [B, sum C_i], or None.
          keep: bool [B, H, W, sum C_i], or None: no dropout.
          rate: the dropout rate.
        """
        gamma, beta = tf.convert_to_tensor(self.gamma), tf.convert_to_tensor(self.beta)
        return ops.group_norm(
            maps,
            gamma,
            beta,
            num_groups=NUM_GROUPS,
            epsilon=self.epsilon,
            swish=self.swish,
            offset=offset,
            keep=keep,
            rate=rate,
        )


class Conv2D(keras.layers.Conv2D):
    """Keras' convolution, computed by `ops.conv2d`."""

    def convolution_op(self, inputs: tf.Tensor, kernel: keras.Variable) -> tf.Tensor:
        """The convolution, to which Keras adds the bias."""
        return ops.conv2d(inputs, tf.convert_to_tensor(kernel), strides=self.strides[0])


class PaddedConv2D(Conv2D):
    """A 3x3 convolution of x with one zero on all sides: at stride 2, other windows than those of SAME padding."""

    def convolution_op(self, inputs: tf.Tensor, kernel: keras.Variable) -> tf.Tensor:
        """The convolution, to which Keras adds the bias."""
        padding = [[0, 0], [1, 1], [1, 1], [0, 0]]
        return ops.conv2d(inputs, tf.convert_to_tensor(kernel), strides=self.strides[0], padding=padding)


class ConvAndBias(Conv2D):
    """A convolution that returns its bias [channels] beside the feature map, for the next layer to add."""

    def call(self, x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Maps x [B, H, W, C] to [B, H, W, channels] and [channels]."""
        return self.convolution_op(x, self.kernel), tf.convert_to_tensor(self.bias)


class ConvPlus(Conv2D):
    """A convolution that adds a feature map to its result."""

    def call(self, x: tf.Tensor, add: tf.Tensor, add_bias: tf.Tensor | None = None) -> tf.Tensor:
        """Maps x [B, H, W, C], and adds [B, H, W, channels] and the bias [channels] that belongs to it, if any."""
        bias = tf.convert_to_tensor(self.bias)
        if add_bias is not None:
            bias += add_bias
        return ops.conv2d(x, tf.convert_to_tensor(self.kernel), bias=bias, add=add)


class UpsampleConv2D(keras.layers.Conv2D):
    """A 3x3 convolution of the nearest-neighbour upsampling: [B, H, W, C] -> [B, 2 H, 2 W, channels]."""

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Maps x [B, H, W, C]."""
        kernel, bias = tf.convert_to_tensor(self.kernel), tf.convert_to_tensor(self.bias)
        return ops.upsampled_conv2d(tf.cast(x, self.compute_dtype), kernel, bias)


class Projection(keras.layers.Dense):
    """The weights of a dense layer along the channels that another layer computes, as a part of its own operation."""

    def kernel_and_bias(self) -> attention.Projection:
        """The kernel [C, units] and the bias [units] in the compute dtype."""
        kernel, bias = tf.convert_to_tensor(self.kernel), tf.convert_to_tensor(self.bias)
        return tf.cast(kernel, self.compute_dtype), tf.cast(bias, self.compute_dtype)


class DenseAndBias(keras.layers.Dense):
    """A dense layer along the channels of maps side by side; it returns its bias [units] beside the product."""

    def build(self, shape: Sequence[int | None]) -> None:
        """Creates the variables for maps that have this shape side by side."""
        super().build(shape)
        self.input_spec = None  # Keras would allow one input only

    def call(self, maps: Sequence[tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
        """Maps [B, H, W, C_i] to [B, H, W, units] and [units]."""
        kernel, bias = tf.convert_to_tensor(self.kernel), tf.convert_to_tensor(self.bias)
        return ops.dense_side_by_side(maps, kernel), bias


class LayerBuilder:
    """Builds the layers: each seeded by the run's seed and its own path, in the compute dtype.

    Layers are built at once, in the name scope of the layer that they are part of. To build them on demand, Keras would
    trace the network several times.

    Args:
      seed: of the initial weights.
      precision: dtype of the products.
      trainable: whether the weights are held in float32; otherwise in the dtype of the products.
      norm_eps: what group normalisation adds to the variance.
    """

    def __init__(self, seed: int, precision: str, trainable: bool, norm_eps: float):
        self._seed, self._norm_eps = seed, norm_eps
        self._policy = "mixed_bfloat16" if precision == "bfloat16" and trainable else precision

    def conv(self, in_channels: int, channels: int, path: str, kind: type = Conv2D, **kwargs: Any) -> Any:
        """A 3x3 convolution.

        Args:
          in_channels: C of its input.
          channels: C of its result.
          path: seeds it, and ends in its name.
          kind: the layer's class.
          **kwargs: `scale` of the initial weights, and arguments of the layer.
        """
        return _built(kind(channels, 3, padding="same", **self._arguments(path, **kwargs)), in_channels)

    def dense(self, in_channels: int, channels: int, path: str, kind: type = keras.layers.Dense, **kwargs: Any) -> Any:
        """A dense layer along the channels.

        Args:
          in_channels: C of its input.
          channels: C of its result.
          path: seeds it, and ends in its name.
          kind: the layer's class.
          **kwargs: `scale` of the initial weights, and arguments of the layer.
        """
        return _built(kind(channels, **self._arguments(path, **kwargs)), in_channels)

    def norm(self, channels: int, name: str, swish: bool = False) -> GroupNorm:
        """A group normalisation, with swish after it if asked for."""
        return GroupNorm(channels, name, self._norm_eps, swish)

    def _arguments(self, path: str, scale: float = 1.0, **kwargs: Any) -> dict[str, Any]:
        seed = zlib.crc32(f"{self._seed}/{path}".encode()) >> 1
        init = keras.initializers.VarianceScaling(scale, mode="fan_avg", distribution="uniform", seed=seed)
        return {"kernel_initializer": init, "name": path.split("/")[-1], "dtype": self._policy, **kwargs}


def _built(layer: keras.layers.Layer, in_channels: int) -> keras.layers.Layer:
    """The layer, its variables created for maps [B, H, W, in_channels]."""
    layer.build((None, None, None, in_channels))
    return layer


class Network(keras.Model):
    """A Keras model of image-like inputs that is also a pure function of its weights.

    Args:
      name: the first part of the variables' paths.
      config: the arguments of the subclass.
      weights: `frozen` allows `freeze`.

    Raises:
      ConfigError: `weights` is unknown.
    """

    def __init__(self, name: str, config: dict[str, Any], weights: WeightsMode):
        super().__init__(name=name, autocast=False)
        if weights not in get_args(WeightsMode):
            raise ConfigError("weights", f"={weights}: choose one of {', '.join(get_args(WeightsMode))}")
        self._config = config
        self.frozen = weights == "frozen"
        self._refuses_weights = False

    def get_config(self) -> dict[str, Any]:
        """The arguments from which `from_config` makes the same network, with initial weights."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in self._config.items()}

    @property
    def weight_names(self) -> list[str]:
        """The trainable variables' names in checkpoints, in their order."""
        return [v.path.removeprefix(f"{self.name}/") for v in self.trainable_variables]

    @functools.cached_property
    def compute_dtypes(self) -> list[str]:
        """The dtype in which each trainable variable is used."""
        dtypes = {id(v): layer.compute_dtype for layer in self._flatten_layers() for v in layer._trainable_variables}
        return [dtypes[id(v)] for v in self.trainable_variables]

    def denoise_fn(
        self, params: Sequence[tf.Variable | tf.Tensor], rng: CounterRng | None = None
    ) -> Callable[..., tf.Tensor]:
        """`model(x_t, t, labels, rng)` as a pure function of x_t, t and, with classes, labels.

        The weights `params` come in the order of `trainable_variables`, and are cast to their compute dtypes here, once
        for many calls. Keras' `stateless_call` would cast them to float32 again in every call.
        """
        weights = [tf.cast(w, dtype) for w, dtype in zip(params, self.compute_dtypes, strict=True)]

        def denoise(x_t: tf.Tensor, t: tf.Tensor, labels: tf.Tensor | None = None) -> tf.Tensor:
            with keras.StatelessScope() as scope:
                for variable, weight in zip(self.trainable_variables, weights, strict=True):
                    scope.add_update((variable, weight))
                return self(x_t, t, labels=labels, rng=rng)

        return denoise

    def freeze(self) -> None:
        """Makes every later assignment to a weight raise RuntimeError.

        A program on a CPU may read reordered copies of frozen weights, and would miss the assignment.
        """
        self._refuses_weights = True
        for variable in self.variables:
            for method in ("assign", "assign_add", "assign_sub"):
                setattr(variable.value, method, _refuse_assignment)

    def load_weights(self, *args: Any, **kwargs: Any) -> None:
        """As in Keras; raises RuntimeError if the weights are frozen."""
        if self._refuses_weights:
            _refuse_assignment()  # Keras would report that the file does not fit
        super().load_weights(*args, **kwargs)


def _refuse_assignment(*_: Any, **__: Any) -> NoReturn:
    raise RuntimeError(
        "this network's weights are frozen, and programs may have kept copies of them: load others into a new network,"
        " or make this one with weights='inference'"
    )
