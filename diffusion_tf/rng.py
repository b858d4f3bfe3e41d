"""Random numbers as a function of (seed, stream, step, example): nothing is drawn, everything is looked up.

Philox4x32 is a counter-based generator, so the noise of example i at step s can be computed without that of any
other. Two things follow: image i is the same for any batch size and number of replicas, and a resumed run is the
run. `tf.random.stateless_uniform` cannot say "from example i on", so this calls the operation beneath it, whose
counter is an argument; its bits are the same on every device, inside and outside of XLA. Where many numbers are wanted,
normal noise and dropout, they are hashes of positions under keys that Philox gives.
"""

import math
import zlib
from collections.abc import Sequence

import tensorflow as tf

from diffusion_tf.ops.cpu.regions import region

_PHILOX = 1  # tf.random.Algorithm.PHILOX, as the raw operation wants it
_WORDS_PER_BLOCK = 4  # uint32 words to one step of the Philox counter


class CounterRng:
    """The random numbers of the consecutive examples `first_example, first_example + 1, ...` at one step.

    Args:
      seed: int in [0, 2^32).
      step: training step or diffusion timestep, int or integer scalar tensor.
      first_example: index of the first example in the global batch (training) or of the first image (sampling).
    """

    def __init__(self, seed: int, step, first_example):
        self.seed = seed
        self.step = tf.cast(step, tf.uint64)
        self.first_example = tf.cast(first_example, tf.uint64)

    def skip(self, examples) -> "CounterRng":
        """The numbers of the examples from so many, an integer or integer scalar tensor, further on."""
        return CounterRng(self.seed, self.step, self.first_example + tf.cast(examples, tf.uint64))

    def uniform(self, stream: str, shape: Sequence[int]) -> tf.Tensor:
        """float32 in [0, 1) of static `shape` [B, ...], by Philox; row j belongs to example first_example + j.

        `stream` names what the numbers are for; two names give independent numbers.
        """
        return tf.reshape(_to_uniform(self._words(stream, shape[0], math.prod(shape[1:]))), shape)

    def normal(self, stream: str, shape: Sequence[int]) -> tf.Tensor:
        """Standard normal float32 of static `shape` [B, H, ...], by the Box-Muller transform of hashed numbers."""
        return _normal(self._words(stream, shape[0], 2), shape=tuple(shape))

    def keep(self, stream: str, shape: Sequence[int], rate: float) -> tf.Tensor:
        """A mask of static `shape` [B, ...], False with probability `rate`, for dropout."""
        return _keep(self._words(stream, shape[0], 2), shape=tuple(shape), rate=rate)

    def _words(self, stream: str, rows: int, size: int) -> tf.Tensor:
        """Philox' uint32 words [rows, size]; row j belongs to example first_example + j."""
        blocks = -(-size // _WORDS_PER_BLOCK)
        key = tf.constant([(self.seed << 32) | zlib.crc32(stream.encode())], tf.uint64)
        counter = tf.stack([self.first_example * tf.constant(blocks, tf.uint64), self.step])
        words = tf.raw_ops.StatelessRandomUniformFullIntV2(
            shape=[rows, blocks * _WORDS_PER_BLOCK], key=key, counter=counter, alg=_PHILOX, dtype=tf.uint32
        )
        return words[:, :size]


@region
def _normal(keys: tf.Tensor, *, shape: tuple[int, ...]) -> tf.Tensor:
    u = _to_uniform(_hashed(keys, (shape[0], 2, -(-shape[1] // 2), *shape[2:])))
    radius = tf.sqrt(-2.0 * tf.math.log(1.0 - u[:, 0]))  # 1 - u is in (0, 1]
    angle = (2.0 * math.pi) * u[:, 1]
    return tf.concat([radius * tf.cos(angle), radius * tf.sin(angle)], axis=1)[:, : shape[1]]


@region
def _keep(keys: tf.Tensor, *, shape: tuple[int, ...], rate: float) -> tf.Tensor:
    return _hashed(keys, shape) >= tf.constant(round(rate * 2**32), tf.uint32)


def _hashed(keys: tf.Tensor, shape: Sequence[int]) -> tf.Tensor:
    """uint32 of static `shape` [B, ...]: a hash of each position under the example's keys [B, 2], which Philox gives.

    A compiler can work it out wherever it is read. Philox itself took a third of a training step's time on a TPU
    for dropout, and 4% of a sampling step's.
    """
    ones = [1] * (len(shape) - 1)
    key0, key1 = (tf.reshape(word, [-1, *ones]) for word in tf.unstack(keys, axis=1))
    words = key0
    for axis, size in enumerate(shape[1:]):
        place = tf.range(size) * math.prod(shape[axis + 2 :])
        words += tf.cast(tf.reshape(place, [-1, *ones[axis + 1 :]]), tf.uint32)
    return _mix(_mix(words) ^ key1)


def _to_uniform(words: tf.Tensor) -> tf.Tensor:
    """The upper 24 bits of uint32, which float32 holds exactly, as float32 in [0, 1)."""
    return tf.cast(_shift(words, 8), tf.float32) * 2.0**-24


def _shift(words: tf.Tensor, bits: int) -> tf.Tensor:
    return tf.bitwise.right_shift(words, tf.constant(bits, tf.uint32))


def _mix(words: tf.Tensor) -> tf.Tensor:
    """A bijection of uint32 in which each bit depends on all: the last step of MurmurHash3."""
    words = (words ^ _shift(words, 16)) * tf.constant(0x85EBCA6B, tf.uint32)
    words = (words ^ _shift(words, 13)) * tf.constant(0xC2B2AE35, tf.uint32)
    return words ^ _shift(words, 16)
