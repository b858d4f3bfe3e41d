"""Groups of flags that several programs have, and what their values mean to the library."""

import dataclasses
import os
import re
from collections.abc import Sequence
from typing import Any

from absl import flags

from diffusion_tf.conditioning import Condition, parse_labels
from diffusion_tf.data_settings import PRESETS_OWN, DataSettings
from diffusion_tf.errors import InputError
from diffusion_tf.presets import CHOICES, PRESETS, Preset, get_preset
from diffusion_tf.runtime import STRATEGIES
from diffusion_tf.solvers import SAMPLERS, SPACINGS, SamplerSettings

FLAGS = flags.FLAGS
# Flags defined by these functions belong to the program that calls them, and appear in its --help.
flags.disclaim_key_flags()


class _PathParser(flags.ArgumentParser):
    """Parses a path: `~` is the home folder."""

    syntactic_help = "a path"

    def parse(self, argument: str) -> str:
        if not argument:
            raise ValueError("the path is empty")
        return os.path.expanduser(argument)

    def flag_type(self) -> str:
        return "path"


def define_path(name: str, default: str | None, doc: str) -> None:
    """Defines a flag whose value is a path."""
    flags.DEFINE(_PathParser(), name, default, doc, serializer=flags.ArgumentSerializer())


def define_workdir_flag() -> None:
    """Defines --workdir."""
    define_path("workdir", None, "Folder of the run (may be gs://).")


def define_strategy_flags() -> None:
    """Defines --strategy and --tpu."""
    flags.DEFINE_enum(
        "strategy",
        "auto",
        STRATEGIES,
        "Where to run. auto: a TPU if --tpu is given or one is attached, else all GPUs if there are several, else one"
        " device. multi_worker reads TF_CONFIG.",
    )
    flags.DEFINE_string("tpu", None, "`local` on a TPU VM, or the name of a TPU.")


def define_precision_flag() -> None:
    """Defines --precision for a run that is not trained."""
    doc = "Compute dtype of convolutions and matmuls. Default: as in training."
    flags.DEFINE_enum("precision", None, CHOICES["precision"], doc)


def define_data_flags() -> None:
    """Defines --data_dir and --tfrecord."""
    define_path("data_dir", None, "Folder of prepared TFDS datasets. Default: ~/tensorflow_datasets.")
    define_path(
        "tfrecord",
        None,
        "StyleGAN TFRecords to read the images from: a file, or a glob of shards. Default for measurements: those of"
        " training.",
    )


def data_from_flags(run: DataSettings = PRESETS_OWN) -> DataSettings:
    """Where the flags find the images; without such a flag, as in `run`.

    Raises:
      InputError: the flags do not fit together.
    """
    names = [field.name for field in dataclasses.fields(DataSettings) if field.name in FLAGS]
    given: dict[str, Any] = {name: FLAGS[name].value for name in names if FLAGS[name].present}
    return DataSettings(**given) if given else run


def define_measurement_flags(
    *, batch_size: int | None, out: str = "JSON file to write. Default: in the workdir."
) -> None:
    """Defines the flags of every measurement: the run, where to compute, images, checkpoint, seed and output."""
    define_workdir_flag()
    define_strategy_flags()
    define_data_flags()
    flags.DEFINE_integer("checkpoint", None, "Step of the checkpoint. Default: the newest.")
    flags.DEFINE_integer("batch_size", batch_size, "Images computed at once, over all replicas.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed of the noise.", lower_bound=0, upper_bound=2**32 - 1)
    define_precision_flag()
    define_path("out", None, out)


def define_sampler_flags() -> None:
    """Defines --sampler, --sampler_steps, --ddim_eta and --sampler_spacing."""
    flags.DEFINE_enum(
        "sampler",
        "ancestral",
        SAMPLERS,
        "ancestral is Algorithm 2. The others give similar samples in 10 to 50 steps.",
    )
    flags.DEFINE_integer(
        "sampler_steps",
        None,
        "Network evaluations per sample. Default: all T steps; 50 for ddim, 20 for dpm_solver++.",
        lower_bound=1,
    )
    flags.DEFINE_float("ddim_eta", 0.0, "Noise of ddim: 0 is none, 1 is the variance of the posterior.")
    flags.DEFINE_enum(
        "sampler_spacing", None, SPACINGS, "How the timesteps are chosen. Default: depends on the sampler."
    )


def define_condition_flags() -> None:
    """Defines --label and --guidance."""
    flags.DEFINE_string(
        "label",
        None,
        "Classes to draw, for a run with classes: names or indices separated by commas, which the samples take in turn,"
        " or none. Default: all classes.",
    )
    flags.DEFINE_float(
        "guidance",
        0.0,
        "Guidance w towards the label, from (1 + w) f(x, label) - w f(x): 0 is none. It doubles the cost.",
    )


def condition_from_flags(preset: Preset, classes: Sequence[str]) -> Condition:
    """The labels and guidance that `define_condition_flags` asks for; `classes` are the names of the run's classes.

    Raises:
      InputError: they do not fit the run.
    """
    labels = () if FLAGS.label is None else parse_labels(FLAGS.label, classes, preset.num_classes)
    return Condition(labels, FLAGS.guidance).resolve(preset)


def define_bound_flags() -> None:
    """Defines the flags of measurements of the variational bound."""
    define_measurement_flags(batch_size=100)
    flags.DEFINE_enum("split", "test", ("train", "test"), "Split of the images; --tfrecord must name files of it.")
    flags.DEFINE_integer("num_images", None, "Number of images of the split. Default: all.", lower_bound=1)
    flags.DEFINE_boolean("labels", True, "Condition the bound on the labels of the images, for a run with classes.")


def define_preset_flags() -> None:
    """Defines --dataset, and a flag for every other field of `Preset`."""
    flags.DEFINE_string("dataset", "digits", f"The preset: {', '.join(PRESETS)}.")
    for field in dataclasses.fields(Preset):
        doc = f"{flag_names(field.metadata['help'])} Default: as in the preset."
        if field.name == "dataset":
            continue
        if field.name in CHOICES:
            flags.DEFINE_enum(field.name, None, CHOICES[field.name], doc)
        elif field.type is bool:
            flags.DEFINE_boolean(field.name, None, doc)
        elif field.type is int:
            flags.DEFINE_integer(field.name, None, doc)
        elif field.type is float:
            flags.DEFINE_float(field.name, None, doc)
        else:
            flags.DEFINE_list(field.name, None, f"{doc} Integers separated by commas.")


def preset_from_flags(run: Preset | None = None) -> Preset:
    """The preset that --dataset names, or `run`, with the flags that were given in place of its values.

    Raises:
      InputError: the preset is unknown, or a value is out of range.
    """
    overrides: dict[str, Any] = {}
    for field in dataclasses.fields(Preset):
        value = FLAGS[field.name].value
        if field.name == "dataset" or value is None:
            continue
        if isinstance(value, list):
            try:
                value = tuple(int(item) for item in value)
            except ValueError as error:
                raise InputError(f"--{field.name}={','.join(value)}: must be integers separated by commas") from error
        overrides[field.name] = value
    return dataclasses.replace(run or get_preset(FLAGS.dataset), **overrides)


def preset_arguments(preset: Preset, base: Preset) -> list[str]:
    """The flags that make `preset` of `base`."""
    values = {field.name: getattr(preset, field.name) for field in dataclasses.fields(Preset)}
    differences = {name: value for name, value in values.items() if value != getattr(base, name)}
    return [
        f"--{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
        for name, value in differences.items()
    ]


def sampler_from_flags(preset: Preset) -> SamplerSettings:
    """The sampler that `define_sampler_flags` asks for, with all defaults filled in.

    Raises:
      InputError: it does not fit the preset.
    """
    settings = SamplerSettings(FLAGS.sampler, FLAGS.sampler_steps, FLAGS.ddim_eta, FLAGS.sampler_spacing)
    return settings.resolve(preset)


def out_path(default: str, extension: str) -> str:
    """--out, or `default`.

    Raises:
      InputError: the path has another extension, or cannot be written.
    """
    from diffusion_tf.storage.files import check_writable  # imports TensorFlow

    check_extension("out", extension)
    path = FLAGS.out or default
    check_writable(path)
    return path


def check_extension(name: str, extension: str) -> None:
    """Raises InputError if the path that a flag gives has another extension than the format that is written."""
    path = FLAGS[name].value
    if path is not None and os.path.splitext(path)[1].lower() != extension:
        raise InputError(f"--{name}={path} must end in {extension}")


def check_measured_run() -> None:
    """Raises InputError for flags of a measurement that no run fits."""
    require_flags("workdir")
    if FLAGS.strategy == "multi_worker":
        raise InputError("--strategy=multi_worker is for training; this program runs in one process")


def require_flags(*names: str) -> None:
    """Raises InputError for the first of these flags that was not given."""
    for name in names:
        if FLAGS[name].value is None:
            raise InputError(f"--{name} is required")


def flag_names(text: str) -> str:
    """Replaces each setting quoted by the library, `batch_size` or `batch_size=8`, by its flag, --batch_size=8."""
    return re.sub(r"`(\w+)(=[^`]*)?`", lambda m: f"--{m[1]}{m[2] or ''}" if m[1] in FLAGS else m[0], text)
