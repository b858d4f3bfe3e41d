"""Compresses images into files with a trained run, and decompresses them (Section 4.3).

  python -m experiments.compress encode --workdir=runs/digits --split=test --out=files
  python -m experiments.compress encode --workdir=runs/digits --images=digit.png --out=files --target_rmse=20
  python -m experiments.compress encode --pretrained=cifar10_small --images=photo.jpg --resize=crop --out=files
  python -m experiments.compress decode --workdir=runs/digits --source=files --out=decoded
  python -m experiments.compress encode --workdir=runs/digits --split=test --archive=digits.dtfa
  python -m experiments.compress decode --workdir=runs/digits --source=digits.dtfa --index=7 --max_bits=99 --out=here

Any prefix of a file (`head -c 60 image_00007.dtfc`) decodes to a coarser image. Encoding a split, or an .npz, up to the
last step also measures it: compression_SPLIT.json in the workdir (for an .npz, its name is in place of SPLIT) has rate
and distortion after each step, those of JPEG, WebP, AVIF, PNG, and JPEG XL if pillow-jxl-plugin is installed, and our
rate at the same distortion; compression_SPLIT.png shows images decoded from the first bytes of their files.

Encoder and decoder need the same workdir: its weights, and its compression/*.json, a table that the first encoding
makes. The table fixes --batch_size, because float32 sums differ in their last bits between batch sizes.
"""

import os

import numpy as np
from absl import flags

from diffusion_tf.compression import CHUNK_BITS
from diffusion_tf.errors import InputError

from . import _flags, _program

FLAGS = flags.FLAGS
_flags.define_measurement_flags(batch_size=None, out="Folder to write.", images=False)
_flags.define_path(
    "images", None, "encode: a picture, with --resize of any size, or an .npz of `images`, uint8 [N, H, W, C]."
)
flags.DEFINE_enum("split", None, ("train", "test"), "encode: the run's images of this split, instead of --images.")
flags.DEFINE_integer("num_images", None, "encode: number of images. Default: all.", lower_bound=1)
flags.DEFINE_integer(
    "chunk_bits", 24, "encode: largest KL that one index stands for.", lower_bound=CHUNK_BITS[0],
    upper_bound=CHUNK_BITS[-1],
)  # fmt: skip
flags.DEFINE_float("target_rmse", None, "encode: stop at the first step with this RMSE on [0, 255] or less.")
flags.DEFINE_float("target_bits_per_dim", None, "encode: largest size of a file with its header, in bits/dim.")
flags.DEFINE_boolean("lossless", False, "encode: add the residual to the last prediction.")
flags.DEFINE_integer(
    "num_table_images", None, "Training images that a new table is made from. Default: 256 for digits, 32 for cifar10.",
    lower_bound=1,
)  # fmt: skip
_flags.define_path("archive", None, "encode: a file to write all images to, which share its header, instead of --out.")
_flags.define_path("source", None, "decode: a file, an archive, or a folder of them.")
flags.DEFINE_integer("index", None, "decode: only this image of an archive, from 0 on.", lower_bound=0)
flags.DEFINE_integer(
    "max_bits", None, "decode: read at most this many bits of each image, beside its header.", lower_bound=0
)


def _check(command: str) -> None:
    _flags.check_measured_run()
    if command == "decode":
        _flags.require_flags("source", "out")
        return
    if (FLAGS.out is None) == (FLAGS.archive is None):
        raise InputError("give one of --out and --archive")
    if (FLAGS.images is None) == (FLAGS.split is None):
        raise InputError("give one of --images and --split")


_program.parse_flags(__name__, _check, commands=("encode", "decode"))

import tensorflow as tf

from diffusion_tf.compression import archive
from diffusion_tf.compression.bitstream import HEADER_BYTES
from diffusion_tf.compression.codec import Codec
from diffusion_tf.compression.image_files import (
    EXTENSION,
    Targets,
    decode_images,
    encode_images,
    open_files,
    read_image_file,
)
from diffusion_tf.compression.measurement import Measurement
from diffusion_tf.compression.tables import TableStore
from diffusion_tf.data.fitting import read_picture
from diffusion_tf.data.pictures import encode_picture
from diffusion_tf.data.source import ImageReader
from diffusion_tf.storage import checkpoints
from diffusion_tf.storage.files import check_writable, write_file
from diffusion_tf.storage.json_files import write_json
from diffusion_tf.storage.npz_files import describe_arrays, read_npz
from diffusion_tf.trained_model import TrainedModel

from ._measured_run import MeasuredRun

_EXTENSIONS = (EXTENSION, archive.EXTENSION)


def _read_images(run: MeasuredRun) -> tuple[list[str], np.ndarray, str]:
    """Names for the files, the images uint8 [N, H, W, C], and where they come from."""
    shape = run.preset.image_shape
    if FLAGS.split:
        source = run.open_source(FLAGS.split)
        count = min(FLAGS.num_images or source.num_examples, source.num_examples)
        images, name = ImageReader(source)(0, count), source.name
    elif FLAGS.images.lower().endswith(".npz"):
        arrays = read_npz(FLAGS.images)
        images = arrays["images"] if "images" in arrays else next(iter(arrays.values()), np.empty(0))
        name = os.path.basename(FLAGS.images)
        if (
            (len(arrays) != 1 and "images" not in arrays)
            or images.dtype != np.uint8
            or images.shape[1:] != shape
            or not len(images)
        ):
            wanted = f"images, uint8 (N, {', '.join(map(str, shape))})"
            raise InputError(f"{FLAGS.images} must hold {wanted}; there are: {describe_arrays(arrays)}")
        images = images[: FLAGS.num_images]
    else:
        stem = os.path.splitext(os.path.basename(FLAGS.images))[0]
        stem = os.fsencode(stem).decode(errors="backslashreplace")  # TensorFlow writes only names in UTF-8
        return [stem], read_picture(FLAGS.images, shape, FLAGS.resize or "none")[None], FLAGS.images
    return [f"image_{i:05d}" for i in range(len(images))], images, name


def _encode(run: MeasuredRun, step: int, tables: TableStore) -> None:
    targets = Targets(FLAGS.target_rmse, FLAGS.target_bits_per_dim, FLAGS.lossless)
    targets.check(int(np.prod(run.preset.image_shape)))  # before the table is made
    names, images, subject = _read_images(run)
    paths = [FLAGS.archive or os.path.join(FLAGS.out, f"{name}{EXTENSION}") for name in names]
    check_writable(paths[0])
    table = tables.get(FLAGS.chunk_bits)
    measurement = Measurement(table.timesteps)
    encoded = encode_images(Codec(tables.trained, table), images, seed=FLAGS.seed, targets=targets)
    files = []
    for path, image in zip(paths, encoded, strict=True):
        measurement.add(image)
        if FLAGS.archive:
            files.append(image.data)
        else:
            write_file(path, image.data)
    bits_per_dim = 8 * measurement.mean_bytes / images[0].size
    if FLAGS.archive:
        data = archive.pack_archive(files, table.digest)
        write_file(FLAGS.archive, data)
        print(f"{len(images)} images, {len(data):,} bytes; RMSE {measurement.rmse:.2f}: {FLAGS.archive}")
    else:
        print(f"{len(images)} files, {measurement.mean_bytes:.1f} bytes each ({bits_per_dim:.3f} bits/dim),")
        print(f"{HEADER_BYTES} of them the header; RMSE {measurement.rmse:.2f}: {FLAGS.out}")
    if len(images) > 1 and not targets.stop_early:
        name = FLAGS.split or os.path.splitext(os.path.basename(FLAGS.images))[0]
        record = {"images": subject, "num_images": len(images), "split": name, "step": step, "seed": FLAGS.seed}
        if FLAGS.lossless:
            record["lossless_bits_per_dim"] = bits_per_dim
        base = os.path.join(run.results.path, f"compression_{name}")
        write_json(f"{base}.json", {**record, "chunk_bits": table.chunk_bits, **measurement.record(images)})
        write_file(f"{base}.png", measurement.picture(images, subject))
        print(f"numbers: {base}.json\npicture: {base}.png")


def _decode(run: MeasuredRun, tables: TableStore) -> None:
    paths = [FLAGS.source]
    if tf.io.gfile.isdir(FLAGS.source):
        names = sorted(name for name in tf.io.gfile.listdir(FLAGS.source) if name.endswith(_EXTENSIONS))
        paths = [os.path.join(FLAGS.source, name) for name in names]
        if not paths:
            raise InputError(f"--source={FLAGS.source} holds no {' or '.join(_EXTENSIONS)} files")
    pictures, names = [], []
    for path in paths:
        many = path.endswith(archive.EXTENSION)
        data = read_image_file(path, run.preset.image_shape, archive.MAX_IMAGES if many else 1)
        images = open_files({path: data})
        name = os.path.splitext(os.path.basename(path))[0]
        many = many or len(images) != 1
        names += [f"{name}_{i:05d}" for i in range(len(images))] if many else [name]
        pictures += images
    if FLAGS.index is not None:
        if FLAGS.index >= len(pictures):
            raise InputError(f"--index={FLAGS.index}: --source={FLAGS.source} holds {len(pictures)} images")
        pictures, names = [pictures[FLAGS.index]], [names[FLAGS.index]]
    for name, image in zip(names, decode_images(tables, pictures, FLAGS.max_bits), strict=True):
        write_file(os.path.join(FLAGS.out, f"{name}.png"), encode_picture(image, "PNG"))
    print(f"{len(pictures)} images: {FLAGS.out}")


def main(command: str) -> None:
    run = MeasuredRun.from_flags()
    step, checkpoint = run.find_checkpoint()
    tables = TableStore(
        os.path.join(run.workdir.path, "compression"),
        TrainedModel.from_checkpoint(run.preset, run.strategy, checkpoint),
        checkpoints.load_digest(checkpoint),
        step,
        open_train=lambda: run.open_source("train"),
        batch_size=FLAGS.batch_size,
        num_images=FLAGS.num_table_images,
        seed=FLAGS.seed,
        new_folder=os.path.join(run.results.path, "compression"),
    )
    if command == "encode":
        _encode(run, step, tables)
    else:
        _decode(run, tables)


if __name__ == "__main__":
    _program.run(main)
