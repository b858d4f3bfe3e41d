"""Where a run's images come from, as flags and as the entry `data` of `config.json`."""

import dataclasses
from typing import Any

from diffusion_tf.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """The images of a run; without any, those of the preset.

    Attributes:
      data_dir: the folder of prepared TFDS datasets; default: ~/tensorflow_datasets.
      tfrecord: StyleGAN TFRecords, a file or a glob.
      skip_bad_records: the number of unreadable TFRecords to tolerate; others replace them.
    """

    data_dir: str | None = None
    tfrecord: str | None = None
    skip_bad_records: int = 0

    def __post_init__(self) -> None:
        if self.skip_bad_records and not self.tfrecord:
            raise ConfigError("skip_bad_records", f"={self.skip_bad_records} goes with `tfrecord`")

    def to_json(self) -> dict[str, Any]:
        """The settings that are not defaults."""
        values = dataclasses.asdict(self)
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value != defaults[name]}


PRESETS_OWN = DataSettings()
