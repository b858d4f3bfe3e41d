"""Groups of flags that several programs have, and what their values mean to the library."""

import dataclasses
import os
import re
from collections.abc import Sequence
from typing import Any

from absl import flags

from diffusion_tf.conditioning import Condition, parse_labels
from diffusion_tf.data_settings import PRESETS_OWN, RESIZE_MODES, WITHOUT_TENSORFLOW, DataSettings
from diffusion_tf.errors import InputError
from diffusion_tf.presets import CHOICES, PRESETS, PRETRAINED, Preset, get_preset
from diffusion_tf.runtime import STRATEGIES
from diffusion_tf.solvers import CLIPS, SAMPLERS, SPACINGS, SamplerSettings

FLAGS = flags.FLAGS
_data_flags: list[str] = []  # those of this program that are settings of `DataSettings`
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


def define_run_flags() -> None:
    """Defines --workdir and --pretrained, which name a trained run."""
    define_workdir_flag()
    flags.DEFINE_enum(
        "pretrained", None, PRETRAINED, "Use weights that ship with the package, in place of a run's by --workdir."
    )


def define_strategy_flags() -> None:
    """Defines --strategy and --tpu."""
    flags.DEFINE_enum(
        "strategy",
        "auto",
        STRATEGIES,
        "Where to run. auto: a TPU if --tpu is given or one is attached, else all GPUs if there are several, else one"
        " device. multi_worker reads TF_CONFIG.",
    )
    flags.DEFINE_string(
        "tpu",
        None,
        "`local`: the chips of this TPU VM. `slice`: those of all hosts of its slice, and grpc://HOST:PORT,HOST:PORT:"
        " those of these hosts, where serve_tpu must run. Or the name of a TPU.",
    )


def define_precision_flag() -> None:
    """Defines --precision for a run that is not trained."""
    doc = "Compute dtype of convolutions and matmuls. Default: as in training."
    flags.DEFINE_enum("precision", None, CHOICES["precision"], doc)


def define_data_flags(*, images: bool = True, without_tensorflow: bool = False) -> None:
    """Defines the flags that say where images come from: the fields of `DataSettings`.

    Args:
      images: False for a program whose flag --images means something else.
      without_tensorflow: whether only those that need no TensorFlow.
    """
    run = " Default for measurements: as in training."
    names = [field.name for field in dataclasses.fields(DataSettings)]
    _data_flags[:] = [
        name for name in (WITHOUT_TENSORFLOW if without_tensorflow else names) if images or name != "images"
    ]
    if images:
        define_path("images", None, f"Folder of pictures, at any depth; train/ and test/ in it are its splits.{run}")
    define_path("npz", None, f"An .npz file of uint8 `images` or `samples` [N, H, W, C], and maybe `labels` [N].{run}")
    flags.DEFINE_enum(
        "resize",
        None,
        RESIZE_MODES,
        "How pictures of another size become images: crop cuts the centre of the right aspect ratio and scales it, pad"
        " scales the whole picture and adds white, stretch changes the aspect ratio, none refuses them."
        f" Default: {PRESETS_OWN.resize}; for measurements, as in training.",
    )
    flags.DEFINE_float(
        "held_out",
        None,
        "Fraction of the pictures of --images or --npz that is the test split, unless the folder has one."
        f" Default: {PRESETS_OWN.held_out}; for measurements, as in training.",
        lower_bound=0.0,
    )
    define_path("tfrecord", None, f"StyleGAN TFRecords: a file, or a glob of shards.{run}")
    define_path(
        "cache_dir",
        None,
        "Folder where pictures are kept as TFRecords. Default: ~/.cache/diffusion_tf, or in XDG_CACHE_HOME.",
    )
    if without_tensorflow:
        return
    flags.DEFINE_string("tfds", None, f"A prepared TFDS dataset of images: NAME or NAME:VERSION.{run}")
    define_path("data_dir", None, "Folder of prepared TFDS datasets. Default: ~/tensorflow_datasets.")
    flags.DEFINE_integer(
        "skip_bad_records",
        None,
        "Number of bad records of --tfrecord to replace, or of unreadable pictures of --images to leave out."
        " Default: 0; for measurements of the training images, as in training.",
        lower_bound=0,
    )


def data_from_flags(run: DataSettings = PRESETS_OWN) -> DataSettings:
    """Where the flags find the images; without such a flag, as in `run`.

    Raises:
      InputError: the flags do not fit together.
    """
    return run.replaced({name: FLAGS[name].value for name in _data_flags if FLAGS[name].present})


def define_measurement_flags(
    *, batch_size: int | None, out: str = "JSON file to write. Default: in the workdir.", images: bool = True
) -> None:
    """Defines the flags of every measurement: the run, where to compute, images, checkpoint, seed and output.

    Args:
      batch_size: the default of --batch_size.
      out: the help of --out.
      images: as for `define_data_flags`.
    """
    define_run_flags()
    define_strategy_flags()
    define_data_flags(images=images)
    flags.DEFINE_integer("checkpoint", None, "Step of the checkpoint. Default: the newest.")
    flags.DEFINE_integer("batch_size", batch_size, "Images computed at once, over all replicas.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed of the noise.", lower_bound=0, upper_bound=2**32 - 1)
    define_precision_flag()
    define_path("out", None, out)


def define_sampler_flags() -> None:
    """Defines the flags that `sampler_from_flags` reads."""
    flags.DEFINE_enum(
        "sampler",
        None,
        SAMPLERS,
        "ancestral is Algorithm 2. The others need 10 to 50 steps. Default: ancestral for all T steps, sde_dpm_solver++"
        " for fewer.",
    )
    flags.DEFINE_integer(
        "sampler_steps",
        None,
        "Network evaluations per sample. Default: all T; 50 for ddim, 20 for dpm_solver++ and sde_dpm_solver++, 35 for"
        " heun.",
        lower_bound=1,
    )
    flags.DEFINE_float("ddim_eta", 0.0, "Noise of ddim: 0 is none, 1 is the variance of the posterior.")
    flags.DEFINE_enum("sampler_spacing", "trailing", SPACINGS, "How the timesteps are chosen.")
    flags.DEFINE_enum(
        "clip_sample",
        "static",
        CLIPS,
        "How the predicted x_0 is limited in every step: static clips it to [-1, 1], dynamic scales each picture by its"
        " 99.5th percentile, none leaves it.",
    )
    flags.DEFINE_boolean(
        "use_clipped_model_output",
        None,
        "Compute eps from the limited x_0; otherwise eps is as predicted. Default: the latter for ddim only.",
    )


def define_condition_flags() -> None:
    """Defines --label and --guidance."""
    flags.DEFINE_string(
        "label",
        None,
        "Classes to draw, for a run with classes: names or indices separated by commas, which the samples take in turn,"
        " or none. Default: all classes; none for pictures that are changed.",
    )
    flags.DEFINE_float(
        "guidance",
        0.0,
        "Guidance w towards the label, from (1 + w) f(x, label) - w f(x): 0 is none. It doubles the cost.",
    )


def condition_from_flags(preset: Preset, classes: Sequence[str], default: tuple[int, ...] = ()) -> Condition:
    """The labels and guidance that `define_condition_flags` asks for.

    Args:
      preset: the run's configuration.
      classes: the names of its classes.
      default: the labels without --label, as in `Condition`.

    Raises:
      InputError: they do not fit the run.
    """
    labels = default if FLAGS.label is None else parse_labels(FLAGS.label, classes, preset.num_classes)
    return Condition(labels, FLAGS.guidance).resolve(preset)


def define_bound_flags() -> None:
    """Defines the flags of measurements of the variational bound."""
    define_measurement_flags(batch_size=100)
    flags.DEFINE_enum("split", "test", ("train", "test"), "Split of the images; --tfrecord must name files of it.")
    flags.DEFINE_integer("num_images", None, "Number of images of the split. Default: all.", lower_bound=1)
    flags.DEFINE_boolean("labels", True, "Condition the bound on the labels of the images, for a run with classes.")


def define_preset_flags(note: str = "") -> None:
    """Defines --dataset, a flag for every other field of `Preset`, and --image_height as another name of one.

    Args:
      note: what to add to the help of --dataset.
    """
    flags.DEFINE_string("dataset", "digits", f"The preset: {', '.join(PRESETS)}.{note}")
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
    flags.DEFINE_alias("image_height", "image_size")


def preset_from_flags(run: Preset | None = None) -> Preset:
    """The preset that --dataset names, or `run`, with the flags that were given in place of its values.

    Raises:
      InputError: the preset is unknown, or a value is out of range.
    """
    return dataclasses.replace(run or get_preset(FLAGS.dataset), **preset_overrides())


def preset_overrides() -> dict[str, Any]:
    """The values that flags give to fields of a preset.

    Raises:
      InputError: a value is of another type.
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
    return overrides


def image_shape(default: tuple[int, int, int]) -> tuple[int, int, int]:
    """(H, W, C) by --image_size, --image_width and --channels, and otherwise as in `default`; one size is a square."""
    height, width, channels = default
    if FLAGS.image_size is not None:
        height, width = FLAGS.image_size, FLAGS.image_size
    return height, FLAGS.image_width or width, FLAGS.channels or channels


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
    return unresolved_sampler_from_flags().resolve(preset)


def unresolved_sampler_from_flags() -> SamplerSettings:
    """The sampler that `define_sampler_flags` asks for, without defaults."""
    return SamplerSettings(
        FLAGS.sampler,
        FLAGS.sampler_steps,
        FLAGS.ddim_eta,
        FLAGS.sampler_spacing,
        clip_sample=FLAGS.clip_sample,
        use_clipped_model_output=FLAGS.use_clipped_model_output,
    )


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
    if FLAGS.pretrained is None:
        require_flags("workdir")
    elif FLAGS.workdir is not None:
        raise InputError("give one of --workdir and --pretrained")
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
