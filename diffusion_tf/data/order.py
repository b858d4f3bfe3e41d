"""The order of training images, computed without TensorFlow: that of `tf.data` where an epoch is shuffled whole.

`Dataset.shuffle` draws from Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), whose
two keys Philox draws under a constant of TensorFlow and the seed. The sources of `data/arrays.py` are shuffled so.
"""

import functools

import numpy as np

_NEXT_ORDER = 0x9E3779B9  # far from the seeds that people choose
_GRAPH_SEED, _SEED_LIMIT = 87654321, 2**31 - 1  # of tf.random.get_seed
_ROUNDS = 10
_MULTIPLIERS, _KEY_STEPS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)


def order_seed(seed: int, data_order: int) -> int:
    """Returns the seed of the order of a run's images: that of the run, or another one after a rollback."""
    return (seed + data_order * _NEXT_ORDER) % 2**32


def batch_indices(num_examples: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Returns which images are in the global batch of a step, int64 [batch_size], as `training_batches` reads them.

    Args:
      num_examples: the number of images.
      batch_size: images in a batch.
      seed: what `order_seed` returned.
      step: the training step.
    """
    epochs, places = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), num_examples)
    orders = {epoch: epoch_order(num_examples, (seed << 31) + int(epoch)) for epoch in np.unique(epochs)}
    return np.array([orders[epoch][place] for epoch, place in zip(epochs, places, strict=True)])


@functools.lru_cache(maxsize=2)
def epoch_order(num_examples: int, seed: int) -> np.ndarray:
    """Returns the elements of `Dataset.range(num_examples).shuffle(num_examples, seed)`, int64 [num_examples].

    `seed` is an int of any size. Takes 20 ms for 50,000 images.
    """
    first, second = _philox(2, _GRAPH_SEED, seed % _SEED_LIMIT).tolist()
    order = list(range(num_examples))
    for place, number in enumerate(_philox(num_examples, first, second).tolist()):
        other = place + number % (num_examples - place)
        order[place], order[other] = order[other], order[place]
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
