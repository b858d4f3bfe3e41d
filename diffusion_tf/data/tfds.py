"""Images as tf.data of uint8 [H, W, C]: the digits of scikit-learn, TFDS, and StyleGAN's TFRecords.

The order of the training images is a function of the seed and the step: each epoch is shuffled with a seed of its own,
while the records are still encoded, and a resumed run skips to its place. (Flips belong to the training step.)
Measurements read the images of a split in the order of their records.
"""

import os

import tensorflow as tf

from diffusion_tf.data.source import ImageSource, bad_records, require_shape, shuffle_buffer, shuffled
from diffusion_tf.errors import ConfigError
from diffusion_tf.storage.files import first_line

TFDS_NAMES = {"cifar10": "cifar10", "celebahq256": "celeb_a_hq/256"}


def tfds_source(name: str, split: str, data_dir: str | None, image_shape: tuple[int, int, int]) -> ImageSource:
    import tensorflow_datasets as tfds  # seconds to import, and only TFDS data needs it

    data_dir = os.path.expanduser(data_dir or os.path.join("~", "tensorflow_datasets"))
    folder = os.path.join(data_dir, name)
    versions = sorted(tf.io.gfile.glob(os.path.join(folder, "*.*.*")), key=_version)
    if not versions:
        raise ConfigError(
            "data_dir", f"={data_dir} holds no prepared {name}: make it with `tfds build {name} --data_dir={data_dir}`"
        )
    try:
        builder = tfds.builder_from_directory(versions[-1])
    except (OSError, ValueError, tf.errors.OpError, tfds.core.DatasetNotFoundError) as error:
        raise ConfigError("data_dir", f": {versions[-1]} is no complete TFDS dataset ({first_line(error)})") from error
    if "image" not in (builder.info.features or ()):
        raise ConfigError("data_dir", f": {versions[-1]} has no images: this version of {name} is not for this program")
    require_shape(versions[-1], builder.info.features["image"].shape, image_shape)
    if split not in builder.info.splits:
        raise ConfigError("split", f"={split}: {versions[-1]} has only {', '.join(builder.info.splits)}")
    num_examples = builder.info.splits[split].num_examples
    buffer = shuffle_buffer(num_examples, image_shape)

    def records(epoch_seed):
        encoded = builder.as_dataset(
            split=split,
            shuffle_files=False,
            decoders={"image": tfds.decode.SkipDecoding()},
            read_config=tfds.ReadConfig(try_autocache=False),  # each epoch is a dataset of its own
        )
        return shuffled(encoded.map(lambda example: example["image"]), buffer, epoch_seed)

    def decode(encoded):
        image = tf.io.decode_image(encoded, channels=image_shape[-1], expand_animations=False)
        return tf.ensure_shape(image, image_shape)

    def find_bad():
        skip = {"image": tfds.decode.SkipDecoding()}
        check = lambda record: decode(builder.info.features.deserialize_example(record, decoders=skip)["image"])
        bad = (bad_records(file, check, at_most=1) for file in builder.info.splits[split].filepaths)
        return next((text for texts in bad for text in texts.values()), None)

    label = f"{name}/{os.path.basename(versions[-1])}, {split}"
    return ImageSource(label, num_examples, records, decode, image_shape, find_bad)


def _version(folder: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else -1 for part in os.path.basename(folder.rstrip("/")).split("."))
