"""Images as tf.data of uint8 [H, W, C]: the digits of scikit-learn, TFDS, and StyleGAN's TFRecords.

The order of the training images is a function of the seed and the step: each epoch is shuffled with a seed of its own,
while the records are still encoded, and a resumed run skips to its place. (Flips belong to the training step.)
Measurements read the images of a split in the order of their records.
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
