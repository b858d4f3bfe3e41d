"""Compresses images into files by a trained run, and back: progressive lossy compression (Section 4.3).

  python -m experiments.compress encode --workdir=runs/digits --split=test --out=files
  python -m experiments.compress encode --workdir=runs/digits --images=digit.png --out=files --target_rmse=20
  python -m experiments.compress decode --workdir=runs/digits --source=files --out=decoded

Any prefix of a file (`head -c 60 image_00007.dtfc`) decodes to the expectation of the image that its bits pay for. The
whole of a split, encoded to the end, also writes compression_SPLIT.json into the workdir, bits and distortion at each
step with JPEG, WebP and PNG beside them, and reconstructions at growing sizes as a PNG.

What both sides must agree on is in the workdir: the weights, and compression/*.json, a table that the first encoding
makes. It also says how many images are computed at once, with which float32 sums change in their last bits.
"""

import os

import numpy as np
import tensorflow as tf
import tqdm
from absl import flags

from diffusion_tf import figures
from diffusion_tf.compression.bitstream import HEADER_BYTES
from diffusion_tf.compression.codec import Codec
from diffusion_tf.compression.image_files import (
    EXTENSION,
    Measured,
    Targets,
    decode_images,
    encode_image,
    read_image_file,
)
from diffusion_tf.compression.measurement import encode_picture, other_formats, step_rows
from diffusion_tf.compression.table import Table, make_table
from diffusion_tf.data import open_source
from diffusion_tf.data.source import ImageReader
from diffusion_tf.diffusion_utils import x_to_images
from diffusion_tf.errors import InputError
from diffusion_tf.storage import checkpoints
from diffusion_tf.storage.files import check_writable, read_npz, write_file, write_json
from diffusion_tf.trained_model import TrainedModel
from experiments import common

FLAGS = flags.FLAGS
_STRIP_IMAGES = 8
_STRIP_COLUMNS = 12
common.define_measurement_flags(batch_size=None, out="The folder to write into.")
flags.DEFINE_string("images", None, "encode: a picture, or an .npz with one array uint8 [N, H, W, C].")
flags.DEFINE_enum("split", None, ("train", "test"), "encode: in place of --images, those of the run's data.")
flags.DEFINE_integer("num_images", None, "encode: how many images. Default: all.", lower_bound=1)
flags.DEFINE_integer("chunk_bits", 24, "encode: most KL that one index stands for.", lower_bound=4, upper_bound=24)
flags.DEFINE_float("target_rmse", None, "encode: stop at the first step with this RMSE on [0, 255], or less.")
flags.DEFINE_float("target_bits_per_dim", None, "encode: stop at the last step of at most this, header included.")
flags.DEFINE_boolean("lossless", False, "encode: add the residual to the last prediction.")
flags.DEFINE_integer(
    "num_table_images",
    None,
    "Training images to choose schedule and laws by. Default: 256 of the digits, 5 of CIFAR-10.",
    lower_bound=1,
)
flags.DEFINE_string("source", None, "decode: a file, or a folder of files.")


class _Tables:
    """The tables of a checkpoint, by chunk_bits: the workdir's, or new ones that are put there."""

    def __init__(self, run: common.Run, trained: TrainedModel, step: int, checkpoint: str):
        self._run, self._trained, self._step = run, trained, step
        self._digest = checkpoints.load_digest(checkpoint)

    def get(self, chunk_bits: int) -> Table:
        name = f"step_{self._step:08d}_bits_{chunk_bits}.json"
        path = os.path.join(self._run.workdir.path, "compression", name)
        if not tf.io.gfile.exists(path):
            check_writable(path)
            table = self._make(chunk_bits)
            write_file(path, table.to_json())
            return table
        table = Table.read(path)
        if (table.checkpoint, table.precision) != (self._digest, self._run.preset.precision):
            raise InputError(f"{path} is of other weights or another --precision: remove it to make it anew")
        if FLAGS.batch_size not in (None, table.batch_size):
            raise InputError(f"--batch_size={FLAGS.batch_size}: {path} is for {table.batch_size}: leave the flag out")
        return table

    def _make(self, chunk_bits: int) -> Table:
        num_dims = np.prod(self._run.preset.image_shape)
        replicas = self._run.strategy.num_replicas_in_sync
        source = open_source(self._run.preset, "train", data_dir=FLAGS.data_dir, tfrecord=FLAGS.tfrecord)
        # An image of more dimensions has more chunks to learn from, and takes a network more time.
        num_images = FLAGS.num_table_images or int(np.clip(2**14 // num_dims, 4, 256))
        images = ImageReader(source)(0, min(max(256, num_images), source.num_examples))
        return make_table(
            self._trained,
            self._digest,
            images,
            num_predicted=num_images,
            chunk_bits=chunk_bits,
            batch_size=FLAGS.batch_size or replicas * int(np.clip(6400 // num_dims, 1, 100)),
            seed=FLAGS.seed,
        )


def _images(run: common.Run) -> tuple[list[str], np.ndarray, str]:
    """The names of the files to write, the images uint8 [N, H, W, C], and what they are."""
    if (FLAGS.images is None) == (FLAGS.split is None):
        raise InputError("--images or --split is required, and not both")
    shape = run.preset.image_shape
    if FLAGS.split:
        source = open_source(run.preset, FLAGS.split, data_dir=FLAGS.data_dir, tfrecord=FLAGS.tfrecord)
        count = min(FLAGS.num_images or source.num_examples, source.num_examples)
        images, name = ImageReader(source)(0, count), source.name
    elif FLAGS.images.endswith(".npz"):
        arrays = list(read_npz(FLAGS.images).values())
        if len(arrays) != 1 or arrays[0].dtype != np.uint8 or arrays[0].shape[1:] != shape or not len(arrays[0]):
            raise InputError(f"{FLAGS.images} must hold one array, uint8 (N, {', '.join(map(str, shape))})")
        images, name = arrays[0][: FLAGS.num_images], FLAGS.images
    else:
        stem = os.path.splitext(os.path.basename(FLAGS.images))[0]
        return [stem], common.read_image(FLAGS.images, shape)[None], FLAGS.images
    return [f"image_{i:05d}" for i in range(len(images))], images, name


def _encode(run: common.Run, trained: TrainedModel, step: int, tables: _Tables) -> None:
    targets = Targets(FLAGS.target_rmse, FLAGS.target_bits_per_dim)
    targets.check(int(np.prod(run.preset.image_shape)))
    if FLAGS.lossless and targets:
        raise InputError("--lossless goes to the end: leave out --target_rmse and --target_bits_per_dim")
    names, images, subject = _images(run)
    paths = [os.path.join(FLAGS.out, f"{name}{EXTENSION}") for name in names]
    check_writable(paths[0])
    table = tables.get(FLAGS.chunk_bits)
    codec = Codec(trained, table)
    measured: list[Measured] = []
    strip: list[np.ndarray] = []
    sizes, mses = [], []
    for first in tqdm.trange(0, len(images), table.batch_size, unit="batch", desc="encoding"):
        batch = images[first : first + table.batch_size]
        streams = [(FLAGS.seed + first + i) % 2**32 for i in range(len(batch))]
        encoded = codec.encode(batch, streams)
        for i, image in enumerate(batch):
            data, measures, stop = encode_image(
                table, encoded, i, image, streams[i], targets=targets, lossless=FLAGS.lossless
            )
            write_file(paths[first + i], data)
            measured.append(measures)
            sizes.append(len(data))
            mses.append(0.0 if FLAGS.lossless else measures.mse[stop])
        strip += list(x_to_images(encoded.pred_xstart).numpy().swapaxes(0, 1)[: _STRIP_IMAGES - len(strip)])
    mean_bytes, rmse = float(np.mean(sizes)), float(np.sqrt(np.mean(mses)))
    print(f"{len(images)} files, {mean_bytes:.1f} bytes each ({8 * mean_bytes / images[0].size:.3f} bits/dim),")
    print(f"{HEADER_BYTES} of them the header; RMSE {rmse:.2f}: {FLAGS.out}")
    if FLAGS.split and not targets:
        _write_measurement(run, step, table, images, subject, measured, sizes, strip)


def _write_measurement(
    run: common.Run,
    step: int,
    table: Table,
    images: np.ndarray,
    subject: str,
    measured: list[Measured],
    sizes: list[int],
    strip: list[np.ndarray],
) -> None:
    """compression_SPLIT.json and .png in the workdir; `strip` holds of some images what each step shows."""
    num_dims = images[0].size
    rows = step_rows(measured, table.timesteps, num_dims)
    record = {"images": subject, "num_images": len(images), "split": FLAGS.split, "step": step, "seed": FLAGS.seed}
    record |= {"chunk_bits": table.chunk_bits, "header_bytes": HEADER_BYTES}
    if FLAGS.lossless:
        record["lossless_bits_per_dim"] = 8 * float(np.mean(sizes)) / num_dims
    base = os.path.join(run.workdir.path, f"compression_{FLAGS.split}")
    write_json(f"{base}.json", {**record, "table": rows, "other_formats": other_formats(images)})
    shown = np.unique(np.linspace(0, len(rows) - 1, _STRIP_COLUMNS).round().astype(int))
    png = figures.labelled_grid(
        [np.concatenate([steps[shown], images[i : i + 1]]) for i, steps in enumerate(strip)],
        row_labels=[str(i) for i in range(len(strip))],
        column_labels=[*(f"{rows[i]['file_bits_per_dim'] * num_dims / 8:.0f} B" for i in shown), "image"],
        caption=f"{subject}: what a prefix of the file shows, by its mean size in bytes",
    )
    write_file(f"{base}.png", png)
    print(f"numbers: {base}.json\npicture: {base}.png")


def _decode(run: common.Run, trained: TrainedModel, step: int, tables: _Tables) -> None:
    common.require_flags("source")
    paths = [FLAGS.source]
    if tf.io.gfile.isdir(FLAGS.source):
        paths = sorted(tf.io.gfile.glob(os.path.join(FLAGS.source, f"*{EXTENSION}")))
        if not paths:
            raise InputError(f"--source={FLAGS.source} holds no {EXTENSION} files")
    files = [(path, *read_image_file(path, run.preset.image_shape)) for path in paths]
    groups: dict[int, list] = {header.chunk_bits: [] for _, header, _ in files}
    for file in files:
        groups[file[1].chunk_bits].append(file)
    codecs = {}
    for chunk_bits, group in groups.items():
        table = tables.get(chunk_bits)
        codecs[chunk_bits] = (table, Codec(trained, table))
        for path, header, _ in group:
            if header.digest != table.digest or header.image_shape != table.image_shape:
                raise InputError(
                    f"{path} was made by another model, or another table, than step {step} of {FLAGS.workdir}"
                )
    for chunk_bits, group in groups.items():
        table, codec = codecs[chunk_bits]
        for first in tqdm.trange(0, len(group), table.batch_size, unit="batch", desc="decoding"):
            batch = group[first : first + table.batch_size]
            for (path, _, _), image in zip(batch, decode_images(table, codec, batch), strict=True):
                name = os.path.splitext(os.path.basename(path))[0]
                write_file(os.path.join(FLAGS.out, f"{name}.png"), encode_picture(image, "PNG"))
    print(f"{len(files)} images: {FLAGS.out}")


def main(command: str) -> None:
    common.require_flags("workdir", "out")
    run = common.Run.from_flags()
    step, checkpoint = run.find_checkpoint()
    trained = TrainedModel.from_checkpoint(run.preset, run.strategy, checkpoint)
    (_encode if command == "encode" else _decode)(run, trained, step, _Tables(run, trained, step, checkpoint))


if __name__ == "__main__":
    common.run(main, commands=("encode", "decode"))
