"""Says whether samples copy training pictures: their distances to these, against those of held-out pictures.

  python -m experiments.neighbors --workdir=runs/digits
  python -m experiments.neighbors --workdir=runs/digits --samples=samples.npz --features=digits
  python -m experiments.neighbors --workdir=runs/mine --held_out_tfrecord='held_out-*.tfrecords'

Samples come from the EMA weights of a checkpoint, or from a file. The held-out pictures are those of the test split; if
there are fewer than 20, training pictures take their place, each compared with the others.
Distances are those of pixels, as RMSE on [0, 255], or of the features of a network. Where training mirrors pictures, a
mirrored training picture counts as one.

neighbors.json in the workdir has the verdict in one sentence, the p-values of its tests, and all distances;
neighbors.png shows the samples nearest to a training picture above that picture, and the same of held-out pictures.
"""

import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import flags

from diffusion_tf.data_settings import DataSettings
from diffusion_tf.errors import InputError
from diffusion_tf.evaluation import FEATURES, INCEPTION_TFHUB, LEAST_COMPARED

from . import _flags, _program

FLAGS = flags.FLAGS
_flags.define_measurement_flags(batch_size=64, out="JSON file to write, with a PNG beside it. Default: in the workdir.")
_flags.define_sampler_flags()
_flags.define_condition_flags()
flags.DEFINE_integer("num_samples", 1000, "Number of samples.", lower_bound=LEAST_COMPARED)
_flags.define_path("samples", None, "Take this .npz (`samples`, uint8 [N, H, W, C]) instead of drawing samples.")
flags.DEFINE_integer("num_held_out", 1000, "Largest number of held-out pictures.", lower_bound=LEAST_COMPARED)
_flags.define_path("held_out_tfrecord", None, "StyleGAN TFRecords of held-out pictures. Default: the test split.")
flags.DEFINE_enum("features", "pixels", FEATURES, "What the distances are of.")
_flags.define_path("inception", INCEPTION_TFHUB, "For --features=inception, as experiments.evaluate takes it.")


def _check() -> None:
    _flags.check_measured_run()
    _flags.check_extension("out", ".json")


_program.parse_flags(__name__, _check)


from diffusion_tf import figures
from diffusion_tf.data import open_source
from diffusion_tf.data.source import ImageReader, ImageSource, identity
from diffusion_tf.evaluation import copying
from diffusion_tf.evaluation.copying import Neighbors, training_neighbors
from diffusion_tf.evaluation.feature_networks import in_batches
from diffusion_tf.evaluation.scores import file_images
from diffusion_tf.samplers import Sampler
from diffusion_tf.storage.files import write_file
from diffusion_tf.storage.json_files import write_json
from diffusion_tf.storage.resumable import ResumableBatches
from diffusion_tf.trained_model import TrainedModel

from ._measured_run import MeasuredRun, print_notes

_SHOWN = 12  # pairs


def _held_out(run: MeasuredRun, train: ImageSource) -> ImageSource:
    """The held-out pictures; the training pictures, if a small set holds out fewer than the test takes.

    Raises:
      InputError: there are none: the data knows no splits.
    """
    if FLAGS.held_out_tfrecord:
        source = open_source(run.preset, "test", DataSettings(tfrecord=FLAGS.held_out_tfrecord))
    else:
        source = run.open_source("test")
        if source.num_examples < LEAST_COMPARED <= train.num_examples:
            return train
    same = ("num_examples", "first_image_sha256")
    if [identity(source)[name] for name in same] == [identity(train)[name] for name in same]:
        raise InputError(
            f"{source.name} are the training pictures: name others, which training did not see, by --held_out_tfrecord"
        )
    return source


def _check_count(images: str, count: int) -> None:
    if count < LEAST_COMPARED:
        raise InputError(f"{images}: {count} pictures are too few for a verdict, take at least {LEAST_COMPARED}")


def _samples(run: MeasuredRun) -> tuple[np.ndarray, dict[str, Any], ResumableBatches | None]:
    """The samples, uint8 [N, H, W, C], what they are, as JSON values, and their finished batches if they were drawn."""
    if FLAGS.samples:
        file = file_images(FLAGS.samples, run.preset.image_shape)
        _check_count(FLAGS.samples, file.count)
        return np.asarray(file.pixels(0, file.count)), {"samples": FLAGS.samples}, None
    settings = _flags.sampler_from_flags(run.preset)
    condition = _flags.condition_from_flags(run.preset, run.workdir.read_classes())
    sampling = {"seed": FLAGS.seed, **settings.describe(run.preset), **condition.describe(run.preset)}
    step, checkpoint = run.find_checkpoint()
    trained = TrainedModel.from_checkpoint(run.preset, run.strategy, checkpoint)
    sampler = Sampler(trained, batch_size=FLAGS.batch_size, seed=FLAGS.seed, settings=settings, condition=condition)
    batches = run.sampled_batches(checkpoint, sampling, FLAGS.num_samples)
    drawn = batches.compute(lambda first, count: {"samples": sampler.images(first, count)}, "sampling")
    return np.concatenate([batch["samples"] for batch in drawn]), {"step": step, **sampling}, batches


def _features(run: MeasuredRun) -> Callable[[np.ndarray], np.ndarray]:
    """Maps images uint8 [N, H, W, C] to features [N, D]."""
    if FLAGS.features == "pixels":
        scale = math.sqrt(math.prod(run.preset.image_shape))  # a distance is then an RMSE
        return lambda images: images.reshape(len(images), -1) / scale
    outputs_of = in_batches(run.feature_network(FLAGS.features), run.strategy, FLAGS.batch_size)
    return lambda images: outputs_of(images.astype(np.float32))["features"]


def _sheet(samples: np.ndarray, held_out: np.ndarray, found: list[Neighbors], train: ImageSource, text: str) -> bytes:
    """A PNG of the images nearest to a training picture, above it, for samples and for held-out pictures."""
    rows: list[np.ndarray] = []
    for images, neighbors in zip((samples, held_out), found, strict=True):
        order = np.argsort(neighbors.distances, kind="stable")[:_SHOWN]
        shown = np.zeros((2, _SHOWN, *images.shape[1:]), np.uint8)
        shown[:, : len(order)] = images[order], neighbors.images(train, order)
        rows.extend(shown)
    return figures.labelled_grid(
        rows,
        row_labels=["samples", "training", "held-out", "training"],
        column_labels=[str(i + 1) for i in range(_SHOWN)],
        caption=f"{text}\nThe pairs of least distance; {FLAGS.features}",
    )


def _notes(held_out: Neighbors, own: np.ndarray | None) -> dict[str, str]:
    if own is not None:
        few = f"fewer than {LEAST_COMPARED} pictures are held out, so {len(own)} training pictures take their place"
        return {"held_out": f"{few}, each compared with the others"}
    shared = held_out.num_copies + held_out.num_mirrored
    if not shared:
        return {}
    return {"held_out": f"{shared} of the held-out pictures are training pictures too, so fewer copies stand out"}


def main() -> None:
    run = MeasuredRun.from_flags()
    out = _flags.out_path(os.path.join(run.results.path, "neighbors.json"), ".json")
    train = run.open_source("train")
    source = _held_out(run, train)
    _check_count(source.name, source.num_examples)
    held_out = ImageReader(source)(0, min(FLAGS.num_held_out, source.num_examples))
    samples, subject, batches = _samples(run)
    features, mirrored = _features(run), run.preset.random_flip
    own = np.arange(len(held_out)) if source is train else None
    found = [
        training_neighbors(images, train, features, mirrored=mirrored, label=label, own=indices)
        for images, label, indices in ((samples, "samples", None), (held_out, "held-out pictures", own))
    ]
    result = copying.compare(found[0].distances, found[1].distances)
    text = copying.sentence(result)
    notes = _notes(found[1], own)
    write_json(
        out,
        {
            "sentence": text,
            **result,
            "copies": found[0].num_copies,
            "mirrored_copies": found[0].num_mirrored,
            "images": train.name,
            "num_images": train.num_examples,
            "held_out": source.name,
            "num_held_out": len(held_out),
            "num_samples": len(samples),
            **subject,
            "features": FLAGS.features,
            "mirrored": mirrored,
            "notes": notes,
            "distances": found[0].distances.tolist(),
            "held_out_distances": found[1].distances.tolist(),
        },
    )
    picture = f"{os.path.splitext(out)[0]}.png"
    write_file(picture, _sheet(samples, held_out, found, train, text))
    if batches:
        batches.remove()
    print(text)
    print(f"  median distance to the nearest of {train.num_examples:,} training pictures ({FLAGS.features}):")
    print(f"  {len(samples):,} samples {result['median_distance']:.4g}, {len(held_out):,} held-out pictures"
          f" {result['held_out_median_distance']:.4g}")  # fmt: skip
    print(f"  equal to a training picture: {found[0].num_copies}, to a mirrored one: {found[0].num_mirrored}")
    print_notes(notes)
    print(f"numbers: {out}\npicture: {picture}")


if __name__ == "__main__":
    _program.run(main)
