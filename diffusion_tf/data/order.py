"""The order of training images, computed without TensorFlow: that of `tf.data`.

`Dataset.shuffle` draws from Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), whose
two keys Philox draws under a constant of TensorFlow and the seed. The sources of `data/arrays.py` and
`data/tfrecords.py` are shuffled so.
"""

import dataclasses
import functools

import numpy as np

_SHUFFLE_BYTES = 2**30  # memory of a shuffle buffer; encoded records are no larger than their pixels
_NEXT_ORDER = 0x9E3779B9  # far from the seeds that people choose
_GRAPH_SEED, _SEED_LIMIT = 87654321, 2**31 - 1  # of tf.random.get_seed
_ROUNDS = 10
_MULTIPLIERS, _KEY_STEPS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)


def order_seed(seed: int, data_order: int) -> int:
    """Returns the seed of the order of a run's images: that of the run, or another one after a rollback."""
    return (seed + data_order * _NEXT_ORDER) % 2**32


def shuffle_buffer_size(num_examples: int, image_shape: tuple[int, int, int]) -> int:
    """Returns how many encoded images a shuffle buffer holds: all, if their pixels fit in a gigabyte."""
    return min(num_examples, _SHUFFLE_BYTES // int(np.prod(image_shape)))


@dataclasses.dataclass(frozen=True)
class EpochShuffle:
    """How the images of an epoch are shuffled: their files, and then the images of these files in a buffer.

    Attributes:
      file_sizes: the images of each file; images in memory are one file.
      buffer_size: the images of the buffer, of which each next one is drawn.
    """

    file_sizes: tuple[int, ...]
    buffer_size: int

    @property
    def num_examples(self) -> int:
        """The number of images."""
        return sum(self.file_sizes)

    def batch(self, batch_size: int, seed: int, step: int) -> np.ndarray:
        """Returns which images are in the global batch of a step, int64 [batch_size], as `training_batches` reads them.

        Args:
          batch_size: images in a batch.
          seed: what `order_seed` returned.
          step: the training step.
        """
        epochs, places = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), self.num_examples)
        orders = {epoch: _epoch_order(self, (seed << 31) + int(epoch)) for epoch in np.unique(epochs)}
        return np.array([orders[epoch][place] for epoch, place in zip(epochs, places, strict=True)])


@functools.lru_cache(maxsize=2)
def _epoch_order(shuffle: EpochShuffle, seed: int) -> np.ndarray:
    """The images of an epoch in their order, int64 [num_examples]. Takes 0.1 s for 50,000 images, 6 s for 3 million."""
    sizes = np.array(shuffle.file_sizes)
    firsts = np.cumsum(sizes) - sizes
    files = _shuffled(len(sizes), len(sizes), seed)
    in_files = np.concatenate([np.arange(firsts[file], firsts[file] + sizes[file]) for file in files])
    return in_files[_shuffled(len(in_files), shuffle.buffer_size, seed)]


def _shuffled(count: int, buffer_size: int, seed: int) -> np.ndarray:
    """The elements of `Dataset.range(count).shuffle(buffer_size, seed)`, int64 [count]; `seed` is of any size."""
    first, second = _philox(2, _GRAPH_SEED, seed % _SEED_LIMIT).tolist()
    size = min(buffer_size, count)
    buffer, order = list(range(size)), []
    for place, number in enumerate(_philox(count, first, second).tolist()):
        if (new := place + size - 1) >= size and new < count:
            buffer[new % size] = new  # where the first of those drawn from was
        chosen = (place + number % min(size, count - place)) % size
        order.append(buffer[chosen])
        buffer[chosen] = buffer[place % size]
    return np.array(order)


def _philox(count: int, key: int, counter: int) -> np.ndarray:
    """The first `count` words, uint64 [count] below 2^32, under a key and from a counter's upper half on."""
    mask, half = np.uint64(2**32 - 1), np.uint64(32)
    blocks = np.arange(-(-count // 4), dtype=np.uint64)
    constant = functools.partial(np.full, blocks.shape, dtype=np.uint64)
    words = [blocks & mask, blocks >> half, constant(counter % 2**32), constant(counter >> 32)]
    keys = [key % 2**32, key >> 32]
    for _ in range(_ROUNDS):
        left, right = words[0] * np.uint64(_MULTIPLIERS[0]), words[2] * np.uint64(_MULTIPLIERS[1])
        words = [
            (right >> half) ^ words[1] ^ np.uint64(keys[0]),
            right & mask,
            (left >> half) ^ words[3] ^ np.uint64(keys[1]),
            left & mask,
        ]
        keys = [(word + step) % 2**32 for word, step in zip(keys, _KEY_STEPS, strict=True)]
    return np.stack(words, axis=1).ravel()[:count]
