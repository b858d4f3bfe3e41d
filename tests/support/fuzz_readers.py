"""The readers of files from outside, each with small sound files."""

import dataclasses
import functools
import io
import json
import os
import pathlib
import random
import tempfile
import zlib
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import PIL.Image
import tensorflow as tf
from support import inception_files
from support.small_tables import TABLE
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

from diffusion_tf.compression import bitstream
from diffusion_tf.compression.archive import pack_archive
from diffusion_tf.compression.image_files import open_files, read_image_file
from diffusion_tf.compression.tables import Table
from diffusion_tf.data import open_source
from diffusion_tf.data.fitting import read_picture
from diffusion_tf.data.record_images import RecordImages
from diffusion_tf.data.source import ImageReader
from diffusion_tf.data_settings import DataSettings
from diffusion_tf.evaluation.best_checkpoint import read_best
from diffusion_tf.evaluation.feature_networks import inception_network, pixels_network
from diffusion_tf.evaluation.reference_statistics import read_statistics
from diffusion_tf.evaluation.scores import FeatureExtractor, Images, file_images, reference_features
from diffusion_tf.interop import diffusers, diffusers_config, tf1, tf1_index
from diffusion_tf.presets import get_preset
from diffusion_tf.reports.run_page import to_markdown
from diffusion_tf.reports.run_record import read_run
from diffusion_tf.runtime.strategies import make_strategy
from diffusion_tf.storage import checkpoints
from diffusion_tf.storage.npz_files import read_npz
from diffusion_tf.storage.torch_files import read_torch
from diffusion_tf.storage.workdir import Workdir
from diffusion_tf.training.progress import Progress
from diffusion_tf.unet import UNet

FIXTURES = pathlib.Path(__file__).parent.parent / "fixtures"
DIGITS = get_preset("digits", ch_mult=(1,))
CATS = get_preset("lsun_cat", image_size=4, ch=32, ch_mult=(1,), attn_resolutions=())


@dataclasses.dataclass(frozen=True)
class Reader:
    """A reader of files.

    Attributes:
      files: returns the contents of sound files, by their paths below a folder.
      read: reads the files in a folder.
      seal: corrects the checksums of a damaged file, which would hide what lies behind them.
      cost: how much more time a file takes than others; so many times fewer files are fed.
    """

    files: Callable[[], dict[str, bytes]]
    read: Callable[[pathlib.Path], object]
    seal: Callable[[bytes], bytes] | None = None
    cost: int = 1


def _npz(save: Callable, **arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    save(buffer, **arrays)
    return buffer.getvalue()


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


# --- Samples, references and runs ---------------------------------------------------------------------------------


def _sample_files() -> dict[str, bytes]:
    samples, scores = np.arange(256, dtype=np.uint8).reshape(4, 8, 8, 1), np.arange(3.0)
    return {f"{save.__name__}.npz": _npz(save, samples=samples, x=scores) for save in (np.savez, np.savez_compressed)}


def _read_samples(folder: pathlib.Path) -> None:
    for path in folder.iterdir():
        read_npz(str(path))
        file_images(str(path), (8, 8, 1))


@functools.cache
def _extractor() -> FeatureExtractor:
    return FeatureExtractor(pixels_network((2, 2, 1)), make_strategy("one_device"), 4, "")


_PIXELS = np.arange(16, dtype=np.uint8).reshape(4, 2, 2, 1)
_IMAGES = Images({"digest": 1}, 4, lambda first, count: _PIXELS[first : first + count])


def _reference_files() -> dict[str, bytes]:
    features = _PIXELS.reshape(4, 4).astype(np.float32)
    description = np.array(json.dumps(_extractor().describe(_IMAGES)))
    return {"reference.npz": _npz(np.savez, features=features, description=description)}


def _statistics_files() -> dict[str, bytes]:
    return {"statistics.npz": _npz(np.savez, mu=np.arange(4.0), sigma=np.diag(np.arange(4.0)))}


def _run_files() -> dict[str, bytes]:
    reference = {"num_images": 9, "images": "digits, train", "split": "train"}
    sampling = {"seed": 0, "compute_dtype": "float32", "sampler": "ddim", "sampler_steps": 50, "ddim_eta": 0.5}
    evaluation = {"step": 20, "num_samples": 9, **sampling, "reference": reference, "fid": 4.5, "kid": None}
    subject = {"images": "digits, test", "num_images": 7, "step": 20}
    row = {"reverse_process_time": 4, "rate_bits_per_dim": 2.25, "steps_bits_per_dim": 2.0, "distortion_rmse": 0.5}
    bits = ("prior_bits_per_dim", "middle_bits_per_dim", "decoder_bits_per_dim", "bits_per_dim")
    likelihood = {"bits_per_dim_standard_error": 0.1, "terms_bits_per_dim": [1.5, 1.0], **dict.fromkeys(bits, 1.5)}
    return {
        "config.json": _json({**dataclasses.asdict(DIGITS), "num_examples": 100}),
        "metrics.jsonl": _json({"step": 20, "loss": 0.5, "grad_norm": None}) + b"\n",
        "evaluations.jsonl": _json(evaluation) + b"\n",
        "checkpoints/best/evaluation.json": _json({**evaluation, "best_by": "fid"}),
        "likelihood_test.json": _json({**subject, **likelihood}),
        "rate_distortion_test.json": _json({**subject, "table": [row]}),
        "compression_test.json": _json({**subject, "table": [row]}),
        "samples/step_00000020.png": _picture("PNG"),
    }


def _read_run(folder: pathlib.Path) -> None:
    workdir = Workdir(str(folder))
    read_best(workdir)
    workdir.refuse_other_run(DIGITS, 100)
    to_markdown(read_run(workdir), "report.png")


# --- Weights ------------------------------------------------------------------------------------------------------


def _checkpoint_files() -> dict[str, bytes]:
    arrays = {"params/a": np.arange(6, dtype=np.float32).reshape(2, 3), "step": np.asarray(7, np.int64)}
    with tempfile.TemporaryDirectory() as folder:
        path = checkpoints.save(folder, 7, arrays, {"progress": dataclasses.asdict(Progress())})
        return {"step_00000007.safetensors": pathlib.Path(path).read_bytes()}


def _read_checkpoint(folder: pathlib.Path) -> None:
    _, path = checkpoints.find(str(folder))
    checkpoints.load_digest(path)
    Progress.of_checkpoint(path)
    checkpoints.load(path)


@functools.cache
def _network() -> UNet:
    return UNet.from_preset(DIGITS)


def _diffusers_files() -> dict[str, bytes]:
    model = _network()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name) / "new"
        weights = [np.zeros(v.shape, np.float32) for v in model.trainable_variables]
        diffusers.write_diffusers(str(folder), DIGITS, model.weight_names, weights)
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _read_diffusers(folder: pathlib.Path) -> None:
    if diffusers_config.is_diffusers_folder(str(folder)):
        diffusers.check_size(str(folder), diffusers_config.preset_from_folder(str(folder)))
    diffusers.read_diffusers(str(folder), DIGITS, _network())


def _tf1_files() -> dict[str, bytes]:
    model = _network()
    variables = {"global_step": np.int64(5)}
    for name, v in zip(model.weight_names, model.trainable_variables, strict=True):
        for suffix in ("", "/ExponentialMovingAverage"):
            variables[tf1.tf1_name(name) + suffix] = np.zeros(v.shape, np.float32)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        save_tf1(folder / "model.ckpt-5", variables)
        files = {path.name: path.read_bytes() for path in folder.iterdir() if "part" not in path.name}
    return {**files, "checkpoint": b'model_checkpoint_path: "model.ckpt-5"\n'}


def save_tf1(prefix: pathlib.Path, variables: dict[str, np.ndarray]) -> None:
    """Writes variables as tf.train.Saver does."""
    names = sorted(variables)
    tensors = [tf.constant(variables[name]) for name in names]
    shard = f"{prefix}_part"
    tf.raw_ops.SaveV2(prefix=shard, tensor_names=names, shape_and_slices=[""] * len(names), tensors=tensors)
    tf.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=[shard], destination_prefix=str(prefix))


def _seal_index(content: bytes) -> bytes:
    """Corrects the checksums of the blocks of an index, if the file is one."""
    data = bytearray(content)
    try:
        for offset, size in tf1_index.find_blocks(content):
            data[offset + size + 1 : offset + size + 5] = _crc(content[offset : offset + size + 1])
    except (ValueError, IndexError):
        return content
    return bytes(data[: len(content)])


def _crc(data: bytes) -> bytes:
    return masked_crc32c(data).to_bytes(4, "little")


def _torch_files() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in FIXTURES.glob("torch_small*.pth")}


def _read_torch_files(folder: pathlib.Path) -> None:
    for path in folder.iterdir():
        read_torch(str(path))


def _graph_files() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "graph.pb"
        inception_files.save_frozen_graph(path, batch_norm=True)
        return {path.name: path.read_bytes()}


# --- Images -------------------------------------------------------------------------------------------------------


def _picture(name: str, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.RandomState(0).randint(0, 256, (16, 16, 3), np.uint8)
    PIL.Image.fromarray(pixels).convert(mode).save(buffer, name)
    return buffer.getvalue()


_PICTURES = {
    "rgb.png": ("PNG", "RGB"), "palette.png": ("PNG", "P"), "bits.png": ("PNG", "1"), "alpha.png": ("PNG", "LA"),
    "rgb.jpg": ("JPEG", "RGB"), "cmyk.jpg": ("JPEG", "CMYK"), "palette.gif": ("GIF", "P"), "rgb.tif": ("TIFF", "RGB"),
    "rgb.bmp": ("BMP", "RGB"), "grey.pgm": ("PPM", "L"), "rgb.webp": ("WEBP", "RGB"),
}  # fmt: skip


def _read_pictures(folder: pathlib.Path) -> None:
    for path in sorted(folder.iterdir()):
        assert read_picture(str(path), (16, 16, 3)).shape == (16, 16, 3)


def _seal_png(content: bytes) -> bytes:
    """Corrects the checksums of a PNG's chunks, if it is one."""
    data, place = bytearray(content), 8
    while content.startswith(b"\x89PNG") and place + 12 <= len(data):
        end = place + 8 + int.from_bytes(data[place : place + 4], "big")
        data[end : end + 4] = zlib.crc32(data[place + 4 : end]).to_bytes(4, "big")
        place = end + 4
    return bytes(data[: len(content)])


_RECORD = 98  # bytes of a record of the fixture


def _record_files() -> dict[str, bytes]:
    return {"x.tfrecords": (FIXTURES / "stylegan2_4x4.tfrecords").read_bytes()[: 6 * _RECORD]}


def _read_records(folder: pathlib.Path) -> None:
    source = open_source(CATS, "train", DataSettings(tfrecord=str(folder / "x.tfrecords"), skip_bad_records=2))
    assert ImageReader(source)(0, source.num_examples).shape == (source.num_examples, 4, 4, 3)


def _read_records_alone(folder: pathlib.Path) -> None:
    images = RecordImages([str(folder / "x.tfrecords")], CATS.image_shape, "records")
    images.take(np.arange(images.shuffle.num_examples))


def _seal_records(content: bytes) -> bytes:
    """Corrects the checksum of each record's length, and of its contents if their length is right."""
    data = bytearray(content)
    for first in range(0, len(data) - _RECORD + 1, _RECORD):
        for begin, end in ((first, first + 8), (first + 12, first + _RECORD - 4)):
            data[end : end + 4] = _crc(bytes(data[begin:end]))
    return bytes(data)


def _compressed_files() -> dict[str, bytes]:
    file = bitstream.pack(TABLE.digest, 12, 3, random.Random(0).randbytes(60))
    return {"x.dtfc": file, "x.dtfa": pack_archive([file, file], TABLE.digest)}


def _read_compressed(folder: pathlib.Path) -> None:
    paths = [str(folder / name) for name in ("x.dtfc", "x.dtfa")]
    for picture in open_files({path: read_image_file(path, TABLE.image_shape, max_images=2) for path in paths}):
        bitstream.decode_steps(TABLE.step_models(), picture.body)
        bitstream.decode_residual(TABLE.residual_law, picture.body, TABLE.image_shape)


def _seal_compressed(content: bytes) -> bytes:
    if content[:1] != b"\xdf" or len(content) < bitstream.HEADER_BYTES:
        return content
    stream, body = int.from_bytes(content[2:4]), content[bitstream.HEADER_BYTES :]
    return bitstream.pack(TABLE.digest, content[1] % 32, stream, body)


READERS = {
    "npz": Reader(_sample_files, _read_samples),
    "reference": Reader(
        _reference_files, lambda folder: reference_features(_extractor(), _IMAGES, str(folder / "reference.npz"))
    ),
    "statistics": Reader(_statistics_files, lambda folder: read_statistics(str(folder / "statistics.npz"))),
    "run": Reader(_run_files, _read_run),
    "checkpoint": Reader(_checkpoint_files, _read_checkpoint),
    "diffusers": Reader(_diffusers_files, _read_diffusers),
    "tf1": Reader(_tf1_files, lambda folder: tf1.read_tf1(str(folder), _network()), _seal_index),
    "torch": Reader(_torch_files, _read_torch_files),
    "graph": Reader(
        _graph_files, lambda folder: inception_network(str(folder / "graph.pb"), tf.distribute.get_strategy())
    ),
    "tfrecord": Reader(_record_files, _read_records, _seal_records, cost=10),
    "tfrecord_alone": Reader(_record_files, _read_records_alone, _seal_records),
    "picture": Reader(lambda: {name: _picture(*kind) for name, kind in _PICTURES.items()}, _read_pictures, _seal_png),
    "compressed": Reader(_compressed_files, _read_compressed, _seal_compressed),
    "table": Reader(lambda: {"x.json": TABLE.to_json()}, lambda folder: Table.read(str(folder / "x.json"))),
}
