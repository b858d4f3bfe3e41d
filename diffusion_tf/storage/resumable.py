"""Long measurements in parts that are kept on disk, so that an interrupted one goes on where it was."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf
import tqdm

from diffusion_tf.storage.files import read_npz, write_npz

Arrays = dict[str, np.ndarray]


class Parts:
    """The parts of one measurement: the arrays of examples [0, batch_size), [batch_size, 2 batch_size), ...

    Args:
      folder: where the parts of all measurements lie; may be gs://.
      description: all that the arrays depend on, as JSON can hold it. What is described differently is kept apart.
      num_examples: how many examples in all.
      batch_size: examples of one part.
    """

    def __init__(self, folder: str, description: Mapping[str, Any], *, num_examples: int, batch_size: int):
        described = json.dumps({**description, "num_examples": num_examples, "batch_size": batch_size}, sort_keys=True)
        self.folder = os.path.join(folder, hashlib.sha256(described.encode()).hexdigest()[:16])
        self.num_examples = num_examples
        self.batch_size = batch_size

    def compute(self, compute: Callable[[int, int], Arrays], label: str) -> Iterator[Arrays]:
        """Yields each part, from its file where there is one, else by `compute(first, count)`; shows progress."""
        with tqdm.tqdm(total=self.num_examples, unit="image", desc=label) as bar:
            for first in range(0, self.num_examples, self.batch_size):
                count = min(self.batch_size, self.num_examples - first)
                path = os.path.join(self.folder, f"part_{first:08d}.npz")
                if tf.io.gfile.exists(path):
                    part = read_npz(path)
                else:
                    part = compute(first, count)
                    write_npz(path, **part)
                yield part
                bar.update(count)

    def remove(self) -> None:
        """Removes the parts, once what they were for is written."""
        if tf.io.gfile.isdir(self.folder):
            tf.io.gfile.rmtree(self.folder)
