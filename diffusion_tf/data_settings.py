"""Where a run's images come from, as flags and as the entry `data` of `config.json`."""

import dataclasses
from typing import Any

from diffusion_tf.errors import ConfigError

RESIZE_MODES = ("crop", "pad", "stretch", "none")
PICTURES_SHAPE = (64, 64, 3)  # the default (H, W, C) of a run on pictures of different sizes
SOURCES = ("images", "npz", "tfds", "tfrecord")  # the settings that name images
WITHOUT_TENSORFLOW = ("images", "npz", "tfrecord", "resize", "held_out", "cache_dir")  # what can be read without it


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """The images of a run; without any, those of the preset.

    Attributes:
      images: a folder of pictures.
      npz: an .npz file with uint8 images [N, H, W, C].
      tfds: a prepared TFDS dataset, NAME or NAME:VERSION.
      tfrecord: StyleGAN TFRecords, a file or a glob.
      resize: how pictures of another size get that of the run: one of RESIZE_MODES.
      held_out: the fraction of `images` or `npz` that is the test split, unless there is one.
      data_dir: the folder of prepared TFDS datasets; default: ~/tensorflow_datasets.
      cache_dir: the folder in which pictures are kept as TFRecords; default: ~/.cache/diffusion_tf.
      skip_bad_records: the number of unreadable TFRecords or pictures to tolerate; other records replace them, and
        pictures are left out.

    Raises:
      ConfigError: the settings do not fit together, or one is out of range.
    """

    images: str | None = None
    npz: str | None = None
    tfds: str | None = None
    tfrecord: str | None = None
    resize: str = "crop"
    held_out: float = 0.05
    data_dir: str | None = None
    cache_dir: str | None = None
    skip_bad_records: int = 0

    def __post_init__(self) -> None:
        sources = [name for name in SOURCES if getattr(self, name)]
        if len(sources) > 1:
            raise ConfigError(sources[1], f"and `{sources[0]}` both name images: give one")
        if self.resize not in RESIZE_MODES:
            raise ConfigError("resize", f"={self.resize}: choose one of {', '.join(RESIZE_MODES)}")
        if not 0 <= self.held_out < 1:
            raise ConfigError("held_out", f"={self.held_out} must be in [0, 1)")
        if self.skip_bad_records < 0:
            raise ConfigError("skip_bad_records", f"={self.skip_bad_records} must be 0 or more")
        for name, value in self.to_json().items():
            if name in _GOES_WITH and not set(sources) & set(_GOES_WITH[name]):
                with_names = " or ".join(f"`{source}`" for source in _GOES_WITH[name])
                raise ConfigError(name, f"={value} goes with {with_names}")

    @property
    def names_images(self) -> bool:
        """Whether a setting names images, so that the preset's own are not used."""
        return any(getattr(self, name) for name in SOURCES)

    def replaced(self, given: dict[str, Any]) -> "DataSettings":
        """Returns these settings with the given ones in their place; other images take over what still applies.

        Raises:
          ConfigError: the settings do not fit together.
        """
        named = [name for name in SOURCES if given.get(name)]
        if not named:
            return dataclasses.replace(self, **given)
        kept = {
            name: value
            for name, value in self.to_json().items()
            # Bad records were counted in other images.
            if name not in (*SOURCES, "skip_bad_records") and set(named) & set(_GOES_WITH.get(name, SOURCES))
        }
        return DataSettings(**{**kept, **given})

    def to_json(self) -> dict[str, Any]:
        """The settings that are not defaults."""
        values = dataclasses.asdict(self)
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value != defaults[name]}


# The settings that are used only with images from some sources.
_GOES_WITH = {
    "resize": ("images", "npz", "tfds"),
    "held_out": ("images", "npz"),
    "cache_dir": ("images", "tfds"),
    "skip_bad_records": ("tfrecord", "images"),
}
PRESETS_OWN = DataSettings()
