"""Images as .dtfc files: what the encoder writes for each, where it stops, and what the decoder reads."""

import dataclasses
import itertools
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from diffusion_tf.compression import CHUNK_BITS, archive, bitstream
from diffusion_tf.compression.bitstream import HEADER_BYTES, MAX_BODY_BYTES, NUM_STREAMS, Header
from diffusion_tf.compression.codec import Codec, Encoded
from diffusion_tf.compression.tables import TableStore
from diffusion_tf.diffusion_utils import images_to_x, x_to_images
from diffusion_tf.errors import ConfigError, InputError
from diffusion_tf.progress_bar import progress_bar
from diffusion_tf.storage.files import read_file

EXTENSION = ".dtfc"
_MAX_BYTES_PER_DIM = 256  # of a file; about 150 steps with the largest number of chunks take 200

_CHECKSUM_BYTES = 4  # of the image, before the residual


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
      seed: image i uses the stream (seed + i) mod 2^16 of random numbers.
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
        streams = [(seed + first + i) % NUM_STREAMS for i in range(len(batch))]
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
        residual = zlib.crc32(image.tobytes()).to_bytes(_CHECKSUM_BYTES, "big")
        residual += bitstream.encode_residual(table.residual_law, image - shown[-1])
    if len(steps) + len(residual) > MAX_BODY_BYTES:
        raise InputError(f"an image takes {len(steps) + len(residual):,} bytes, but a file holds {MAX_BODY_BYTES:,}")
    mse = 0.0 if targets.lossless else float(curve.mse[num_steps])
    data = bitstream.pack(table.digest, table.chunk_bits, stream, steps + residual)
    return CompressedImage(data, num_steps, mse, curve, shown)


def read_image_file(path: str, image_shape: Sequence[int], max_images: int = 1) -> bytes:
    """The contents of a file, whole or cut off.

    Args:
      path: the file.
      image_shape: (H, W, C).
      max_images: the images that it may hold.

    Raises:
      InputError: the file cannot be read, or is too large for images of this shape.
    """
    return read_file(path, HEADER_BYTES + max_images * _MAX_BYTES_PER_DIM * math.prod(image_shape))


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image to decode.

    Attributes:
      name: of its file, which errors quote.
      header: of its file or archive.
      body: as much of the body as there is.
    """

    name: str
    header: Header
    body: bytes


def open_files(files: Mapping[str, bytes]) -> list[Picture]:
    """The images in files and archives, in order.

    Args:
      files: the contents of each file by its name, which errors quote.

    Raises:
      InputError: a file is not a compressed image or an archive, or is damaged.
    """
    pictures = []
    for name, data in files.items():
        if data[:1] == bytes([archive.MAGIC]):
            images = archive.unpack_archive(data, name)
            pictures += [Picture(f"image {i} of {name}", *image) for i, image in enumerate(images)]
        else:
            pictures.append(Picture(name, *bitstream.unpack(data, name)))
    return pictures


def decode_images(tables: TableStore, pictures: Sequence[Picture], max_bits: int | None = None) -> Iterator[np.ndarray]:
    """Decodes images, whole or cut off beyond their headers; checks all headers first; shows progress.

    Args:
      tables: the tables of the checkpoint that encoded the images.
      pictures: what to decode.
      max_bits: bits to read of each body. Default: all.

    Yields:
      Each image, uint8 [H, W, C], in the order of `pictures`.

    Raises:
      InputError: an image was made by another model or table, or its header is damaged; or a lossless image does not
        decode to itself on this machine.
    """
    codecs: dict[tuple[int, int], Codec] = {}
    for picture in pictures:
        header = picture.header
        if header.chunk_bits not in CHUNK_BITS:
            raise InputError(f"{picture.name} has chunks of {header.chunk_bits} bits, which no table has")
        key = (header.chunk_bits, header.version)
        if key not in codecs:
            codecs[key] = Codec(tables.trained, tables.get(*key))
        if not header.fits(codecs[key].table.digest):
            raise InputError(
                f"{picture.name} was made by another model, or another table, than {tables.path(*key)},"
                " or its header is damaged"
            )
    with progress_bar(total=len(pictures), unit="image", desc="decoding") as bar:
        for key, group in itertools.groupby(
            pictures, lambda picture: (picture.header.chunk_bits, picture.header.version)
        ):
            same, batch_size = list(group), codecs[key].table.batch_size
            for first in range(0, len(same), batch_size):
                batch = same[first : first + batch_size]
                yield from _decode_batch(codecs[key], batch, max_bits)
                bar.update(len(batch))


def _decode_batch(codec: Codec, pictures: Sequence[Picture], max_bits: int | None) -> np.ndarray:
    """The images, uint8 [N, H, W, C], from at most `max_bits` of each body."""
    models, residual_law = codec.table.step_models(), codec.table.residual_law
    sizes = [
        8 * len(picture.body) if max_bits is None else min(max_bits, 8 * len(picture.body)) for picture in pictures
    ]
    steps = [bitstream.decode_steps(models, picture.body, size) for picture, size in zip(pictures, sizes, strict=True)]
    images = x_to_images(codec.decode(steps, [picture.header.stream for picture in pictures])).numpy()
    for i, picture in enumerate(pictures):
        if sizes[i] < 8 * picture.header.body_size or len(steps[i]) < len(models):
            continue
        residual = picture.body[len(bitstream.encode_steps(models, steps[i])) :]
        if len(residual) > _CHECKSUM_BYTES:
            images[i] += bitstream.decode_residual(residual_law, residual[_CHECKSUM_BYTES:], images[i].shape)
            if zlib.crc32(images[i].tobytes()) != int.from_bytes(residual[:_CHECKSUM_BYTES], "big"):
                raise InputError(
                    f"{picture.name} does not decode losslessly here: this machine's predictions differ from the"
                    " encoder's"
                )
    return images
