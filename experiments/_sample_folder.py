"""Samples as a folder of PNGs, which can be continued."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

from diffusion_tf.data.fitting import read_picture
from diffusion_tf.data.pictures import encode_picture
from diffusion_tf.errors import InputError
from diffusion_tf.progress_bar import progress_bar
from diffusion_tf.storage.files import check_writable, list_folder, write_file
from diffusion_tf.storage.json_files import read_json, write_json
from diffusion_tf.storage.npz_files import write_npz
from diffusion_tf.storage.records import SampleFolder as Record


class SampleFolder:
    """The folder that --out names: 000000.png, 000001.png, ..., all of them in samples.npz, and samples.json.

    Each PNG is written when its batch is finished. Those that are there are not drawn again: sample i depends on what
    samples.json records, and on i.

    Args:
      path: the folder.
      description: everything that the samples depend on, as JSON values.
      image_shape: (H, W, C) of the samples.
    """

    def __init__(self, path: str, description: dict[str, Any], image_shape: tuple[int, int, int]):
        self.path = path
        self.samples = os.path.join(path, "samples.npz")
        self._record = os.path.join(path, "samples.json")
        self._description = description
        self._image_shape = image_shape

    def check(self, num_samples: int, *, resume: bool) -> None:
        """Checks, before the work, that `num_samples` samples may be written here.

        Raises:
          InputError: the folder cannot be written, holds something else or other samples, or as many and there is no
            --resume.
        """
        if self._image_shape[-1] not in (1, 3, 4):
            raise InputError(f"--out={self.path}: a PNG has no {self._image_shape[-1]} channels; name an .npz file")
        if tf.io.gfile.exists(self._record):
            self._check_record(read_json(self._record, Record), num_samples, resume=resume)
        elif list_folder(self.path):
            raise InputError(f"--out={self.path} holds other files, and no samples.json: name a new folder")
        check_writable(self.samples)

    def _check_record(self, there: dict[str, Any], num_samples: int, *, resume: bool) -> None:
        for name in {**self._description, **there}:
            old, new = there.get(name), self._description.get(name)
            if name not in Record.__annotations__ and old != new:
                if old is None or new is None:
                    raise InputError(
                        f"--out={self.path} holds samples drawn {'without' if old is None else 'with'} {name}"
                        f"={new if old is None else old}: give the flags that it began with, or name another folder"
                    )
                raise InputError(f"--out={self.path} holds samples of {name} {old}, not {new}: name another folder")
        if num_samples < there["num_samples"]:
            raise InputError(
                f"--out={self.path} is for {there['num_samples']} samples, more than --num_samples={num_samples}: name"
                " another folder"
            )
        unfinished = num_samples == there["num_samples"] and not there["complete"]
        if not unfinished and not resume:
            raise InputError(
                f"--out={self.path} holds {there['num_samples']} of these samples: add --resume to go on to"
                " --num_samples, or name another folder"
            )

    def fill(self, draw: Callable[[int, int], np.ndarray], num_samples: int, batch_size: int) -> np.ndarray:
        """Draws the samples that are missing; shows progress.

        Args:
          draw: draw(first, count) returns samples first, ..., first + count - 1, uint8 [count, H, W, C].
          num_samples: how many samples there will be.
          batch_size: the largest count.

        Returns:
          uint8 [num_samples, H, W, C].
        """
        record = {**self._description, "num_samples": num_samples}
        write_json(self._record, {**record, "complete": False})
        samples = self._finished(num_samples)
        with progress_bar(total=num_samples, initial=len(samples), unit="image", desc="sampling") as bar:
            for first in range(len(samples), num_samples, batch_size):
                batch = draw(first, min(batch_size, num_samples - first))
                for i, image in enumerate(batch, first):
                    write_file(self._png(i), encode_picture(image, "PNG"))
                samples.extend(batch)
                bar.update(len(batch))
        array = np.stack(samples)
        write_npz(self.samples, samples=array)
        write_json(self._record, {**record, "complete": True})
        return array

    def _png(self, i: int) -> str:
        return os.path.join(self.path, f"{i:06d}.png")

    def _finished(self, num_samples: int) -> list[np.ndarray]:
        """The first samples whose files are there; those from a damaged one on are drawn again."""
        names, samples = set(list_folder(self.path)), []
        for path in map(self._png, range(num_samples)):
            if os.path.basename(path) not in names:
                break
            try:
                samples.append(read_picture(path, self._image_shape))
            except InputError as error:
                logging.warning("%s: it is drawn again, and those after it", error)
                break
        return samples
