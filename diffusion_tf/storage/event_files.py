"""TensorBoard's event files.

The writer of `tf.summary` drops events without an error when the disk is full, and cannot say that a run resumed.
"""

import contextlib
import itertools
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf
from tensorboard.plugins.image.metadata import create_summary_metadata as image_metadata
from tensorboard.plugins.scalar.metadata import create_summary_metadata as scalar_metadata

from diffusion_tf.storage import gfile
from diffusion_tf.storage.files import list_folder, replacing, writing

_NAME = "events.out.tfevents."
_numbers = itertools.count()


def resume(folder: str, step: int) -> "EventFile":
    """Opens the event file of a run that starts, or goes on from `step`, and removes later events of earlier files.

    Raises:
      InputError: a file cannot be written.
    """
    for name in list_folder(folder):
        if name.startswith(_NAME):
            _rewind(os.path.join(folder, name), step)
    file = EventFile(folder)
    # A TensorBoard that is open has read those events; this makes it drop them.
    file.write(step=step + 1, session_log=tf.compat.v1.SessionLog(status=tf.compat.v1.SessionLog.START))
    return file


def _rewind(path: str, step: int) -> None:
    """Removes the events after `step` from a file."""
    if any(event_step > step for event_step, _ in _records(path)):
        with replacing(path) as temporary, tf.io.TFRecordWriter(temporary) as writer:
            for event_step, record in _records(path):
                if event_step <= step:
                    writer.write(record)


def _records(path: str) -> Iterator[tuple[int, bytes]]:
    """Yields each event with its step, but not an incomplete last one, which a killed process leaves."""
    with contextlib.suppress(tf.errors.DataLossError):
        with tf.device(None):  # in this process, and not on a TPU slice's worker 0
            records = tf.data.TFRecordDataset(path).as_numpy_iterator()
        for record in records:
            yield tf.compat.v1.Event.FromString(record).step, record


class EventFile:
    """A new event file.

    Args:
      folder: the folder of the run's event files; may be gs://.

    Raises:
      InputError: the file cannot be written, here or in a method.
    """

    def __init__(self, folder: str):
        started = f"{int(time.time()):010d}.{os.uname().nodename}.{os.getpid()}.{next(_numbers)}"
        self._path = os.path.join(folder, f"{_NAME}{started}.v2")
        with writing(self._path):
            gfile.makedirs(folder)
            self._writer = tf.io.TFRecordWriter(self._path)
        self.write(file_version="brain.Event:2")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes scalars by name."""
        metadata = scalar_metadata(display_name="", description="")
        self._write_values(step, {name: (np.float32(value), metadata) for name, value in values.items()})

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Writes an image, uint8 [H, W, C]."""
        height, width, _ = pixels.shape
        content = np.array([b"%d" % width, b"%d" % height, tf.io.encode_png(pixels).numpy()], object)
        self._write_values(step, {name: (content, image_metadata(display_name="", description=""))})

    def close(self) -> None:
        """Closes the file."""
        with writing(self._path):
            self._writer.close()

    def _write_values(self, step: int, values: Mapping[str, tuple[Any, Any]]) -> None:
        """Writes tensors with TensorBoard's description of them, by name."""
        summary = tf.compat.v1.Summary()
        for name, (tensor, metadata) in values.items():
            value = summary.value.add(tag=name, tensor=tf.make_tensor_proto(tensor))
            value.metadata.ParseFromString(metadata.SerializeToString())  # TensorBoard has its own class of it
        self.write(step=step, summary=summary)

    def write(self, **fields: Any) -> None:
        """Writes an event with these fields of its protocol buffer."""
        event = tf.compat.v1.Event(wall_time=time.time(), **fields)
        with writing(self._path):
            self._writer.write(event.SerializeToString())
            self._writer.flush()
