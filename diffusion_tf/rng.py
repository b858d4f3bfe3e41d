"""Random numbers as a function of (seed, stream, step, example): stateless, so nothing depends on what came before.

Philox4x32 is a counter-based generator, so the noise of example i at step s can be computed without that of any other.
Two things follow: image i is the same for any batch size and number of replicas, and a resumed run repeats the
uninterrupted one. `tf.random.stateless_uniform` cannot start at example i, so this module calls the operation beneath
it, which takes the counter as an argument; its bits are the same on every device, inside and outside of XLA. Normal
noise and dropout need many numbers: these are hashes of positions under keys that Philox gives.
"""

import math
import zlib
from collections.abc import Sequence

import tensorflow as tf

from diffusion_tf import ops
from diffusion_tf.ops import hashing

_PHILOX = 1  # the raw operation's code of tf.random.Algorithm.PHILOX
_WORDS_PER_BLOCK = 4  # uint32 words for each step of the Philox counter


class CounterRng:
    """The random numbers of the consecutive examples `first_example, first_example + 1, ...` at one step.

    Args:
      seed: int in [0, 2^32), or an integer scalar tensor.
      step: training step or diffusion timestep, int or integer scalar tensor.
      first_example: index of the first example in the global batch (training) or of the first image (sampling).
    """

    def __init__(self, seed: int | tf.Tensor, step: int | tf.Tensor, first_example: int | tf.Tensor):
        self.seed = seed
        self.step = tf.cast(step, tf.uint64)
        self.first_example = tf.cast(first_example, tf.uint64)

    def skip(self, examples: int | tf.Tensor) -> "CounterRng":
        """The numbers that start `examples` (an integer or integer scalar tensor) examples later."""
        if isinstance(examples, int) and examples == 0:
            return self
        return CounterRng(self.seed, self.step, self.first_example + tf.cast(examples, tf.uint64))

    def uniform(self, stream: str, shape: Sequence[int]) -> tf.Tensor:
        """float32 in [0, 1) of static `shape` [B, ...], by Philox; row j belongs to example first_example + j.

        `stream` names what the numbers are for; two names give independent numbers.
        """
        return tf.reshape(hashing.uniform(self._words(stream, shape[0], math.prod(shape[1:]))), shape)

    def normal(self, stream: str, shape: Sequence[int]) -> tf.Tensor:
        """Standard normal float32 of static `shape` [B, H, ...]."""
        return ops.normal(self._words(stream, shape[0], 2), tuple(shape))

    def keep(self, stream: str, shape: Sequence[int], rate: float) -> tf.Tensor:
        """A dropout mask of static `shape` [B, ...]: False with probability `rate`."""
        return ops.bernoulli(self._words(stream, shape[0], 2), tuple(shape), rate)

    def _words(self, stream: str, rows: int, size: int) -> tf.Tensor:
        """Philox' uint32 words [rows, size]; row j belongs to example first_example + j."""
        blocks = -(-size // _WORDS_PER_BLOCK)
        key = self._key(zlib.crc32(stream.encode()))
        counter = tf.stack([self.first_example * tf.constant(blocks, tf.uint64), self.step])
        words = tf.raw_ops.StatelessRandomUniformFullIntV2(
            shape=[rows, blocks * _WORDS_PER_BLOCK], key=key, counter=counter, alg=_PHILOX, dtype=tf.uint32
        )
        return words[:, :size]

    def _key(self, stream: int) -> tf.Tensor:
        """The Philox key uint64 [1]: the seed in the upper half, the stream in the lower."""
        if not tf.is_tensor(self.seed):
            return tf.constant([(self.seed << 32) | stream], tf.uint64)
        seed = tf.bitwise.left_shift(tf.cast(self.seed, tf.uint64), tf.constant(32, tf.uint64))
        return tf.reshape(seed | tf.constant(stream, tf.uint64), [1])
