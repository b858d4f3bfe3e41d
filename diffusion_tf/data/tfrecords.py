"""Images as tf.data of uint8 [H, W, C]: the digits of scikit-learn, TFDS, and StyleGAN's TFRecords.

The order of the training images is a function of the seed and the step: each epoch is shuffled with a seed of its own,
while the records are still encoded, and a resumed run skips to its place. (Flips belong to the training step.)
Measurements read the images of a split in the order of their records.
"""

import os
from collections.abc import Iterator, Mapping

import numpy as np
import tensorflow as tf

from diffusion_tf.data.source import ImageSource, bad_records, read_runs, require_shape, shuffle_buffer, shuffled
from diffusion_tf.errors import ConfigError

_TFRECORD_FEATURES = {"shape": tf.io.FixedLenFeature([3], tf.int64), "data": tf.io.FixedLenFeature([], tf.string)}

_TFRECORD_OVERHEAD = 16  # length (8), its CRC (4), the record's CRC (4)


def tfrecord_source(pattern: str, image_shape: tuple[int, int, int], skip_bad_records: int) -> ImageSource:
    files = sorted(tf.io.gfile.glob(os.path.expanduser(pattern)))
    if not files:
        raise ConfigError("tfrecord", f"={pattern} matches no file")
    height, width, channels = image_shape

    def decode(record):
        example = tf.io.parse_single_example(record, _TFRECORD_FEATURES)
        wanted = tf.constant([channels, height, width], tf.int64)
        with tf.control_dependencies([tf.debugging.assert_equal(example["shape"], wanted, "its shape is another")]):
            image = tf.reshape(tf.io.decode_raw(example["data"], tf.uint8), [channels, height, width])
        return tf.transpose(image, [1, 2, 0])

    counts = [_count_records(file, image_shape) for file in files]
    bad = _tolerated(files, counts, decode, skip_bad_records)
    num_examples = sum(count + (rest > 0) for count, _, rest in counts)
    buffer = shuffle_buffer(num_examples, image_shape)
    runs = [
        (file, begin * record_bytes, count)
        for file, (num_records, record_bytes, rest), there in zip(files, counts, bad, strict=True)
        for begin, count in _runs(num_records + (rest > 0), there)
    ]

    def records(epoch_seed):
        shuffled_files = shuffled(tf.data.Dataset.from_tensor_slices(files), len(files), epoch_seed)
        if not any(bad):
            return shuffled(tf.data.TFRecordDataset(shuffled_files), buffer, epoch_seed)
        all_runs = tf.data.Dataset.from_tensor_slices(tuple(map(list, zip(*runs, strict=True))))
        in_order = shuffled_files.flat_map(lambda file: read_runs(all_runs.filter(lambda of, *_: of == file)))
        return shuffled(in_order, buffer, epoch_seed)

    def find_bad():
        texts = (text for file in files for text in bad_records(file, decode, at_most=1).values())
        text = next(texts, None)
        return text and f"{text}: mend the file, or read another record in its place by `skip_bad_records=N`"

    return ImageSource(pattern, num_examples, records, decode, image_shape, find_bad, sum(len(there) for there in bad))


def _tolerated(files, counts, decode, skip_bad_records: int) -> list[dict[int, str]]:
    """The bad records of each file by index, with what is wrong; none are looked for where none are tolerated.

    Raises:
      InputError: there are more than `skip_bad_records`.
    """
    if not skip_bad_records:
        for file, (count, record_bytes, rest) in zip(files, counts, strict=True):
            if rest:
                raise ConfigError(
                    "tfrecord",
                    f"={file} is truncated: record {count} has {rest} of the {record_bytes} bytes of record 0",
                )
        return [{} for _ in files]
    bad = [
        bad_records(
            file,
            decode,
            at_most=skip_bad_records + 1,
            record_bytes=record_bytes,
            num_records=num_records + (rest > 0),
        )
        for file, (num_records, record_bytes, rest) in zip(files, counts, strict=True)
    ]
    texts = [text for there in bad for text in there.values()]
    if len(texts) > skip_bad_records:
        raise ConfigError(
            "skip_bad_records", f"={skip_bad_records}: there are more bad records: {'; '.join(texts[:5])}"
        )
    return bad


def _runs(num_records: int, bad: Mapping[int, str]) -> Iterator[tuple[int, int]]:
    """(first, count) of consecutive records to read, so that a bad one has the last good one before it in its place."""
    sound = next((i for i in range(num_records) if i not in bad), 0)
    begin = 0
    for index in sorted(bad):
        if index > begin:
            yield begin, index - begin
            sound = index - 1
        yield sound, 1
        begin = index + 1
    if begin < num_records:
        yield begin, num_records - begin


def _count_records(file: str, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """How many whole records are in `file`, of how many bytes, and how many bytes are left over.

    It looks at the first: all are of one length, so that the file's size tells the rest.
    """
    if tf.io.gfile.isdir(file):
        raise ConfigError(
            "tfrecord", f"={file} is a folder: name the .tfrecords files that StyleGAN's dataset_tool makes of it"
        )
    try:
        size = tf.io.gfile.stat(file).length
        with tf.io.gfile.GFile(file, "rb") as start:
            stated = int.from_bytes(start.read(8), "little")
        # TensorFlow takes memory for what a record claims to be before it reads it.
        if size and stated + _TFRECORD_OVERHEAD > size:
            raise tf.errors.DataLossError(None, None, "longer than its file")
        first = next(iter(tf.data.TFRecordDataset(file).take(1)), None)
        if first is None:
            raise ConfigError("tfrecord", f"={file} holds no records")
        example = tf.io.parse_single_example(first, _TFRECORD_FEATURES)
    except (tf.errors.DataLossError, tf.errors.InvalidArgumentError) as error:
        raise ConfigError(
            "tfrecord", f"={file} is not a StyleGAN TFRecord (its first record is cut off, or lacks `shape` and `data`)"
        ) from error
    channels, height, width = example["shape"].numpy()
    require_shape(f"`tfrecord={file}`", (int(height), int(width), int(channels)), image_shape)
    if len(example["data"].numpy()) != np.prod(image_shape):
        raise ConfigError("tfrecord", f"={file}: record 0 holds {len(example['data'].numpy())} bytes, not uint8 pixels")

    record_bytes = len(first.numpy()) + _TFRECORD_OVERHEAD
    count, rest = divmod(size, record_bytes)
    return count, record_bytes, rest
