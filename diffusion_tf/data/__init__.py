"""Training and test images as tf.data datasets of uint8 [H, W, C].

The order of the training images is a function of the seed and the step: each epoch is shuffled with its own seed while
the records are still encoded, and a resumed run skips to its place. Flips belong to the training step. Measurements
read the images of a split in the order of their records.
"""

from diffusion_tf.data.digits import digits_source
from diffusion_tf.data.source import ImageSource
from diffusion_tf.data.tfds import TFDS_NAMES, tfds_source
from diffusion_tf.data.tfrecords import tfrecord_source
from diffusion_tf.errors import ConfigError
from diffusion_tf.presets import Preset


def open_source(
    preset: Preset,
    split: str = "train",
    *,
    data_dir: str | None = None,
    tfrecord: str | None = None,
    skip_bad_records: int = 0,
) -> ImageSource:
    """Opens the images of `preset`, from StyleGAN TFRecords if `tfrecord` is given.

    Args:
      preset: names the dataset and the shape of its images.
      split: train or test; ignored for StyleGAN TFRecords, where the files are the split.
      data_dir: the folder of prepared TFDS datasets; default ~/tensorflow_datasets.
      tfrecord: a StyleGAN TFRecord file, or a glob of such files.
      skip_bad_records: the number of unreadable TFRecords to tolerate; each is replaced by the record before it. If it
        is not 0, all records are read now to find them.

    Raises:
      InputError: the data is missing, damaged or of another shape; the message names the setting and the file.
    """
    if tfrecord:
        return tfrecord_source(tfrecord, preset.image_shape, skip_bad_records)
    if skip_bad_records:
        raise ConfigError("skip_bad_records", f"={skip_bad_records} goes with `tfrecord`")
    if preset.dataset == "digits":
        return digits_source(split, preset.image_shape)
    if preset.dataset in TFDS_NAMES:
        return tfds_source(TFDS_NAMES[preset.dataset], split, data_dir, preset.image_shape)
    raise ConfigError(
        "dataset", f"={preset.dataset} is read from StyleGAN TFRecords: name them by `tfrecord=FILE_OR_GLOB`"
    )
