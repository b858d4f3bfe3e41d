"""Images as .dtfc files: what the encoder writes for each, where it stops, and what the decoder reads."""

import dataclasses
import itertools
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from diffusion_tf.compression import CHUNK_BITS, bitstream
from diffusion_tf.compression.bitstream import HEADER_BYTES, Header
from diffusion_tf.compression.codec import Codec, Encoded
from diffusion_tf.compression.tables import TableStore
from diffusion_tf.diffusion_utils import images_to_x, x_to_images
from diffusion_tf.errors import ConfigError, InputError
from diffusion_tf.progress_bar import progress_bar
from diffusion_tf.storage.files import read_file

EXTENSION = ".dtfc"
_MAX_BYTES_PER_DIM = 256  # of a file; about 150 steps with the largest number of chunks take 200


@dataclasses.dataclass(frozen=True)
class RateDistortion:
    """Rate and distortion of one image after 0, 1, ..., S steps.

    Attributes:
      bits: bits that hold these steps, without the header, int [S + 1].
      kl_bits: sum of KL(q || p) in bits, float64 [S + 1].
      mse: mean squared error of the prediction on [0, 255], float64 [S + 1].
    """

    bits: np.ndarray
    kl_bits: np.ndarray
    mse: np.ndarray


@dataclasses.dataclass(frozen=True)
class Targets:
    """Where an encoder stops; by default at the last step.

    Attributes:
      rmse: stop at the first step with this RMSE on [0, 255] or less; at the last step if none has.
      bits_per_dim: stop at the last step whose file, with its header, has at most this many bits/dim.
      lossless: add the residual to the last prediction.
    """

    rmse: float | None = None
    bits_per_dim: float | None = None
    lossless: bool = False

    @property
    def stop_early(self) -> bool:
        """Whether files may end before the last step."""
        return self.rmse is not None or self.bits_per_dim is not None

    def check(self, num_dims: int) -> None:
        """Checks the targets for images of `num_dims` dimensions.

        Raises:
          ConfigError: a target is negative or not finite, the header alone is larger than `bits_per_dim`, or `lossless`
            is combined with a target.
        """
        for name, target in (("target_rmse", self.rmse), ("target_bits_per_dim", self.bits_per_dim)):
            if target is not None and not 0.0 <= target < math.inf:
                raise ConfigError(name, f"={target:g} must be 0 or more, and finite")
        if self.lossless and self.stop_early:
            raise ConfigError("lossless", "needs all steps: leave `target_rmse` and `target_bits_per_dim` out")
        least = 8 * HEADER_BYTES / num_dims
        if self.bits_per_dim is not None and self.bits_per_dim < least:
            raise ConfigError(
                "target_bits_per_dim",
                f"={self.bits_per_dim:g} is less than a file's header takes for such an image:"
                f" {math.ceil(1e4 * least) / 1e4:g} at least",
            )

    def num_steps(self, curve: RateDistortion, num_dims: int) -> int:
        """Number of steps to send of an image."""
        stop = len(curve.bits) - 1
        if self.rmse is not None:
            reached = np.flatnonzero(np.sqrt(curve.mse) <= self.rmse)
            stop = int(reached[0]) if len(reached) else stop
        if self.bits_per_dim is not None:
            file_bits = 8 * (HEADER_BYTES + np.ceil(curve.bits / 8))
            stop = min(stop, int(np.searchsorted(file_bits / num_dims, self.bits_per_dim, side="right")) - 1)
        return stop


ALL_STEPS = Targets()


@dataclasses.dataclass(frozen=True)
class CompressedImage:
    """An encoded image.

    Attributes:
      data: the contents of its file.
      num_steps: steps that the file holds.
      mse: mean squared error of the decoded file on [0, 255].
      curve: rate and distortion after each step, also of steps that the file does not hold.
      shown: what a decoder shows after 0, 1, ..., S steps, uint8 [S + 1, H, W, C].
    """

    data: bytes
    num_steps: int
    mse: float
    curve: RateDistortion
    shown: np.ndarray


def encode_images(
    codec: Codec, images: np.ndarray, *, seed: int = 0, targets: Targets = ALL_STEPS
) -> Iterator[CompressedImage]:
    """Encodes images one batch at a time; shows progress.

    Args:
      codec: the trained model and its table.
      images: uint8 [N, H, W, C].
      seed: image i uses the stream seed + i of random numbers.
      targets: where to stop.

    Yields:
      Each image, in order.

    Raises:
      ConfigError: the targets cannot be met.
    """
    targets.check(images[0].size)
    batch_size = codec.table.batch_size
    for first in progress_bar(range(0, len(images), batch_size), unit="batch", desc="encoding"):
        batch = images[first : first + batch_size]
        streams = [(seed + first + i) % 2**32 for i in range(len(batch))]
        encoded = codec.encode(batch, streams)
        for i, image in enumerate(batch):
            yield _compressed_image(codec, encoded, i, image, streams[i], targets)


def _compressed_image(
    codec: Codec, encoded: Encoded, i: int, image: np.ndarray, stream: int, targets: Targets
) -> CompressedImage:
    """Image i of an encoded batch as a file."""
    table, models = codec.table, codec.table.step_models()
    pred_xstart = encoded.pred_xstart[:, i]
    shown = x_to_images(pred_xstart).numpy()
    steps = bitstream.encode_steps(models, encoded.steps[i])
    curve = RateDistortion(
        np.array(bitstream.prefix_bits(models, steps, len(models))),
        np.append(0.0, np.cumsum(encoded.kl_bits[i])),
        127.5**2 * np.square(pred_xstart - images_to_x(image).numpy()).mean(axis=(1, 2, 3)),
    )
    num_steps = targets.num_steps(curve, image.size)
    steps = steps[: -(-curve.bits[num_steps] // 8)]
    residual = b""
    if targets.lossless:
        residual = zlib.crc32(image.tobytes()).to_bytes(4, "big")
        residual += bitstream.encode_residual(table.residual_law, image - shown[-1])
    body = steps + residual
    header = Header(table.digest, table.chunk_bits, image.shape, stream, len(steps), len(body), zlib.crc32(body))
    mse = 0.0 if targets.lossless else float(curve.mse[num_steps])
    return CompressedImage(bitstream.pack(header, body), num_steps, mse, curve, shown)


def read_image_file(path: str, image_shape: Sequence[int]) -> bytes:
    """The contents of a file, whole or cut off.

    Raises:
      InputError: the file cannot be read, or is too large for an image of this shape.
    """
    return read_file(path, HEADER_BYTES + _MAX_BYTES_PER_DIM * math.prod(image_shape))


def decode_images(tables: TableStore, files: Mapping[str, bytes]) -> Iterator[np.ndarray]:
    """Decodes files, whole or cut off beyond their headers; checks all headers first; shows progress.

    Args:
      tables: the tables of the checkpoint that encoded the files.
      files: the contents of each file by its name, which errors quote.

    Yields:
      Each image, uint8 [H, W, C], in the order of `files`.

    Raises:
      InputError: a file is not a compressed image, is damaged, or was made by another model or table; or a lossless
        file does not decode to its image on this machine.
    """
    parsed = [(name, *bitstream.unpack(data, name)) for name, data in files.items()]
    codecs: dict[int, Codec] = {}
    for name, header, _ in parsed:
        if header.chunk_bits not in CHUNK_BITS:
            raise InputError(f"{name} has chunks of {header.chunk_bits} bits, which no table has")
        if header.chunk_bits not in codecs:
            codecs[header.chunk_bits] = Codec(tables.trained, tables.get(header.chunk_bits))
        table = codecs[header.chunk_bits].table
        if header.digest != table.digest or header.image_shape != table.image_shape:
            raise InputError(
                f"{name} was made by another model, or another table, than {tables.path(table.chunk_bits)}"
            )
    with progress_bar(total=len(parsed), unit="image", desc="decoding") as bar:
        for chunk_bits, group in itertools.groupby(parsed, key=lambda file: file[1].chunk_bits):
            codec, rest = codecs[chunk_bits], list(group)
            while rest:
                batch, rest = rest[: codec.table.batch_size], rest[codec.table.batch_size :]
                yield from _decode_batch(codec, batch)
                bar.update(len(batch))


def _decode_batch(codec: Codec, files: Sequence[tuple[str, Header, bytes]]) -> np.ndarray:
    """The images of (name, header, body), uint8 [N, H, W, C]."""
    models, residual_law = codec.table.step_models(), codec.table.residual_law
    steps = [bitstream.decode_steps(models, body[: header.steps_size]) for _, header, body in files]
    images = x_to_images(codec.decode(steps, [header.stream for _, header, _ in files])).numpy()
    for image, (name, header, body) in zip(images, files, strict=True):
        residual = body[header.steps_size :]
        if len(body) == header.body_size and residual:
            image += bitstream.decode_residual(residual_law, residual[4:], image.shape)
            if zlib.crc32(image.tobytes()) != int.from_bytes(residual[:4], "big"):
                raise InputError(
                    f"{name} does not decode losslessly here: this machine's predictions differ from the encoder's"
                )
    return images
