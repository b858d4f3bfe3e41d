"""Long measurements whose finished batches are kept on disk, so that an interrupted one continues."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from absl import logging

from diffusion_tf.errors import DamagedFileError
from diffusion_tf.progress_bar import progress_bar
from diffusion_tf.storage import gfile
from diffusion_tf.storage.files import Arrays, remove
from diffusion_tf.storage.npz_files import digest_arrays, read_npz, write_npz


class ResumableBatches:
    """The results of one measurement for examples [0, batch_size), [batch_size, 2 * batch_size), ...

    Args:
      folder: the folder for the batches of all measurements; may be gs://.
      description: everything that the results depend on, as JSON values; another description is another measurement.
      num_examples: examples in all.
      batch_size: examples per batch.
    """

    def __init__(self, folder: str, description: Mapping[str, Any], *, num_examples: int, batch_size: int):
        described = json.dumps({**description, "num_examples": num_examples, "batch_size": batch_size}, sort_keys=True)
        self.folder = os.path.join(folder, hashlib.sha256(described.encode()).hexdigest()[:16])
        self.num_examples = num_examples
        self.batch_size = batch_size

    def compute(self, compute: Callable[[int, int], Arrays], label: str) -> Iterator[Arrays]:
        """Yields the arrays of each batch, read from disk or computed and written; shows a progress bar.

        A damaged batch is named in a warning and computed again.

        Args:
          compute: compute(first, count) returns the arrays of examples first .. first + count - 1.
          label: the text beside the progress bar.
        """
        with progress_bar(total=self.num_examples, unit="image", desc=label) as bar:
            for first in range(0, self.num_examples, self.batch_size):
                count = min(self.batch_size, self.num_examples - first)
                path = os.path.join(self.folder, f"part_{first:08d}.npz")
                arrays = _read(path) if gfile.exists(path) else None
                if arrays is None:
                    arrays = compute(first, count)
                    write_npz(path, **arrays, sha256=np.array(digest_arrays(arrays)))
                yield arrays
                bar.update(count)

    def remove(self) -> None:
        """Removes the batches, once the result of the measurement is written."""
        remove(self.folder)


def _read(path: str) -> Arrays | None:
    """Returns the arrays of a batch; None if the file is damaged."""
    try:
        arrays = read_npz(path)
        if str(arrays.pop("sha256", "")) == digest_arrays(arrays):
            return arrays
        reason = f"{path} is damaged, its contents do not match their SHA-256"
    except DamagedFileError as error:
        reason = str(error)
    logging.warning("%s: it is computed again", reason)
    return None
