"""Images as tf.data of uint8 [H, W, C]: the digits of scikit-learn, TFDS, and StyleGAN's TFRecords.

The order of the training images is a function of the seed and the step: each epoch is shuffled with a seed of its own,
while the records are still encoded, and a resumed run skips to its place. (Flips belong to the training step.)
Measurements read the images of a split in the order of their records.
"""

import dataclasses
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_tf.errors import InputError
from diffusion_tf.files import first_line
from diffusion_tf.presets import Preset

TFDS_NAMES = {"cifar10": "cifar10", "celebahq256": "celeb_a_hq/256"}

# What tf.data raises of damaged, missing or malformed records.
READ_ERRORS = (tf.errors.DataLossError, tf.errors.InvalidArgumentError, tf.errors.NotFoundError)

# Bounds the memory of shuffling; the encoded records are no larger than their pixels.
_SHUFFLE_BYTES = 2**30
# Every tenth digit is the test split, so that both splits hold digits of every writer.
_DIGITS_TEST_EVERY = 10


@dataclasses.dataclass(frozen=True)
class ImageSource:
    """Where images come from.

    Attributes:
      name: what they are, for people to read.
      num_examples: images in one epoch.
      records: records(epoch_seed) is a dataset of one epoch's encoded images, shuffled by `epoch_seed`, an int64 scalar
        tensor, or in their order where it is None.
      decode: one encoded image to uint8 [H, W, C].
      image_shape: (H, W, C).
      find_bad: names the first record that cannot be read, and why; None where all can. It reads them all.
      bad_records: how many records cannot be read, and have others in their place.
    """

    name: str
    num_examples: int
    records: Callable[[tf.Tensor | None], tf.data.Dataset]
    decode: Callable[[tf.Tensor], tf.Tensor]
    image_shape: tuple[int, int, int]
    find_bad: Callable[[], str | None] = lambda: None
    bad_records: int = 0

    def read_error(self, error: Exception) -> InputError:
        """What to tell of one of READ_ERRORS: the file and the record."""
        return InputError(f"{self.name} cannot be read: {self.find_bad() or first_line(error)}")


def open_source(
    preset: Preset,
    split: str = "train",
    *,
    data_dir: str | None = None,
    tfrecord: str | None = None,
    skip_bad_records: int = 0,
) -> ImageSource:
    """The images of `preset`, from `tfrecord` (a StyleGAN file or glob) where given, else its own place.

    Args:
      preset: names the data, and the shape that it must have.
      split: train or test. StyleGAN TFRecords know no splits: the files are the split.
      data_dir: the folder of prepared TFDS datasets; default ~/tensorflow_datasets.
      tfrecord: a StyleGAN TFRecord file, or a glob of them.
      skip_bad_records: so many of its records may be bad, and are replaced by the ones before them. To know them, all
        are read now.

    Raises:
      InputError: the data is missing, damaged, or of another shape; the message names the flag and the file.
    """
    if tfrecord:
        return _tfrecord_source(tfrecord, preset.image_shape, skip_bad_records)
    if skip_bad_records:
        raise InputError(f"--skip_bad_records={skip_bad_records} goes with --tfrecord")
    if preset.dataset == "digits":
        return _digits_source(split, preset.image_shape)
    if preset.dataset in TFDS_NAMES:
        return _tfds_source(TFDS_NAMES[preset.dataset], split, data_dir, preset.image_shape)
    raise InputError(
        f"--dataset={preset.dataset} is read from StyleGAN TFRecords: name them by --tfrecord=FILE_OR_GLOB"
    )


def training_batches(
    source: ImageSource,
    *,
    batch_size: int,
    per_replica: int,
    seed: int,
    start_step: int,
    worker: int = 0,
    workers: int = 1,
) -> tf.data.Dataset:
    """Endless batches uint8 [per_replica, H, W, C] of one worker, from training step `start_step` on.

    The global batch of step s is records s * batch_size ... of the shuffled stream, whatever the number of workers
    and replicas; worker w takes the w-th of its `workers` equal slices. Resuming reads, but does not decode, the part
    of one epoch that was already seen.
    """
    first = start_step * batch_size
    share = batch_size // workers
    epochs = tf.data.Dataset.range(first // source.num_examples, 2**31)
    return (
        epochs.flat_map(lambda epoch: source.records((seed << 31) + epoch))
        .skip(first % source.num_examples)
        .batch(batch_size)
        .map(lambda records: records[worker * share : (worker + 1) * share])
        .unbatch()
        .map(source.decode, num_parallel_calls=tf.data.AUTOTUNE)
        .batch(per_replica, drop_remainder=True, num_parallel_calls=tf.data.AUTOTUNE)
        .prefetch(tf.data.AUTOTUNE)
    )


class ImageReader:
    """Reads the images of a source in the order of their records; to go on from the last call, none is read twice."""

    def __init__(self, source: ImageSource):
        self._source = source
        self._images: Iterator[np.ndarray] = iter(())
        self._position = -1

    def __call__(self, first: int, count: int) -> np.ndarray:
        """Images first .. first + count - 1, uint8 [count, H, W, C].

        Raises:
          InputError: they cannot be read.
        """
        if first != self._position:
            images = self._source.records(None).skip(first).map(self._source.decode, tf.data.AUTOTUNE)
            self._images = images.prefetch(tf.data.AUTOTUNE).as_numpy_iterator()
        try:
            images = list(itertools.islice(self._images, count))
        except READ_ERRORS as error:
            raise self._source.read_error(error) from error
        if len(images) < count:
            raise InputError(f"{self._source.name} ends after {first + len(images)} images, and promised more")
        self._position = first + count
        return np.stack(images)


def identity(source: ImageSource) -> dict[str, Any]:
    """What tells the images of `source` from others of the same name: their number, and a digest of the first."""
    first = hashlib.sha256(ImageReader(source)(0, 1).tobytes()).hexdigest()
    return {"images": source.name, "num_examples": source.num_examples, "first_image_sha256": first}


def _shuffled(dataset: tf.data.Dataset, buffer: int, seed: tf.Tensor | None) -> tf.data.Dataset:
    return dataset if seed is None else dataset.shuffle(buffer, seed=seed)


def _shuffle_buffer(num_examples: int, image_shape: tuple[int, int, int]) -> int:
    return min(num_examples, _SHUFFLE_BYTES // int(np.prod(image_shape)))


def _require_shape(where: str, found, wanted: tuple[int, int, int]) -> None:
    if tuple(found) != tuple(wanted):
        raise InputError(
            f"{where}: images are {tuple(found)}, the preset wants {tuple(wanted)} (height, width, channels)"
        )


# --- digits ------------------------------------------------------------------------------------------------


def load_digits(split: str = "all") -> np.ndarray:
    """scikit-learn's 1,797 scanned digits, uint8 [N, 8, 8, 1]; `split` is train, test (every tenth) or all.

    Their 17 grey levels 0..16 are spread over 0..255.
    """
    import sklearn.datasets  # only digits need it

    images = np.round(sklearn.datasets.load_digits().images * (255.0 / 16.0)).astype(np.uint8)[..., None]
    return images[_in_split(len(images), split)]


def load_digit_labels(split: str = "all") -> np.ndarray:
    """Which digits `load_digits(split)` shows, int64 [N] in 0..9."""
    import sklearn.datasets

    labels = sklearn.datasets.load_digits().target
    return labels[_in_split(len(labels), split)]


def _in_split(count: int, split: str) -> np.ndarray:
    test = np.arange(count) % _DIGITS_TEST_EVERY == _DIGITS_TEST_EVERY - 1
    return {"train": ~test, "test": test, "all": np.full(count, True)}[split]


def _digits_source(split: str, image_shape: tuple[int, int, int]) -> ImageSource:
    images = load_digits(split)
    _require_shape("--dataset=digits", images.shape[1:], image_shape)

    def records(epoch_seed):
        return _shuffled(tf.data.Dataset.from_tensor_slices(images), len(images), epoch_seed)

    return ImageSource(f"scikit-learn digits, {split}", len(images), records, lambda image: image, image_shape)


# --- TFDS --------------------------------------------------------------------------------------------------


def _tfds_source(name: str, split: str, data_dir: str | None, image_shape: tuple[int, int, int]) -> ImageSource:
    import tensorflow_datasets as tfds  # seconds to import, and only TFDS data needs it

    data_dir = os.path.expanduser(data_dir or os.path.join("~", "tensorflow_datasets"))
    folder = os.path.join(data_dir, name)
    versions = sorted(tf.io.gfile.glob(os.path.join(folder, "*.*.*")), key=_version)
    if not versions:
        raise InputError(
            f"--data_dir={data_dir} holds no prepared {name}: make it with `tfds build {name} --data_dir={data_dir}`"
        )
    try:
        builder = tfds.builder_from_directory(versions[-1])
    except (OSError, ValueError, tf.errors.OpError, tfds.core.DatasetNotFoundError) as error:
        raise InputError(f"--data_dir: {versions[-1]} is no complete TFDS dataset ({first_line(error)})") from error
    if "image" not in (builder.info.features or ()):
        raise InputError(f"--data_dir: {versions[-1]} has no images: this version of {name} is not for this program")
    _require_shape(versions[-1], builder.info.features["image"].shape, image_shape)
    if split not in builder.info.splits:
        raise InputError(f"--split={split}: {versions[-1]} has only {', '.join(builder.info.splits)}")
    num_examples = builder.info.splits[split].num_examples
    buffer = _shuffle_buffer(num_examples, image_shape)

    def records(epoch_seed):
        encoded = builder.as_dataset(
            split=split,
            shuffle_files=False,
            decoders={"image": tfds.decode.SkipDecoding()},
            read_config=tfds.ReadConfig(try_autocache=False),  # each epoch is a dataset of its own
        )
        return _shuffled(encoded.map(lambda example: example["image"]), buffer, epoch_seed)

    def decode(encoded):
        image = tf.io.decode_image(encoded, channels=image_shape[-1], expand_animations=False)
        return tf.ensure_shape(image, image_shape)

    def find_bad():
        skip = {"image": tfds.decode.SkipDecoding()}
        check = lambda record: decode(builder.info.features.deserialize_example(record, decoders=skip)["image"])
        bad = (_bad_records(file, check, at_most=1) for file in builder.info.splits[split].filepaths)
        return next((text for texts in bad for text in texts.values()), None)

    label = f"{name}/{os.path.basename(versions[-1])}, {split}"
    return ImageSource(label, num_examples, records, decode, image_shape, find_bad)


def _version(folder: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else -1 for part in os.path.basename(folder.rstrip("/")).split("."))


# --- StyleGAN TFRecords ------------------------------------------------------------------------------------

_TFRECORD_FEATURES = {"shape": tf.io.FixedLenFeature([3], tf.int64), "data": tf.io.FixedLenFeature([], tf.string)}
_TFRECORD_OVERHEAD = 16  # length (8), its CRC (4), the record's CRC (4)


def _tfrecord_source(pattern: str, image_shape: tuple[int, int, int], skip_bad_records: int) -> ImageSource:
    files = sorted(tf.io.gfile.glob(os.path.expanduser(pattern)))
    if not files:
        raise InputError(f"--tfrecord={pattern} matches no file")
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
    buffer = _shuffle_buffer(num_examples, image_shape)
    runs = [
        (file, begin * record_bytes, count)
        for file, (num_records, record_bytes, rest), there in zip(files, counts, bad, strict=True)
        for begin, count in _runs(num_records + (rest > 0), there)
    ]

    def records(epoch_seed):
        shuffled_files = _shuffled(tf.data.Dataset.from_tensor_slices(files), len(files), epoch_seed)
        if not any(bad):
            return _shuffled(tf.data.TFRecordDataset(shuffled_files), buffer, epoch_seed)
        all_runs = tf.data.Dataset.from_tensor_slices(tuple(map(list, zip(*runs, strict=True))))
        in_order = shuffled_files.flat_map(lambda file: _read_runs(all_runs.filter(lambda of, *_: of == file)))
        return _shuffled(in_order, buffer, epoch_seed)

    def find_bad():
        texts = (text for file in files for text in _bad_records(file, decode, at_most=1).values())
        text = next(texts, None)
        return text and f"{text}: mend the file, or read another record in its place by --skip_bad_records=N"

    return ImageSource(pattern, num_examples, records, decode, image_shape, find_bad, sum(len(there) for there in bad))


def _tolerated(files, counts, decode, skip_bad_records: int) -> list[dict[int, str]]:
    """The bad records of each file by index, with what is wrong; none are looked for where none are tolerated.

    Raises:
      InputError: there are more than `skip_bad_records`.
    """
    if not skip_bad_records:
        for file, (count, record_bytes, rest) in zip(files, counts, strict=True):
            if rest:
                raise InputError(
                    f"--tfrecord={file} is truncated: record {count} has {rest} of the {record_bytes} bytes of record 0"
                )
        return [{} for _ in files]
    bad = [
        _bad_records(
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
        raise InputError(f"--skip_bad_records={skip_bad_records}: there are more bad records: {'; '.join(texts[:5])}")
    return bad


def _read_runs(runs: tf.data.Dataset) -> tf.data.Dataset:
    """The records of (file, offset, count): `count` of a TFRecord file from a byte on; -1 is all that follow."""

    def read(file, offset, count):
        # tf.data.TFRecordDataset has no offset.
        variant = tf.raw_ops.TFRecordDatasetV2(
            filenames=[file], compression_type="", buffer_size=2**18, byte_offsets=[tf.cast(offset, tf.int64)]
        )
        records = tf.data.experimental.from_variant(variant, tf.TensorSpec([], tf.string))
        return records.take(tf.cast(count, tf.int64))

    return runs.flat_map(read)


def _bad_records(
    file: str, decode: Callable, *, at_most: int, record_bytes: int | None = None, num_records: int = 0
) -> dict[int, str]:
    """What is wrong with the records of a file, by their index: the first `at_most`, or one where lengths differ.

    Args:
      file: a TFRecord file.
      decode: makes a picture of a record, or raises one of READ_ERRORS.
      at_most: how many to look for.
      record_bytes: of each record in the file, if all have as many; it is what leads past a bad one.
      num_records: how many there should be: TensorFlow ends at a last one of a few bytes without a word.
    """
    bad: dict[int, str] = {}
    index = 0
    while len(bad) < at_most:
        rest = tf.data.Dataset.from_tensors((file, index * (record_bytes or 0), -1))
        images = _read_runs(rest).map(decode, tf.data.AUTOTUNE).as_numpy_iterator()
        try:
            for _ in images:
                index += 1
            if index >= num_records:
                return bad
            bad[index] = f"{file}: record {index} (it is cut off)"
        except READ_ERRORS as error:
            bad[index] = f"{file}: record {index} ({_reason(error)})"
        if record_bytes is None:
            return bad
        index += 1
    return bad


def _reason(error: Exception) -> str:
    """What a reading error says, without TensorFlow's own places in it."""
    if isinstance(error, tf.errors.DataLossError):
        return "its bytes do not match their CRC, or are cut off"
    return "no picture of the wanted shape can be made of it"


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
        raise InputError(
            f"--tfrecord={file} is a folder: name the .tfrecords files that StyleGAN's dataset_tool makes of it"
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
            raise InputError(f"--tfrecord={file} holds no records")
        example = tf.io.parse_single_example(first, _TFRECORD_FEATURES)
    except (tf.errors.DataLossError, tf.errors.InvalidArgumentError) as error:
        raise InputError(
            f"--tfrecord={file} is not a StyleGAN TFRecord (its first record is cut off, or lacks `shape` and `data`)"
        ) from error
    channels, height, width = example["shape"].numpy()
    _require_shape(f"--tfrecord={file}", (int(height), int(width), int(channels)), image_shape)
    if len(example["data"].numpy()) != np.prod(image_shape):
        raise InputError(f"--tfrecord={file}: record 0 holds {len(example['data'].numpy())} bytes, not uint8 pixels")

    record_bytes = len(first.numpy()) + _TFRECORD_OVERHEAD
    count, rest = divmod(size, record_bytes)
    return count, record_bytes, rest
