"""Makes StyleGAN TFRecords, which the lsun presets train on, of LSUN's LMDB folders or of a folder of images.

  python -m experiments.prepare_lsun --source=church_outdoor_train_lmdb --out=data
  python -m experiments.train --workdir=runs/church --dataset=lsun_church --tfrecord='data/church-r08-*.tfrecords'

Each image is cut to its central square and scaled by Lanczos, as StyleGAN's dataset_tool does. Every shard is read back
before it counts. The same command again writes only what is missing; NAME.json tells what is there.
"""

import os
import shlex

from absl import flags

from diffusion_tf.data.image_folders import find_images
from diffusion_tf.data.prepare_tfrecords import prepare
from diffusion_tf.presets import PRESETS
from experiments import common

FLAGS = flags.FLAGS
flags.DEFINE_string("source", None, "A folder: of an LSUN LMDB (unpacked, with data.mdb), or of images at any depth.")
flags.DEFINE_string("out", None, "The folder to write to (may be gs://).")
flags.DEFINE_string("name", "church", "What the files' names begin with.")
flags.DEFINE_integer("resolution", 256, "Height and width of the images to write: a power of two.")
flags.DEFINE_integer(
    "num_shards", None, "How many files. Default: one for each 4,096 images, but 16 for fewer.", lower_bound=1
)
flags.DEFINE_integer("num_workers", os.cpu_count(), "Processes, of 0.7 GB of memory each.", lower_bound=1)
flags.DEFINE_integer("limit", None, "Take only the first so many images. Default: all.", lower_bound=1)
flags.DEFINE_integer("skip_bad_images", 0, "Leave out up to so many images that cannot be read.", lower_bound=0)


def main() -> None:
    common.require_flags("source", "out")
    pattern, manifest = prepare(
        find_images(FLAGS.source, FLAGS.limit),
        FLAGS.out,
        name=FLAGS.name,
        resolution=FLAGS.resolution,
        num_shards=FLAGS.num_shards,
        num_workers=FLAGS.num_workers,
        skip_bad_images=FLAGS.skip_bad_images,
    )
    shards = manifest["shards"].values()
    records, skipped = sum(shard["records"] for shard in shards), sum(len(shard["skipped"]) for shard in shards)
    size = sum(shard["bytes"] for shard in shards)
    print(f"{pattern}: {records:,} images ({skipped:,} skipped), {size:,} bytes, {len(shards)} files")
    dataset = f"lsun_{FLAGS.name}" if f"lsun_{FLAGS.name}" in PRESETS else "lsun_church"
    command = f"python -m experiments.train --workdir=runs/{FLAGS.name} --dataset={dataset}"
    if FLAGS.resolution != PRESETS[dataset].image_size:
        command += f" --image_size={FLAGS.resolution}"
    print(f"train: {command} --tfrecord={shlex.quote(pattern)}")


if __name__ == "__main__":
    common.run(main)
