"""TFRecords without TensorFlow: the images, labels and order of `train`, and what is refused."""

import itertools

import numpy as np
import pytest
import tensorflow as tf
from support.odd_pictures import encoded, picture

from diffusion_tf.data import open_source
from diffusion_tf.data.record_images import RecordImages, matching_files
from diffusion_tf.data.source import ImageReader, training_batches
from diffusion_tf.data.tfrecords import serialize, tfrecord_source
from diffusion_tf.data.training_images import open_training_images
from diffusion_tf.data_settings import DataSettings
from diffusion_tf.errors import InputError
from diffusion_tf.presets import get_preset

SHAPE = (4, 2, 3)
IMAGES = np.random.RandomState(0).randint(0, 256, (23, *SHAPE)).astype(np.uint8)


def write_files(folder, sizes, with_labels=False):
    """Writes IMAGES into files of these sizes, and returns their glob."""
    images = iter(enumerate(IMAGES))
    for number, size in enumerate(sizes):
        with tf.io.TFRecordWriter(f"{folder}/{number}.tfrecords") as writer:
            for label, image in itertools.islice(images, size):
                writer.write(serialize(image.transpose(2, 0, 1), label if with_labels else None))
    return f"{folder}/*.tfrecords"


def open_files(pattern, shape=SHAPE, classes=()):
    return RecordImages(matching_files(pattern), shape, "records", classes)


def same_batches(images, source, *, batch_size, seed=3, first_step=4):
    """Whether batches over the end of an epoch are those of `train`."""
    batches = training_batches(
        source, batch_size=batch_size, per_replica=batch_size, seed=seed, start_step=first_step
    ).as_numpy_iterator()
    return all(
        np.array_equal(images.take(images.shuffle.batch(batch_size, seed, step))[0], next(batches))
        for step in range(first_step, first_step + images.shuffle.num_examples)
    )


def test_batches_are_those_of_train(tmp_path):
    pattern = write_files(tmp_path, (10, 1, 12))
    assert same_batches(open_files(pattern), tfrecord_source(pattern, SHAPE, 0), batch_size=5)


def test_labels_go_with_their_images(tmp_path):
    pattern = write_files(tmp_path, (11, 12), with_labels=True)
    images, labels = open_files(pattern, classes=("0", "1")).take(np.array([[22, 3], [0, 11]]))
    np.testing.assert_array_equal(labels, [[22, 3], [0, 11]])
    np.testing.assert_array_equal(images, IMAGES[labels])


def test_features_in_any_order_and_further_ones_are_read(tmp_path):
    """As other programs write them: shape before data, unpacked integers, a float."""
    features = {
        "zoom": tf.train.Feature(float_list=tf.train.FloatList(value=[1.5])),
        "shape": tf.train.Feature(int64_list=tf.train.Int64List(value=(3, 4, 2))),
        "data": tf.train.Feature(bytes_list=tf.train.BytesList(value=[IMAGES[0].transpose(2, 0, 1).tobytes()])),
    }
    with tf.io.TFRecordWriter(f"{tmp_path}/x") as writer:
        writer.write(b"".join(_entry(features, name) for name in features))
    np.testing.assert_array_equal(open_files(f"{tmp_path}/x").take(np.array([0]))[0], IMAGES[:1])


def _entry(features, name):
    """An example of one feature; the examples of several, one after the other, are one of all."""
    return tf.train.Example(features=tf.train.Features(feature={name: features[name]})).SerializeToString()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-3] + b"x" + data[-2:], r"1.tfrecords: record 11 \(its bytes do not match their CRC\)"),
        (lambda data: data[:-5] + b"x" + data[-4:], r"1.tfrecords: record 11 \(its bytes do not match their CRC\)"),
        (lambda data: data[:-1], r"1.tfrecords is truncated: record 11 has \d+ of the \d+ bytes of record 0"),
        (lambda data: data[:20], r"1.tfrecords is not a TFRecord file, or its first record is cut off"),
        (lambda data: b"", r"1.tfrecords is not a TFRecord file, or its first record is cut off"),
        (lambda data: b"\0" * len(data), r"1.tfrecords is not a TFRecord file, or its first record is cut off"),
    ],
    ids=["CRC", "pixel", "cut", "short", "empty", "zeros"],
)
def test_a_damaged_record_is_named(tmp_path, damage, message):
    pattern = write_files(tmp_path, (11, 12))
    path = tmp_path / "1.tfrecords"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=message):
        open_files(pattern).take(np.array([22]))


def test_other_shapes_and_missing_files_are_refused(tmp_path):
    pattern = write_files(tmp_path, (23,))
    with pytest.raises(InputError, match=r"its shape \(C, H, W\) is \(3, 4, 2\), and the run wants \(3, 2, 4\)"):
        open_files(pattern, (2, 4, 3))
    with pytest.raises(InputError, match="is not an image of 8x8x3"):
        open_files(pattern, (8, 8, 3))
    with pytest.raises(InputError, match="matches no file"):
        open_files(f"{tmp_path}/*.other")


def test_pictures_come_from_the_cache_or_memory_in_the_same_order(tmp_path):
    preset = get_preset("digits", image_size=8, channels=3, num_classes=2)
    for index in range(70):  # two files in the cache
        path = tmp_path / f"pictures/{index % 2}/{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(index, (8, 8))))
    data = DataSettings(images=f"{tmp_path}/pictures", cache_dir=f"{tmp_path}/cache", held_out=0)
    in_memory = open_training_images(preset, data)
    source = open_source(preset, data=data)  # writes the cache
    cached = open_training_images(preset, data)
    assert "in the cache" in cached.name and "in the cache" not in in_memory.name
    assert cached.shuffle == in_memory.shuffle and cached.classes == in_memory.classes == ("0", "1")
    everything = np.arange(70)
    for ours, theirs in zip(cached.take(everything), in_memory.take(everything), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(cached.take(everything)[0], ImageReader(source)(0, 70))
    assert same_batches(cached, source, batch_size=32)
