"""Images as files: what an encoder writes of each, how far it goes, and what a decoder makes of what it is given."""

import dataclasses
import math
import zlib
from collections.abc import Sequence

import numpy as np

from diffusion_tf.compression import bitstream
from diffusion_tf.compression.bitstream import HEADER_BYTES, Header
from diffusion_tf.compression.codec import Codec, Encoded
from diffusion_tf.compression.table import Table
from diffusion_tf.diffusion_utils import images_to_x, x_to_images
from diffusion_tf.errors import ConfigError, InputError
from diffusion_tf.storage.files import read_file

EXTENSION = ".dtfc"
_MAX_BYTES_PER_DIM = 256  # of a file: some 150 steps of as many chunks as can be take 200


@dataclasses.dataclass(frozen=True)
class Measured:
    """Of one image after 0, 1, ..., S steps.

    Attributes:
      bits: that say so much, without the header.
      kl_bits: the sum of KL(q || p).
      mse: of the prediction, on [0, 255].
    """

    bits: np.ndarray
    kl_bits: np.ndarray
    mse: np.ndarray


@dataclasses.dataclass(frozen=True)
class Targets:
    """Where to stop.

    Attributes:
      rmse: at the first step with this RMSE on [0, 255], or less; at the last one where none has.
      bits_per_dim: at the last step of at most this, header included.
    """

    rmse: float | None = None
    bits_per_dim: float | None = None

    def __bool__(self) -> bool:
        return self != Targets()

    def check(self, num_dims: int) -> None:
        """Raises InputError where not even the header is as small as is asked for."""
        least = 8 * HEADER_BYTES / num_dims
        if self.bits_per_dim is not None and self.bits_per_dim < least:
            raise ConfigError(
                "target_bits_per_dim",
                f"={self.bits_per_dim:g} is less than a file's header takes of such an image:"
                f" {math.ceil(1e4 * least) / 1e4:g} at least",
            )

    def steps(self, measured: Measured, num_dims: int) -> int:
        """How many steps to send."""
        stop = len(measured.bits) - 1
        if self.rmse is not None:
            reached = np.flatnonzero(np.sqrt(measured.mse) <= self.rmse)
            stop = int(reached[0]) if len(reached) else stop
        if self.bits_per_dim is not None:
            file_bits = 8 * (HEADER_BYTES + np.ceil(measured.bits / 8))
            stop = min(stop, int(np.searchsorted(file_bits / num_dims, self.bits_per_dim, side="right")) - 1)
        return stop


def encode_image(
    table: Table, encoded: Encoded, i: int, image: np.ndarray, stream: int, *, targets: Targets, lossless: bool
) -> tuple[bytes, Measured, int]:
    """The file of image i of a batch, what it measures at each step, and how many of them it holds."""
    laws = table.step_laws()
    steps = bitstream.encode_steps(laws, encoded.steps[i])
    measured = Measured(
        np.array(bitstream.prefix_bits(laws, steps, len(laws))),
        np.append(0.0, np.cumsum(encoded.kl_bits[i])),
        127.5**2 * np.square(encoded.pred_xstart[:, i] - images_to_x(image).numpy()).mean(axis=(1, 2, 3)),
    )
    stop = targets.steps(measured, image.size)
    steps = steps[: -(-measured.bits[stop] // 8)]
    residual = b""
    if lossless:
        difference = image - x_to_images(encoded.pred_xstart[-1, i]).numpy()
        residual = zlib.crc32(image.tobytes()).to_bytes(4, "big")
        residual += bitstream.encode_residual(table.residual_law, difference)
    body = steps + residual
    header = Header(table.digest, table.chunk_bits, image.shape, stream, len(steps), len(body), zlib.crc32(body))
    return bitstream.pack(header, body), measured, stop


def read_image_file(path: str, image_shape: Sequence[int]) -> tuple[Header, bytes]:
    """Header and body of a file for such images, whole or cut.

    Raises:
      InputError: it cannot be read, is too large for such an image, no such file, or damaged.
    """
    data = read_file(path, HEADER_BYTES + _MAX_BYTES_PER_DIM * math.prod(image_shape))
    return bitstream.unpack(data, path)


def decode_images(table: Table, codec: Codec, files: Sequence[tuple[str, Header, bytes]]) -> np.ndarray:
    """The images of some files, each with its name, uint8 [N, H, W, C].

    Raises:
      InputError: a lossless one does not come out as it was, which its checksum tells.
    """
    laws = table.step_laws()
    steps = [bitstream.decode_steps(laws, body[: header.steps_size]) for _, header, body in files]
    images = x_to_images(codec.decode(steps, [header.stream for _, header, _ in files])).numpy()
    for i, (name, header, body) in enumerate(files):
        residual = body[header.steps_size :]
        if len(body) == header.body_size and residual:
            images[i] += bitstream.decode_residual(table.residual_law, residual[4:], images[i].shape)
            if zlib.crc32(images[i].tobytes()) != int.from_bytes(residual[:4], "big"):
                raise InputError(
                    f"{name} does not come out lossless here: this machine's predictions differ from its encoder's"
                )
    return images
