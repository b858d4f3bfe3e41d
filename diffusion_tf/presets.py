"""The recipes of Appendix B as data, and two small ones: `digits`, which a laptop trains in minutes, `cifar10_small`.

A `Preset` is the complete configuration of a run. Each field is a flag of the programs and an entry of the run's
`config.json`. To add a preset, add it to PRESETS.
"""

import dataclasses
import hashlib
import json
import math
import numbers
from collections.abc import Callable
from typing import Any

from diffusion_tf.errors import ConfigError, quoted

CHOICES = {
    "beta_schedule": ("linear", "quad", "const", "warmup10", "warmup50", "jsd"),
    "model_mean_type": ("eps", "xstart", "xprev"),
    "model_var_type": ("fixedlarge", "fixedsmall", "learned"),
    "loss_type": ("mse", "kl"),
    "precision": ("float32", "bfloat16"),
}


def _field(
    help_text: str,
    default: Any = dataclasses.MISSING,
    *,
    recipe: bool = True,
    changeable: bool = False,
    added: bool = False,
) -> Any:
    """A field and its help text.

    Args:
      help_text: the help text.
      default: the default value.
      recipe: False if a resumed run may change the field.
      changeable: whether a resumed run may change a field of the recipe if the user allows it: the network, the
        diffusion process, the data and their order stay.
      added: whether the field is younger than the first checkpoints: at its default it is not part of the digest of
        the recipe, so that they keep theirs.
    """
    metadata = {"help": help_text, "recipe": recipe, "changeable": changeable, "added": added}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Preset:
    """A recipe: data, network, diffusion process, training, and how often a run reports.

    Lists become tuples, and NumPy's numbers Python's.

    Raises:
      ConfigError: a value is of another type, or out of range.
    """

    dataset: str = _field("The preset: which data, and the recipe for it.")
    image_size: int = _field("Height of the images in pixels, and their width unless `image_width` is another.")
    image_width: int = _field("Width of the images in pixels; 0: as their height.", 0, added=True)
    channels: int = _field("Colour channels of the images.", 3)
    random_flip: bool = _field("Flip each training image horizontally with probability 1/2.", True)
    random_shift: int = _field(
        "Shift each training image by up to this many pixels in each direction; its mirror image fills the border.",
        0,
        added=True,
    )

    ch: int = _field("Channels of the network at the highest resolution.", 128)
    ch_mult: tuple[int, ...] = _field("Channels at each resolution, as multiples of `ch`.", (1, 2, 2, 2))
    num_res_blocks: int = _field("Residual blocks at each resolution.", 2)
    attn_resolutions: tuple[int, ...] = _field("Resolutions with self-attention, as heights in pixels.", (16,))
    attention_head_dim: int = _field("Channels of each head of self-attention; 0: one head.", 0, added=True)
    mid_attention: bool = _field("Whether the middle of the network has self-attention.", True, added=True)
    norm_eps: float = _field("What group normalisation adds to the variance.", 1e-6, added=True)
    flip_sin_to_cos: bool = _field("Whether the cosines of t come before its sines.", False, added=True)
    freq_shift: int = _field(
        "0: the wavelengths of t stop one step short of 10,000 (times 2 pi); 1: they reach it.", 1, added=True
    )
    downsample_padding: int = _field(
        "Where a convolution of stride 2 pads: 0 below and to the right; 1 on all sides.", 0, added=True
    )
    dropout: float = _field("Dropout rate of the residual blocks, in [0, 1).", 0.0, changeable=True)

    num_classes: int = _field("Classes that the network is conditioned on; 0: none.", 0, added=True)
    label_dropout: float = _field(
        "Rate at which training hides the label of an image, for samples without a label and for guidance, in [0, 1).",
        0.1,
        added=True,
    )

    precision: str = _field(
        "Compute dtype of convolutions and matmuls; everything else stays float32.", "float32", changeable=True
    )

    num_timesteps: int = _field("Number of diffusion steps T.", 1000)
    beta_schedule: str = _field("How beta grows over the diffusion steps.", "linear")
    beta_start: float = _field("beta of the first diffusion step.", 1e-4)
    beta_end: float = _field("beta of the last diffusion step.", 0.02)
    model_mean_type: str = _field(
        "What the network predicts: the noise (eps), x_0 (xstart) or the mean of x_{t-1} (xprev).", "eps"
    )
    model_var_type: str = _field(
        "Variance of the reverse process: beta (fixedlarge), the posterior's (fixedsmall), or learned.", "fixedlarge"
    )
    loss_type: str = _field("Loss: mse is L_simple (Eq. 14), kl the variational bound (Eq. 5).", "mse", changeable=True)

    learning_rate: float = _field("Learning rate of Adam after the warm-up.", 2e-4, changeable=True)
    batch_size: int = _field("Images in each training step, over all replicas.", 128)
    num_steps: int = _field(
        "Training steps in total; resume with a larger value to train longer.", 800_000, recipe=False
    )
    warmup_steps: int = _field(
        "Training steps over which the learning rate grows linearly from 0.", 5000, changeable=True
    )
    grad_clip: float = _field(
        "Maximum global norm of the gradient, after averaging over replicas.", 1.0, changeable=True
    )
    ema_decay: float = _field(
        "Decay of the EMA weights, which all samples and metrics use, in [0, 1).", 0.9999, changeable=True
    )
    seed: int = _field("Seed of the weights, the data order and all noise, in [0, 2^32).", 0)

    steps_per_loop: int = _field(
        "Training steps between two lines of metrics; they run on the device in one call.", 100, recipe=False
    )
    checkpoint_every: int = _field("Training steps between checkpoints.", 5000, recipe=False)
    keep_checkpoints: int = _field("How many of the newest checkpoints to keep.", 3, recipe=False)
    keep_every: int = _field(
        "Keep the checkpoints at multiples of this step forever; 0 keeps none.", 100_000, recipe=False
    )
    sample_every: int = _field("Training steps between grids of EMA samples; 0 draws none.", 20_000, recipe=False)
    max_skipped_steps: int = _field(
        "After this many successive steps with a loss or gradient that is not finite, return to the last checkpoint,"
        " once.",
        20,
        recipe=False,
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _converted(field.name, field.type, getattr(self, field.name)))
        for name, choices in CHOICES.items():
            self._require(name, getattr(self, name) in choices, f"choose one of {', '.join(choices)}")
        for names, accepts, requirement in _RANGES:
            for name in names.split():
                self._require(name, accepts(getattr(self, name)), requirement)
        for name, largest in _LARGEST.items():
            self._require(name, getattr(self, name) <= largest, f"must be {largest:,} at most")
        for name, base in _MULTIPLES:
            step = getattr(self, base)
            self._require(name, getattr(self, name) % step == 0, f"must be a multiple of `{base}={step}`")
        self._require("random_shift", self.random_shift < min(self.image_shape[:2]), "must be less than the sides")
        for name, size, most, what in (
            ("ch", self.least_weights, _MAX_WEIGHTS, "weights or more"),
            ("image_size", self.image_pixels * self.ch, _MAX_FEATURES, "features of one image in a layer"),
            ("attn_resolutions", self._most_positions, _MAX_POSITIONS, "positions that attend to each other"),
            ("batch_size", self.batch_size * math.prod(self.image_shape), _MAX_FEATURES, "pixels in a batch"),
        ):
            self._require(name, size <= most, f"makes {size:,} {what}; {most:,} at most")

    def _require(self, name: str, valid: bool, requirement: str) -> None:
        if not valid:
            raise ConfigError(name, f"={quoted(getattr(self, name))}: {requirement}")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return (self.image_size, self.image_width or self.image_size, self.channels)

    @property
    def image_pixels(self) -> int:
        """H * W."""
        height, width, _ = self.image_shape
        return height * width

    @property
    def attention_levels(self) -> list[int]:
        """The levels with self-attention; level 0 has the images' resolution."""
        return [level for level in range(len(self.ch_mult)) if self.image_size // 2**level in self.attn_resolutions]

    @property
    def _most_positions(self) -> int:
        height, width, _ = self.image_shape
        return max((size**2 * width // height for size in self.attn_resolutions), default=0)

    @property
    def least_weights(self) -> int:
        """A lower bound of the number of weights: the second convolution of each residual block, and the classes."""
        blocks = 2 * self.num_res_blocks + 1  # down and up, at each resolution
        return sum(9 * blocks * (self.ch * mult) ** 2 for mult in self.ch_mult) + 4 * self.ch * self.num_classes

    def recipe_sha256(self) -> str:
        """Digest of the fields that a resumed run must not change."""
        added = {field.name: field.default for field in dataclasses.fields(self) if field.metadata["added"]}
        recipe = {name: value for name, value in self._recipe().items() if name not in added or value != added[name]}
        return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()

    def recipe_differences(self, other: "Preset") -> list[str]:
        """The fields that a resumed run must not change and that differ, each as `name: ours != theirs`."""
        ours, theirs = self._recipe(), other._recipe()
        return [f"{name}: {v} != {theirs[name]}" for name, v in ours.items() if v != theirs.get(name, v)]

    def _recipe(self) -> dict[str, Any]:
        fields = [field for field in dataclasses.fields(self) if field.metadata["recipe"]]
        recipe = {field.name: getattr(self, field.name) for field in fields}
        if not self.num_classes:
            del recipe["label_dropout"]  # unused without classes
        return recipe


# The fields of the recipe that a resumed run may change if the user allows it.
CHANGEABLE = tuple(field.name for field in dataclasses.fields(Preset) if field.metadata["changeable"])


def _converted(name: str, kind: Any, value: Any) -> Any:
    """`value` as a bool, int, float, str or tuple of ints; raises ConfigError if it is of another kind."""
    if kind == tuple[int, ...] and isinstance(value, list | tuple):
        return tuple(_converted(name, int, item) for item in value)
    accepted, what = _KINDS[kind]
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(name, f"={quoted(value)}: must be {what}")
    if isinstance(value, numbers.Integral) and not -(2**63) <= int(value) < 2**63:
        raise ConfigError(name, ": the number has too many digits")
    return kind(value)


_KINDS: dict[Any, tuple[type, str]] = {
    bool: (bool, "true or false"),
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
    str: (str, "a text"),
    tuple[int, ...]: (tuple, "whole numbers"),
}
# Configurations come from others: none may ask for memory or time that no machine has.
_MAX_WEIGHTS = 2**28  # of the lower bound; the largest network of the paper has 2^26 of these, and 2^28 in all
_MAX_FEATURES = 2**30  # 2^32 bytes in float32
_MAX_POSITIONS = 2**14  # of an image, in attention, whose memory is their square
_LARGEST = {
    "image_size": 1024, "image_width": 1024, "channels": 64, "ch": 4096, "num_res_blocks": 64,
    "attention_head_dim": 4096, "norm_eps": 1.0, "num_timesteps": 100_000,
    "batch_size": 2**20, "num_steps": 10**9, "warmup_steps": 10**9, "steps_per_loop": 10**6,
    "checkpoint_every": 10**9, "keep_checkpoints": 10**6, "keep_every": 10**9, "sample_every": 10**9,
    "max_skipped_steps": 10**9, "num_classes": 10**6,
}  # fmt: skip

# (fields, whether a value is valid, what it must be), in the order in which they are checked.
_RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "image_size channels ch num_res_blocks norm_eps learning_rate batch_size num_steps grad_clip steps_per_loop"
        " checkpoint_every keep_checkpoints max_skipped_steps",
        lambda v: 0 < v < math.inf,
        "must be greater than 0",
    ),
    ("freq_shift downsample_padding", lambda v: v in (0, 1), "must be 0 or 1"),
    (
        "image_width attention_head_dim num_classes random_shift warmup_steps keep_every sample_every",
        lambda v: v >= 0,
        "must be 0 or more",
    ),
    ("dropout label_dropout ema_decay", lambda v: 0 <= v < 1, "must be in [0, 1)"),
    ("beta_start beta_end", lambda v: 0 < v < 1, "must be in (0, 1)"),
    ("num_timesteps", lambda v: v >= 2, "must be 2 or more"),
    ("seed", lambda v: 0 <= v < 2**32, "must be in [0, 2^32)"),
    ("dataset", lambda v: 0 < len(v) <= 80 and v.isprintable(), "must be a name of at most 80 characters"),
    ("ch_mult", lambda v: 0 < len(v) <= 10 and min(v) > 0 and max(v) <= 64, "must be 1 to 10 numbers from 1 to 64"),
    (
        "attn_resolutions",
        lambda v: len(v) <= 10 and all(0 < size <= 1024 for size in v),
        "must be at most 10 numbers from 1 to 1024",
    ),
)
_MULTIPLES = (
    ("checkpoint_every", "steps_per_loop"),
    ("sample_every", "steps_per_loop"),
    ("keep_every", "checkpoint_every"),
)

OWN_IMAGES = "images"  # the name of a preset for images that the user names

_CELEBAHQ256 = Preset(
    dataset="celebahq256", image_size=256, ch_mult=(1, 1, 2, 2, 4, 4), model_var_type="fixedsmall",
    learning_rate=2e-5, batch_size=64, num_steps=500_000,
)  # fmt: skip

PRESETS = {
    preset.dataset: preset
    for preset in (
        Preset(
            dataset="digits", image_size=8, channels=1, random_flip=False, ch=32, ch_mult=(1, 2), num_res_blocks=1,
            attn_resolutions=(), model_var_type="fixedsmall", learning_rate=1e-3, batch_size=64, num_steps=3800,
            warmup_steps=100, ema_decay=0.997, steps_per_loop=50, checkpoint_every=500, keep_every=0,
            sample_every=2000,
            # In so few steps, samples without a label need half of them: with 0.1 their precision falls to 0.75.
            label_dropout=0.5,
        ),
        Preset(dataset="cifar10", image_size=32, dropout=0.1),
        # A quarter of the weights and of the time; too small to overfit, so it needs no dropout.
        Preset(dataset="cifar10_small", image_size=32, ch=64, num_steps=200_000),
        _CELEBAHQ256,
        dataclasses.replace(_CELEBAHQ256, dataset="lsun_church", num_steps=1_200_000),
        dataclasses.replace(_CELEBAHQ256, dataset="lsun_bedroom", num_steps=2_400_000, random_flip=False),
        # "a larger version of the LSUN Bedroom model with approximately 256M parameters": ch=192 has 255,677,955.
        dataclasses.replace(
            _CELEBAHQ256, dataset="lsun_bedroom_large", num_steps=1_150_000, random_flip=False, ch=192
        ),
        dataclasses.replace(_CELEBAHQ256, dataset="lsun_cat", num_steps=1_800_000),
    )
}  # fmt: skip


def resized(preset: Preset, image_size: int) -> Preset:
    """`preset` for images of another size, a power of two from 4 to 1024.

    The network loses its lowest levels if they would be smaller than 4x4, and attends at the sizes nearest to those of
    `preset` that it has.
    """
    ch_mult = preset.ch_mult[: image_size.bit_length() - 2]
    lowest = image_size >> (len(ch_mult) - 1)
    attends = {min(max(size, lowest), image_size) for size in preset.attn_resolutions}
    return dataclasses.replace(
        preset, image_size=image_size, ch_mult=ch_mult, attn_resolutions=tuple(sorted(attends, reverse=True))
    )


def get_preset(dataset: str, **overrides: Any) -> Preset:
    """The preset named `dataset`, with `overrides` for some of its fields.

    Raises:
      ConfigError: the name is unknown, or a value is out of range.
    """
    if dataset not in PRESETS:
        raise ConfigError("dataset", f"={dataset}: choose one of {', '.join(PRESETS)}")
    return dataclasses.replace(PRESETS[dataset], **overrides)
