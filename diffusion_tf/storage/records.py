"""The types of the JSON values that a run's folder holds, as far as programs read them; further keys are allowed."""

from typing import Annotated, NotRequired, TypedDict

from msgspec import Meta

Count = Annotated[int, Meta(ge=0)]
Number = float | None  # NaN and infinity become null


class Value(TypedDict):
    """The values of a field of `Preset` before and after a change."""

    old: float | str
    new: float | str


class Change(TypedDict):
    """A change of a run's recipe."""

    step: Count
    changes: dict[str, Value]


class InitFrom(TypedDict):
    """The weights with which a run started."""

    path: str
    sha256: str


class Config(TypedDict):
    """`config.json`: the fields of `Preset`, which checks them, and what is known of the training images."""

    num_examples: Count | None
    history: NotRequired[list[Change]]
    data: NotRequired[dict[str, float | str]]
    init_from: NotRequired[InitFrom]
    classes: NotRequired[list[str]]


class Metrics(TypedDict):
    """A line of `metrics.jsonl`."""

    step: Count
    loss: NotRequired[Number]
    grad_norm: NotRequired[Number]


class Reference(TypedDict):
    """The real images of an evaluation: a data set has `images`, its name, and a file `file`.

    Published statistics are a file that does not say their number.
    """

    num_images: NotRequired[Count]
    images: NotRequired[str]
    file: NotRequired[str]
    split: NotRequired[str]


class Evaluation(TypedDict):
    """A line of `evaluations.jsonl`. Its scores are further keys; old versions did not record the sampler."""

    step: Count
    num_samples: Count
    reference: Reference
    checkpoint_sha256: NotRequired[str]
    compute_dtype: NotRequired[str]
    sampler: NotRequired[str]
    sampler_steps: NotRequired[Count]
    ddim_eta: NotRequired[Number]
    sampler_spacing: NotRequired[str | None]
    clip_sample: NotRequired[str]
    use_clipped_model_output: NotRequired[bool]
    labels: NotRequired[str]  # of a conditional run, like guidance
    guidance: NotRequired[Number]
    notes: NotRequired[dict[str, str]]


class BestEvaluation(Evaluation):
    """`checkpoints/best/evaluation.json`: the evaluation of the best checkpoint, and the score that chose it."""

    best_by: str


class Calibration(TypedDict):
    """`calibration/step_STEP.json`: moments of true and predicted noise at some timesteps."""

    checkpoint: str
    precision: str
    num_images: Count
    timesteps: list[Count]
    cross: list[float]
    power: list[float]
    loss: list[float]


class SampleFolder(TypedDict):
    """`samples.json` in a folder of samples; what they depend on are further keys."""

    num_samples: Count
    complete: bool


class Measurement(TypedDict):
    """What was measured."""

    images: str
    num_images: Count
    step: Count
    given: NotRequired[str]  # `labels`: the bound of log p(x_0 | label)
    notes: NotRequired[dict[str, str]]


class Likelihood(Measurement):
    """`likelihood_SPLIT.json`."""

    bits_per_dim: float
    bits_per_dim_standard_error: Number
    prior_bits_per_dim: float
    middle_bits_per_dim: float
    decoder_bits_per_dim: float
    terms_bits_per_dim: list[float]
    levels: NotRequired[Annotated[int, Meta(ge=1, le=256)]]  # of the images; old versions did not count them


class RateDistortionRow(TypedDict):
    """A point of the rate-distortion curve."""

    rate_bits_per_dim: float
    distortion_rmse: float


class RateDistortion(Measurement):
    """`rate_distortion_SPLIT.json`: ten rows, and the curve at every t, which old versions did not record."""

    table: Annotated[list[RateDistortionRow], Meta(min_length=1)]
    curve: NotRequired[list[RateDistortionRow]]


class CompressionRow(TypedDict):
    """The files of `compress`, cut off after a step."""

    steps_bits_per_dim: float
    distortion_rmse: float


class Compression(Measurement):
    """`compression_SPLIT.json`."""

    table: Annotated[list[CompressionRow], Meta(min_length=1)]


class Neighbors(TypedDict):
    """`neighbors.json`: samples and held-out images beside the training images, as `copying.compare` compares them."""

    images: str
    num_images: Count
    num_samples: Count
    num_held_out: Count
    features: str
    verdict: str
    sentence: str
    p_value: float
    probability_nearer: float
    near_share: float
    near_p_value: float
    median_distance: float
    held_out_median_distance: float
    copies: Count
    mirrored_copies: Count
    distances: Annotated[list[float], Meta(min_length=1)]
    held_out_distances: Annotated[list[float], Meta(min_length=1)]
    notes: NotRequired[dict[str, str]]
