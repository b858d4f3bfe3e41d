"""Every recipe of Appendix B as data, and `digits`, which a laptop trains in minutes.

A `Preset` is the whole resolved configuration of a run: the programs make one flag of each of its fields, and
write it to `config.json`.
"""

import dataclasses
import hashlib
import json
from typing import Any

from diffusion_tf.errors import ConfigError

CHOICES = {
    "beta_schedule": ("linear", "quad", "const", "warmup10", "warmup50", "jsd"),
    "model_mean_type": ("eps", "xstart", "xprev"),
    "model_var_type": ("fixedlarge", "fixedsmall", "learned"),
    "loss_type": ("mse", "kl"),
    "precision": ("float32", "bfloat16"),
}


def _field(doc: str, default: Any = dataclasses.MISSING, *, recipe: bool = True) -> Any:
    """A field with its help text; `recipe=False` marks what a resumed run may change."""
    return dataclasses.field(default=default, metadata={"help": doc, "recipe": recipe})


@dataclasses.dataclass(frozen=True)
class Preset:
    """A recipe: data, network, diffusion process, optimisation, and how often a run reports.

    Raises:
      InputError: a value is outside its range; the message names the flag.
    """

    dataset: str = _field("Which preset: the data and the recipe that goes with them.")
    image_size: int = _field("Height and width of the images, in pixels.")
    channels: int = _field("Colour channels of the images.", 3)
    random_flip: bool = _field("Mirror each training image left to right with probability 1/2.", True)

    ch: int = _field("Channels of the network's first level.", 128)
    ch_mult: tuple[int, ...] = _field("Channels of each resolution level, as multiples of `ch`.", (1, 2, 2, 2))
    num_res_blocks: int = _field("Residual blocks at each resolution level.", 2)
    attn_resolutions: tuple[int, ...] = _field("Feature map sizes that get self-attention.", (16,))
    dropout: float = _field("Dropout rate in the residual blocks, in [0, 1).", 0.0)

    precision: str = _field("Of convolutions and matrix products; all else, and the weights, is float32.", "float32")

    num_timesteps: int = _field("T, the steps of the diffusion process.", 1000)
    beta_schedule: str = _field("How beta_t grows.", "linear")
    beta_start: float = _field("beta of the first step.", 1e-4)
    beta_end: float = _field("beta of the last step.", 0.02)
    model_mean_type: str = _field("What the network predicts.", "eps")
    model_var_type: str = _field("The variance of the reverse process.", "fixedlarge")
    loss_type: str = _field("mse is L_simple (Eq. 14); kl is the variational bound (Eq. 5).", "mse")

    learning_rate: float = _field("Adam's learning rate after the warm-up.", 2e-4)
    batch_size: int = _field("Images a step, over all replicas.", 128)
    num_steps: int = _field("Training steps in all; a larger value later continues the run.", 800_000, recipe=False)
    warmup_steps: int = _field("Steps over which the learning rate grows linearly from 0.", 5000)
    grad_clip: float = _field("Largest global norm of the gradient averaged over replicas.", 1.0)
    ema_decay: float = _field("Decay of the averaged weights that every sample and metric uses, in [0, 1).", 0.9999)
    seed: int = _field("Seed of the weights, the order of the data and all noise, in [0, 2^32).", 0)

    steps_per_loop: int = _field(
        "Steps between two lines of metrics; they run on the device unseen.", 100, recipe=False
    )
    checkpoint_every: int = _field("Steps between checkpoints.", 5000, recipe=False)
    keep_checkpoints: int = _field("How many of the newest checkpoints to keep.", 3, recipe=False)
    keep_every: int = _field(
        "Also keep for ever the checkpoints at multiples of this step; 0: none.", 100_000, recipe=False
    )
    sample_every: int = _field("Steps between grids of EMA samples; 0: none.", 20_000, recipe=False)
    max_skipped_steps: int = _field(
        "Steps in a row without finite loss and gradient, at which the run goes back to its last checkpoint, once.",
        20,
        recipe=False,
    )

    def __post_init__(self):
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(name, f"={getattr(self, name)}: choose one of {', '.join(choices)}")
        positive = ("image_size", "channels", "ch", "num_res_blocks", "learning_rate", "batch_size", "num_steps")
        for name in (
            *positive,
            "grad_clip",
            "steps_per_loop",
            "checkpoint_every",
            "keep_checkpoints",
            "max_skipped_steps",
        ):
            _require(self, name, lambda v: 0 < v < float("inf"), "must be greater than 0")
        for name in ("warmup_steps", "keep_every", "sample_every"):
            _require(self, name, lambda v: v >= 0, "must be 0 or more")
        for name in ("dropout", "ema_decay"):
            _require(self, name, lambda v: 0 <= v < 1, "must be in [0, 1)")
        for name in ("beta_start", "beta_end"):
            _require(self, name, lambda v: 0 < v < 1, "must be in (0, 1)")
        _require(self, "num_timesteps", lambda v: v >= 2, "must be 2 or more")
        _require(self, "seed", lambda v: 0 <= v < 2**32, "must be in [0, 2^32)")
        _require(self, "ch_mult", lambda v: v and min(v) > 0, "must be positive whole numbers")
        for name in ("checkpoint_every", "sample_every"):
            _require(
                self,
                name,
                lambda v: v % self.steps_per_loop == 0,
                f"must be a multiple of `steps_per_loop={self.steps_per_loop}`",
            )
        _require(
            self,
            "keep_every",
            lambda v: v % self.checkpoint_every == 0,
            f"must be a multiple of `checkpoint_every={self.checkpoint_every}`",
        )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return (self.image_size, self.image_size, self.channels)

    def recipe_sha256(self) -> str:
        """A digest of the fields that a resumed run must share with the run it resumes."""
        fields = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.metadata["recipe"]
        }
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    def recipe_differences(self, other: "Preset") -> list[str]:
        """The fields that a resumed run must share with the run it resumes, and does not, as `name: ours != theirs`."""
        return [
            f"{field.name}: {getattr(self, field.name)} != {getattr(other, field.name)}"
            for field in dataclasses.fields(self)
            if field.metadata["recipe"] and getattr(self, field.name) != getattr(other, field.name)
        ]


def _require(preset: Preset, name: str, accepts, what: str) -> None:
    value = getattr(preset, name)
    if not accepts(value):
        raise ConfigError(name, f"={value}: {what}")


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
        ),
        Preset(dataset="cifar10", image_size=32, dropout=0.1),
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


def get_preset(dataset: str, **overrides) -> Preset:
    """The preset named `dataset`, with `overrides` in place of its values.

    Raises:
      InputError: the name is unknown, or a value is out of range.
    """
    if dataset not in PRESETS:
        raise ConfigError("dataset", f"={dataset}: choose one of {', '.join(PRESETS)}")
    return dataclasses.replace(PRESETS[dataset], **overrides)
