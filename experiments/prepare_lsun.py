"""Writes StyleGAN TFRecords for the lsun presets, from LSUN's LMDB folders or a folder of images.

  python -m experiments.prepare_lsun --source=church_outdoor_train_lmdb --out=data
  python -m experiments.train --workdir=runs/church --dataset=lsun_church --tfrecord='data/church-r08-*.tfrecords'

Each image is turned upright, cropped to its central square and scaled with a Lanczos filter, as StyleGAN's dataset_tool
does; transparent parts become white. The program says which files it leaves out. Every shard is read back and checked.
The same command writes only the missing shards; NAME.json lists those that exist.
"""

import os
import shlex

from absl import flags

from diffusion_tf.presets import PRESETS, resized

from . import _flags, _program

FLAGS = flags.FLAGS
_flags.define_path("source", None, "An unpacked LSUN LMDB folder (with data.mdb), or a folder of images at any depth.")
_flags.define_path("out", None, "Folder to write (may be gs://).")
flags.DEFINE_string("name", "church", "Prefix of the files' names.")
flags.DEFINE_integer(
    "resolution", 256, "Height and width of the written images, a power of two.", lower_bound=4, upper_bound=1024
)
flags.DEFINE_integer("num_shards", None, "Number of files. Default: one per 4,096 images, at least 16.", lower_bound=1)
flags.DEFINE_integer("num_workers", os.cpu_count(), "Number of processes; each takes 0.7 GB of memory.", lower_bound=1)
flags.DEFINE_integer("limit", None, "Number of images. Default: all.", lower_bound=1)
flags.DEFINE_integer("skip_bad_images", 0, "Number of unreadable images to tolerate.", lower_bound=0)


def _check() -> None:
    _flags.require_flags("source", "out")


_program.parse_flags(__name__, _check)

from diffusion_tf.data.image_folders import counts, find_images
from diffusion_tf.data.prepare_tfrecords import prepare


def main() -> None:
    images = find_images(FLAGS.source, FLAGS.limit)
    pattern, manifest = prepare(
        images,
        FLAGS.out,
        name=FLAGS.name,
        resolution=FLAGS.resolution,
        num_shards=FLAGS.num_shards,
        num_workers=FLAGS.num_workers,
        skip_bad_images=FLAGS.skip_bad_images,
    )
    shards = manifest["shards"].values()
    records, skipped = sum(shard["records"] for shard in shards), sum(len(shard["skipped"]) for shard in shards)
    size, files = sum(shard["bytes"] for shard in shards), sum(shard["records"] > 0 for shard in shards)
    print(f"{pattern}: {records:,} images ({skipped:,} skipped), {size:,} bytes, {files} files")
    if images.left_out:
        print(f"left out, since they are not pictures: {counts(images.left_out)}")
    preset = PRESETS.get(f"lsun_{FLAGS.name}", PRESETS["lsun_church"])
    differences = _flags.preset_arguments(resized(preset, FLAGS.resolution), preset)
    arguments = [f"--workdir=runs/{FLAGS.name}", f"--dataset={preset.dataset}", *differences]
    command = f"python -m experiments.train {' '.join(arguments)} --tfrecord={shlex.quote(pattern)}"
    print(_program.command_lines(f"train: {command}"))


if __name__ == "__main__":
    _program.run(main)
