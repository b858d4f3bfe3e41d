"""Compresses images into files by a trained run, and back: progressive lossy compression (Section 4.3).

  python -m experiments.compress encode --workdir=runs/digits --split=test --out=files
  python -m experiments.compress encode --workdir=runs/digits --images=digit.png --out=files --target_rmse=20
  python -m experiments.compress decode --workdir=runs/digits --source=files --out=decoded

Any prefix of a file (`head -c 60 image_00007.dtfc`) decodes to the expectation of the image that its bits pay for. The
whole of a split, encoded to the end, also writes compression_SPLIT.json into the workdir, bits and distortion at each
step with JPEG, WebP and PNG beside them, and reconstructions at growing sizes as a PNG.
"""

import dataclasses
import io
import os
import zlib
from typing import Any

import numpy as np
import tensorflow as tf
import tqdm
from absl import flags
from PIL import Image

from diffusion_tf import checkpoints, figures
from diffusion_tf.compression import bitstream
from diffusion_tf.compression.bitstream import HEADER_BYTES, Header
from diffusion_tf.compression.codec import Codec, Encoded, Table, make_table
from diffusion_tf.datasets import ImageReader, open_source
from diffusion_tf.diffusion_utils import images_to_x, x_to_images
from diffusion_tf.errors import InputError
from diffusion_tf.files import check_writable, read_file, read_npz, write_file, write_json
from diffusion_tf.trained_model import TrainedModel
from experiments import common

FLAGS = flags.FLAGS
_EXTENSION = ".dtfc"
_QUALITIES = (1, 10, 30, 50, 75, 90, 100)  # of JPEG and WebP
_STRIP_IMAGES = 8
_STRIP_COLUMNS = 12
common.define_measurement_flags(batch_size=100, out="The folder to write into.")
flags.DEFINE_string("images", None, "encode: a picture, or an .npz with one array uint8 [N, H, W, C].")
flags.DEFINE_enum("split", None, ("train", "test"), "encode: in place of --images, those of the run's data.")
flags.DEFINE_integer("num_images", None, "encode: how many images. Default: all.", lower_bound=1)
flags.DEFINE_integer("chunk_bits", 20, "encode: most KL that one index stands for.", lower_bound=4, upper_bound=24)
flags.DEFINE_float("target_rmse", None, "encode: stop at the first step with this RMSE on [0, 255], or less.")
flags.DEFINE_float("target_bits_per_dim", None, "encode: stop at the last step of at most this, header included.")
flags.DEFINE_boolean("lossless", False, "encode: add the residual to the last prediction.")
flags.DEFINE_integer("num_table_images", 256, "Training images to choose schedule and laws by.", lower_bound=1)
flags.DEFINE_string("source", None, "decode: a file, or a folder of files.")


def _table(run: common.Run, trained: TrainedModel, step: int, checkpoint: str, chunk_bits: int) -> Table:
    """The table of a checkpoint: the workdir's, or a new one that is put there."""
    path = os.path.join(run.workdir.path, "compression", f"step_{step:08d}_bits_{chunk_bits}.json")
    digest = checkpoints.load_digest(checkpoint)
    if tf.io.gfile.exists(path):
        table = Table.from_json(read_file(path), path)
        if (table.checkpoint, table.precision) != (digest, run.preset.precision):
            raise InputError(f"{path} is of other weights or another --precision: remove it to make it anew")
        return table
    check_writable(path)
    source = open_source(run.preset, "train", data_dir=FLAGS.data_dir, tfrecord=FLAGS.tfrecord)
    images = ImageReader(source)(0, min(FLAGS.num_table_images, source.num_examples))
    table = make_table(trained, digest, images, chunk_bits=chunk_bits, batch_size=FLAGS.batch_size, seed=FLAGS.seed)
    write_file(path, table.to_json())
    return table


def _images(run: common.Run) -> tuple[list[str], np.ndarray, dict[str, Any]]:
    """The names of the files to write, the images uint8 [N, H, W, C], and what they are, for the JSON file."""
    if (FLAGS.images is None) == (FLAGS.split is None):
        raise InputError("--images or --split is required, and not both")
    shape = run.preset.image_shape
    if FLAGS.split:
        source = open_source(run.preset, FLAGS.split, data_dir=FLAGS.data_dir, tfrecord=FLAGS.tfrecord)
        images = ImageReader(source)(0, min(FLAGS.num_images or source.num_examples, source.num_examples))
        name = source.name
    elif FLAGS.images.endswith(".npz"):
        arrays = list(read_npz(FLAGS.images).values())
        if len(arrays) != 1 or arrays[0].dtype != np.uint8 or arrays[0].shape[1:] != shape or not len(arrays[0]):
            raise InputError(f"{FLAGS.images} must hold one array, uint8 (N, {', '.join(map(str, shape))})")
        images, name = arrays[0][: FLAGS.num_images], FLAGS.images
    else:
        stem = os.path.splitext(os.path.basename(FLAGS.images))[0]
        return [stem], common.read_image(FLAGS.images, shape)[None], {"images": FLAGS.images, "num_images": 1}
    return [f"image_{i:05d}" for i in range(len(images))], images, {"images": name, "num_images": len(images)}


@dataclasses.dataclass(frozen=True)
class _Measured:
    """Of one image: the steps' bytes after 0, 1, ... steps, the KL so far in bits, and the MSE on [0, 255]."""

    sizes: np.ndarray
    kl_bits: np.ndarray
    mse: np.ndarray


def _stop(measured: _Measured, num_dims: int) -> int:
    """How many steps the targets ask for."""
    stop = len(measured.sizes) - 1
    if FLAGS.target_rmse is not None:
        reached = np.flatnonzero(np.sqrt(measured.mse) <= FLAGS.target_rmse)
        stop = int(reached[0]) if len(reached) else stop
    if FLAGS.target_bits_per_dim is not None:
        bits = 8 * (HEADER_BYTES + measured.sizes) / num_dims
        stop = min(stop, max(0, int(np.searchsorted(bits, FLAGS.target_bits_per_dim, side="right")) - 1))
    return stop


def _encode_image(table: Table, encoded: Encoded, i: int, image: np.ndarray, stream: int) -> tuple[bytes, _Measured]:
    """The file of image i of a batch, and what it measures at each step."""
    laws = table.step_laws()
    steps = bitstream.encode_steps(laws, encoded.steps[i])
    measured = _Measured(
        np.array(bitstream.prefix_sizes(laws, steps, len(laws))),
        np.append(0.0, np.cumsum(encoded.kl_bits[i])),
        127.5**2 * np.square(encoded.pred_xstart[:, i] - images_to_x(image).numpy()).mean(axis=(1, 2, 3)),
    )
    steps = steps[: measured.sizes[_stop(measured, image.size)]]
    residual = b""
    if FLAGS.lossless:
        difference = image - x_to_images(encoded.pred_xstart[-1, i]).numpy()
        residual = zlib.crc32(image.tobytes()).to_bytes(4, "big")
        residual += bitstream.encode_residual(table.residual_law, difference)
    body = steps + residual
    header = Header(table.digest, table.chunk_bits, image.shape, stream, len(steps), len(body), zlib.crc32(body))
    return bitstream.pack(header, body), measured


def _encode(run: common.Run, trained: TrainedModel, step: int, checkpoint: str) -> None:
    names, images, subject = _images(run)
    targets = FLAGS.target_rmse is not None or FLAGS.target_bits_per_dim is not None
    if FLAGS.lossless and targets:
        raise InputError("--lossless goes to the end: leave out --target_rmse and --target_bits_per_dim")
    check_writable(os.path.join(FLAGS.out, f"{names[0]}{_EXTENSION}"))
    table = _table(run, trained, step, checkpoint, FLAGS.chunk_bits)
    codec = Codec(trained, table, FLAGS.batch_size)
    measured, sizes, strip = [], [], []
    for first in tqdm.trange(0, len(images), FLAGS.batch_size, unit="batch", desc="encoding"):
        batch = images[first : first + FLAGS.batch_size]
        streams = [(FLAGS.seed + first + i) % 2**32 for i in range(len(batch))]
        encoded = codec.encode(batch, streams)
        for i, image in enumerate(batch):
            data, measures = _encode_image(table, encoded, i, image, streams[i])
            write_file(os.path.join(FLAGS.out, f"{names[first + i]}{_EXTENSION}"), data)
            measured.append(measures)
            sizes.append(len(data))
        if not first:
            strip = [image[:_STRIP_IMAGES] for image in x_to_images(encoded.pred_xstart).numpy()]
    mean_bytes = float(np.mean(sizes))
    print(f"{len(images)} files, {mean_bytes:.1f} bytes each ({8 * mean_bytes / images[0].size:.3f} bits/dim),")
    print(f"{HEADER_BYTES} of them the header: {FLAGS.out}")
    if FLAGS.split and not targets:
        _write_measurement(run, {**subject, "split": FLAGS.split, "step": step}, table, images, measured, sizes, strip)


def _write_measurement(run, subject, table: Table, images, measured: list[_Measured], sizes, strip) -> None:
    """compression_SPLIT.json and .png in the workdir."""
    sums = {name: np.mean([getattr(m, name) for m in measured], axis=0) for name in ("sizes", "kl_bits", "mse")}
    num_dims = images[0].size
    rows = [
        {
            "reverse_process_time": run.preset.num_timesteps - t,
            "kl_bits_per_dim": float(kl) / num_dims,
            "steps_bits_per_dim": 8 * float(size) / num_dims,
            "file_bits_per_dim": 8 * (HEADER_BYTES + float(size)) / num_dims,
            "distortion_rmse": float(np.sqrt(mse)),
        }
        for t, size, kl, mse in zip(table.timesteps, sums["sizes"], sums["kl_bits"], sums["mse"], strict=True)
    ]
    record = {**subject, "chunk_bits": table.chunk_bits, "seed": FLAGS.seed, "header_bytes": HEADER_BYTES}
    if FLAGS.lossless:
        record["lossless_bits_per_dim"] = 8 * float(np.mean(sizes)) / num_dims
    base = os.path.join(run.workdir.path, f"compression_{FLAGS.split}")
    write_json(f"{base}.json", {**record, "table": rows, "other_formats": _other_formats(images)})
    shown = np.unique(np.linspace(0, len(rows) - 1, _STRIP_COLUMNS).round().astype(int))
    columns = [np.stack([strip[step][i] for step in shown]) for i in range(len(strip[0]))]
    png = figures.labelled_grid(
        [np.concatenate([row, images[i : i + 1]]) for i, row in enumerate(columns)],
        row_labels=[str(i) for i in range(len(columns))],
        column_labels=[*(f"{HEADER_BYTES + sums['sizes'][step]:.0f} B" for step in shown), "image"],
        caption=f"{subject['images']}: what a prefix of the file shows, by its mean size in bytes",
    )
    write_file(f"{base}.png", png)
    print(f"numbers: {base}.json\npicture: {base}.png")


def _picture(image: np.ndarray) -> Image.Image:
    """An image uint8 [H, W, C] as Pillow has it, which knows no axis of one channel."""
    return Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)


def _other_formats(images: np.ndarray) -> list[dict[str, Any]]:
    """Bits/dim and RMSE on [0, 255] of the same images as Pillow writes them, one file each."""
    settings = [(name, {"quality": quality}) for name in ("JPEG", "WEBP") for quality in _QUALITIES]
    settings += [("WEBP", {"lossless": True, "quality": 100}), ("PNG", {"optimize": True})]
    rows = []
    for name, options in settings:
        sizes, squares = [], []
        for image in images:
            buffer = io.BytesIO()
            _picture(image).save(buffer, name, **options)
            sizes.append(buffer.tell())
            decoded = np.asarray(Image.open(buffer).convert("L" if image.shape[-1] == 1 else "RGB"))
            squares.append(np.square(decoded.reshape(image.shape).astype(float) - image).mean())
        bits = 8 * float(np.mean(sizes)) / images[0].size
        rows.append({"format": name, **options, "bits_per_dim": bits, "rmse": float(np.sqrt(np.mean(squares)))})
    return rows


def _decode(run: common.Run, trained: TrainedModel, step: int, checkpoint: str) -> None:
    common.require_flags("source")
    paths = [FLAGS.source]
    if tf.io.gfile.isdir(FLAGS.source):
        paths = sorted(tf.io.gfile.glob(os.path.join(FLAGS.source, f"*{_EXTENSION}")))
        if not paths:
            raise InputError(f"--source={FLAGS.source} holds no {_EXTENSION} files")
    files = [(path, *bitstream.unpack(read_file(path), path)) for path in paths]
    tables = {
        chunk_bits: _table(run, trained, step, checkpoint, chunk_bits)
        for chunk_bits in {header.chunk_bits for _, header, _ in files}
    }
    for path, header, _ in files:
        table = tables[header.chunk_bits]
        if header.digest != table.digest or header.image_shape != table.image_shape:
            raise InputError(f"{path} was made by another model, or another table, than step {step} of {FLAGS.workdir}")
    for chunk_bits, table in tables.items():
        codec = Codec(trained, table, FLAGS.batch_size)
        group = [file for file in files if file[1].chunk_bits == chunk_bits]
        for first in tqdm.trange(0, len(group), FLAGS.batch_size, unit="batch", desc="decoding"):
            _decode_batch(table, codec, group[first : first + FLAGS.batch_size])
    print(f"{len(files)} images: {FLAGS.out}")


def _decode_batch(table: Table, codec: Codec, files: list[tuple[str, Header, bytes]]) -> None:
    """Writes the images of some files as PNG."""
    laws = table.step_laws()
    steps = [bitstream.decode_steps(laws, body[: header.steps_size]) for _, header, body in files]
    images = x_to_images(codec.decode(steps, [header.stream for _, header, _ in files])).numpy()
    for (path, header, body), image in zip(files, images, strict=True):
        residual = body[header.steps_size :]
        if len(body) == header.body_size and residual:
            image = image + bitstream.decode_residual(table.residual_law, residual[4:], image.shape)
            if zlib.crc32(image.tobytes()) != int.from_bytes(residual[:4], "big"):
                raise InputError(
                    f"{path} does not come out lossless here: this machine's predictions differ from its encoder's"
                )
        name = os.path.splitext(os.path.basename(path))[0]
        buffer = io.BytesIO()
        _picture(image).save(buffer, "PNG")
        write_file(os.path.join(FLAGS.out, f"{name}.png"), buffer.getvalue())


def main(command: str) -> None:
    common.require_flags("workdir", "out")
    run = common.Run.from_flags()
    step, checkpoint = run.find_checkpoint()
    trained = TrainedModel.from_checkpoint(run.preset, run.strategy, checkpoint)
    (_encode if command == "encode" else _decode)(run, trained, step, checkpoint)


if __name__ == "__main__":
    common.run(main, commands=("encode", "decode"))
