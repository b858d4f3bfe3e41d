"""What the programs share: flags, and errors told in one line."""

import dataclasses
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from absl import app, flags, logging
from PIL import Image

from diffusion_tf.data import open_source
from diffusion_tf.data.source import ImageSource
from diffusion_tf.errors import ConfigError, InputError, PreemptedError
from diffusion_tf.evaluation.feature_networks import (
    DIGITS_SHAPE,
    FeatureNetwork,
    digits_network,
    inception_network,
    pixels_network,
)
from diffusion_tf.evaluation.scores import Images, source_images
from diffusion_tf.likelihood import Bound, measure_bound
from diffusion_tf.presets import CHOICES, PRESETS, Preset, get_preset
from diffusion_tf.runtime.strategies import STRATEGIES, make_strategy
from diffusion_tf.solvers import SAMPLERS, SPACINGS, SamplerSettings
from diffusion_tf.storage import checkpoints
from diffusion_tf.storage.files import check_writable, first_line
from diffusion_tf.storage.workdir import Workdir

FLAGS = flags.FLAGS
# Flags defined by these functions belong to the program that calls them, so that its --help shows them.
flags.disclaim_key_flags()


def define_workdir_flag() -> None:
    """--workdir."""
    flags.DEFINE_string("workdir", None, "The run's folder (may be gs://).")


def define_strategy_flags() -> None:
    """--strategy and --tpu."""
    flags.DEFINE_enum(
        "strategy",
        "auto",
        STRATEGIES,
        "Where to run. auto: a TPU if --tpu is given or one is attached, all GPUs if several, else one device."
        " multi_worker reads TF_CONFIG.",
    )
    flags.DEFINE_string("tpu", None, "`local` on a TPU VM, or the TPU's name.")


def define_precision_flag() -> None:
    """--precision, of a run's network when it is not trained."""
    flags.DEFINE_enum("precision", None, CHOICES["precision"], "Of the network's products. Default: as in training.")


def define_data_flags() -> None:
    """--data_dir and --tfrecord."""
    flags.DEFINE_string("data_dir", None, "The folder of prepared TFDS datasets. Default: ~/tensorflow_datasets.")
    flags.DEFINE_string("tfrecord", None, "StyleGAN TFRecords (a file, or a glob of shards) to read the images from.")


def define_measurement_flags(
    *, batch_size: int | None, out: str = "The JSON file to write. Default: in the workdir."
) -> None:
    """What every look at a trained run asks: --workdir, where to run, which weights, images, seed and file."""
    define_workdir_flag()
    define_strategy_flags()
    define_data_flags()
    flags.DEFINE_integer("checkpoint", None, "The step of the checkpoint to use. Default: the newest.")
    flags.DEFINE_integer("batch_size", batch_size, "Images computed at once, over all replicas.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed of the noise.", lower_bound=0, upper_bound=2**32 - 1)
    define_precision_flag()
    flags.DEFINE_string("out", None, out)


def define_sampler_flags() -> None:
    """Which sampler draws, in how many steps."""
    flags.DEFINE_enum(
        "sampler",
        "ancestral",
        SAMPLERS,
        "ancestral is Algorithm 2; the others need 10 to 50 steps for like samples.",
    )
    flags.DEFINE_integer(
        "sampler_steps",
        None,
        "Network evaluations for each sample. Default: all T steps; for ddim 50, for dpm_solver++ 20.",
        lower_bound=1,
    )
    flags.DEFINE_float("ddim_eta", 0.0, "Noise of ddim: 0 none, 1 as much as the posterior's.")
    flags.DEFINE_enum("sampler_spacing", None, SPACINGS, "Which of the T steps. Default: the sampler's own.")


def sampler_from_flags(run: "Run") -> SamplerSettings:
    """What `define_sampler_flags` asks for, every default filled in.

    Raises:
      InputError: it does not fit the run.
    """
    settings = SamplerSettings(FLAGS.sampler, FLAGS.sampler_steps, FLAGS.ddim_eta, FLAGS.sampler_spacing)
    return settings.resolve(run.preset)


def define_bound_flags() -> None:
    """What the measurements of the bound ask."""
    define_measurement_flags(batch_size=100)
    flags.DEFINE_enum("split", "test", ("train", "test"), "Which images; --tfrecord names the split's own files.")
    flags.DEFINE_integer("num_images", None, "How many images of the split. Default: all.", lower_bound=1)


def define_preset_flags() -> None:
    """--dataset, and a flag for every other field of `Preset` that defaults to the preset's value."""
    flags.DEFINE_string("dataset", "digits", f"The preset: {', '.join(PRESETS)}.")
    for field in dataclasses.fields(Preset):
        doc = f"{flag_names(field.metadata['help'])} Default: the preset's value."
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
            flags.DEFINE_list(field.name, None, f"{doc} Whole numbers with commas between them.")


def preset_from_flags(run: Preset | None = None) -> Preset:
    """The preset that --dataset names, or that of a run, with the values of the flags that were given.

    Raises:
      InputError: an unknown preset, or a value out of range.
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
                raise InputError(f"--{field.name}={','.join(value)}: whole numbers with commas between them") from error
        overrides[field.name] = value
    return dataclasses.replace(run or get_preset(FLAGS.dataset), **overrides)


def out_path(default: str, extension: str) -> str:
    """--out, or `default`; checked that it can be written, and leaves room for pictures beside it.

    Raises:
      InputError: another extension, or it cannot be written.
    """
    path = FLAGS.out or default
    if not path.endswith(extension):
        raise InputError(f"--out={path} must end in {extension}")
    check_writable(path)
    return path


def require_flags(*names: str) -> None:
    """Raises InputError naming the first of these flags that was not given."""
    for name in names:
        if FLAGS[name].value is None:
            raise InputError(f"--{name} is required")


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained run as the flags name it, and where it is to be measured."""

    workdir: Workdir
    preset: Preset
    strategy: tf.distribute.Strategy

    @classmethod
    def from_flags(cls) -> "Run":
        """Reads --workdir, --precision, --strategy and --tpu.

        Raises:
          InputError: there is no such run, or the strategy is of several processes.
        """
        require_flags("workdir")
        if FLAGS.strategy == "multi_worker":
            raise InputError("--strategy=multi_worker is for training: this is one process's work")
        workdir = Workdir(FLAGS.workdir)
        preset = workdir.read_preset()
        if FLAGS.precision:
            preset = dataclasses.replace(preset, precision=FLAGS.precision)
        return cls(workdir, preset, make_strategy(FLAGS.strategy, FLAGS.tpu))

    def find_checkpoint(self) -> tuple[int, str]:
        """(step, path) of --checkpoint, or of the newest.

        Raises:
          InputError: there is none, or it is no checkpoint.
        """
        step, path = checkpoints.find(self.workdir.checkpoints, FLAGS.checkpoint)
        checkpoints.load_manifest(path)  # before the work, not after it
        return step, path

    def open_source(self, split: str) -> ImageSource:
        """The images of a split of the run's data, at --data_dir or --tfrecord."""
        return open_source(self.preset, split, data_dir=FLAGS.data_dir, tfrecord=FLAGS.tfrecord)


def bound_from_flags(run: Run, num_timesteps_estimate: int | None = None) -> tuple[Bound, dict[str, Any]]:
    """The bound that `define_bound_flags` asks for, and what it was measured on, for the JSON file."""
    step, checkpoint = run.find_checkpoint()
    source = open_source(run.preset, FLAGS.split, data_dir=FLAGS.data_dir, tfrecord=FLAGS.tfrecord)
    num_images = min(FLAGS.num_images or source.num_examples, source.num_examples)
    bound = measure_bound(
        run.strategy,
        run.preset,
        checkpoint,
        source,
        num_images=num_images,
        batch_size=FLAGS.batch_size,
        seed=FLAGS.seed,
        partial=run.workdir.partial,
        num_timesteps_estimate=num_timesteps_estimate,
    )
    subject = {"dataset": run.preset.dataset, "images": source.name, "split": FLAGS.split, "num_images": num_images}
    return bound, {**subject, "step": step, "seed": FLAGS.seed}


def read_image(path: str, shape: tuple[int, int, int]) -> np.ndarray:
    """The image of a PNG or the like, uint8 of `shape`.

    Raises:
      InputError: it cannot be read, or is of another shape.
    """
    try:
        with Image.open(os.path.expanduser(path)) as picture:
            image = np.asarray(picture)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the image {path} ({first_line(error)})") from error
    image = image[..., None] if image.ndim == 2 else image
    if image.dtype != np.uint8 or image.shape != shape:
        raise InputError(
            f"{path} is {image.dtype} {image.shape}, the run's images are uint8 {shape} (height, width, C)"
        )
    return image


def feature_network(run: Run, name: str) -> FeatureNetwork:
    """The network whose features images are compared by: inception (--inception), digits or pixels.

    Raises:
      InputError: it cannot be loaded, or is not for such images.
    """
    if name == "inception":
        return inception_network(FLAGS.inception, run.strategy)
    if name == "digits" and run.preset.image_shape != DIGITS_SHAPE:
        raise InputError(f"--features=digits knows 8x8 digits, not {run.preset.image_shape}")
    return digits_network() if name == "digits" else pixels_network(run.preset.image_shape)


def split_images(run: Run, split: str, at_most: int) -> Images:
    """The first images of the run's data, to compare samples with.

    Raises:
      InputError: they cannot be read.
    """
    source = open_source(run.preset, split, data_dir=FLAGS.data_dir, tfrecord=FLAGS.tfrecord)
    return source_images(source, run.preset.dataset, split, min(at_most, source.num_examples))


def run(main: Callable[..., None], commands: Sequence[str] = ()) -> None:
    """Runs a program: parses flags, calls `main()`, and tells what ended it in one line on stderr, by its exit code.

    Where there are `commands`, the first argument is one of them, and is given to `main`.
    """

    def guarded_main(argv):
        if FLAGS["verbosity"].using_default_value:
            logging.set_verbosity(logging.WARNING)  # TFDS tells at length what it opens
        try:
            arguments = argv[1:]
            if commands and (not arguments or arguments[0] not in commands):
                raise InputError(f"the first argument is one of: {', '.join(commands)}")
            command = arguments[: 1 if commands else 0]
            if unknown := arguments[len(command) :]:
                raise InputError(f"unknown argument {unknown[0]}: flags start with --")
            main(*command)
        except (InputError, PreemptedError) as error:
            print(f"{_program()}: {_in_flags(error)}", file=sys.stderr)
            sys.exit(error.exit_code)
        except tf.errors.ResourceExhaustedError:
            sys.exit(f"{_program()}: out of memory: a smaller --batch_size, or more replicas, may fit")
        except KeyboardInterrupt:
            sys.exit(f"{_program()}: interrupted")

    app.run(guarded_main, flags_parser=_parse_flags)


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        return FLAGS(argv)
    except flags.Error as error:
        sys.exit(f"{_program()}: {' '.join(str(error).split())}")
    except SystemExit:
        sys.exit(0)  # absl's --help exits with 1, and nothing else exits here; asking for help is no error


def _in_flags(error: Exception) -> str:
    """The message of a library error; what it calls a setting is a flag here."""
    prefix = "--" if isinstance(error, ConfigError) and error.field in FLAGS else ""
    return prefix + flag_names(str(error))


def flag_names(text: str) -> str:
    """Replaces each quoted setting, as `batch_size` or `batch_size=8`, by its flag, --batch_size=8."""
    return re.sub(r"`(\w+)(=[^`]*)?`", lambda m: f"--{m[1]}{m[2] or ''}" if m[1] in FLAGS else m[0], text)


def _program() -> str:
    return os.path.splitext(os.path.basename(sys.argv[0]))[0]
