"""TensorBoard shows each step of a run once, whatever happened to the run."""

import numpy as np
import pytest
import tensorflow as tf
from support.full_disks import mounted
from tensorboard.backend.event_processing import event_accumulator, plugin_event_accumulator

from diffusion_tf.errors import InputError
from diffusion_tf.storage import event_files
from diffusion_tf.storage.event_files import EventFile

ALL = {"tensors": 0}


def open_accumulators(folder):
    """What notebooks read, and what the page of TensorBoard shows."""
    return (
        event_accumulator.EventAccumulator(str(folder), size_guidance=ALL),
        plugin_event_accumulator.EventAccumulator(
            str(folder), size_guidance=ALL, tensor_size_guidance={"scalars": 0, "images": 0}
        ),
    )


def scalars(accumulator, tag="loss"):
    accumulator.Reload()
    return [(event.step, float(tf.make_ndarray(event.tensor_proto))) for event in accumulator.Tensors(tag)]


def image_steps(accumulator):
    accumulator.Reload()
    return [event.step for event in accumulator.Tensors("samples")]


def report(events, steps, loss):
    for step in steps:
        events.scalars(step, {"loss": loss, "rate": step})
        events.image(step, "samples", np.full((8, 4, 1), step, np.uint8))


def test_a_killed_and_resumed_run_has_each_step_once(tmp_path):
    report(event_files.resume(str(tmp_path), 0), range(1, 7), 1.0)  # killed: never closed
    opened = open_accumulators(tmp_path)  # as a TensorBoard that stays open
    assert all(len(scalars(accumulator)) == 6 for accumulator in opened)
    [file] = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-3])  # in the middle of an event

    report(event_files.resume(str(tmp_path), 4), range(5, 8), 2.0)
    report(event_files.resume(str(tmp_path), 6), range(7, 9), 3.0)
    expected = [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (5, 2.0), (6, 2.0), (7, 3.0), (8, 3.0)]
    for accumulator in (*open_accumulators(tmp_path), opened[1]):
        assert scalars(accumulator) == expected
        assert scalars(accumulator, "rate") == [(step, float(step)) for step, _ in expected]
        assert image_steps(accumulator) == [step for step, _ in expected]


def test_events_of_tf_summary_are_rewound_too(tmp_path):
    with tf.summary.create_file_writer(str(tmp_path), filename_suffix=".old").as_default():
        for step in range(1, 5):
            tf.summary.scalar("loss", 1.0, step)
    report(event_files.resume(str(tmp_path), 2), (3, 4), 2.0)
    for accumulator in open_accumulators(tmp_path):
        assert scalars(accumulator) == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]


def test_events_are_those_of_tf_summary(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 4, 3)).astype(np.uint8)
    with tf.summary.create_file_writer(str(tmp_path / "theirs")).as_default():
        tf.summary.scalar("loss", 0.25, 3)
        tf.summary.image("samples", pixels[np.newaxis], 3)
    ours = EventFile(str(tmp_path / "ours"))
    ours.scalars(3, {"loss": 0.25})
    ours.image(3, "samples", pixels)
    ours.close()
    written = []
    for name in ("ours", "theirs"):
        [file] = (tmp_path / name).iterdir()
        events = map(tf.compat.v1.Event.FromString, tf.data.TFRecordDataset(str(file)).as_numpy_iterator())
        values = [(event.step, value) for event in events for value in event.summary.value]
        written.append([(step, v.tag, tf.make_ndarray(v.tensor).tolist(), v.metadata) for step, v in values])
    assert written[0] == written[1] and len(written[0]) == 2


def test_a_full_disk_is_an_error(tmp_path):
    with mounted(tmp_path / "disk", 2**15) as disk:
        events = EventFile(str(disk))
        noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3)).astype(np.uint8)
        with pytest.raises(InputError, match=f"cannot write {disk}/events.out.tfevents.* .the disk is full"):
            events.image(1, "samples", noise)
        with pytest.raises(InputError, match="the disk is full"):
            EventFile(str(disk))
