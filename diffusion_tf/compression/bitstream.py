"""The bytes of a compressed image: a header, the steps of the reverse process, and a residual if it is lossless.

    1 byte    magic           0xDF
    1         version         2 in the upper three bits, chunk_bits in the lower five
    2         stream          of the shared random numbers
    3         size            of the body
    2         CRC-16          of the body
    3         key             of the table that it was made with (tables.py) and of the bytes so far, by SHA-256

Integers are big-endian. The table identifies the weights and holds the coarse schedule and the shape of the images.
The steps are one range-coded stream. Each step holds its number of chunks, which is its KL in units of chunk_bits
rounded up, and an index for each chunk, as a number of bits and the bits. How to parse the stream depends only on the
values read so far and on the table's integers, never on the network: differences in float arithmetic between machines
change pixels, but not the parse.

A file can be cut anywhere without step lengths: any continuation of the remaining bytes lies between 0x00... and
0xff..., so the symbols on which these two continuations agree are certain. Any prefix beyond the header is a valid
shorter file that holds its whole steps; the checksum of the body is checked for whole files only.

Files of version 1 are read, not written. Their header has 39 bytes: b"DTFC", the version, the table's digest,
chunk_bits, the shape of the image, the stream, the sizes of the steps and of the body, and a CRC-32 of the body and of
the header.
"""

import binascii
import bisect
import dataclasses
import functools
import hashlib
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from constriction import stream

from diffusion_tf.errors import InputError

MAGIC = 0xDF
VERSION = 2
_VERSION_BITS = 5  # of the second byte, below the version
_FIELDS = struct.Struct(">BBHBHH")
_KEY_BYTES = 3
HEADER_BYTES = _FIELDS.size + _KEY_BYTES
MAX_BODY_BYTES = 2**24 - 1
NUM_STREAMS = 2**16
_MAGIC_1 = b"DTFC"
_FIELDS_1 = struct.Struct(">4sB8sBHHBIIIII")
INDEX_LENGTHS = 61  # index + 1 has 0 ... 60 bits after its first
_WORD_BITS = 16  # bits of an index that are coded at once
_RECENT = 8  # steps whose numbers of chunks predict that of the next
UNIT = 256  # the means of numbers of chunks are multiples of 1 / 256
_PRIOR = 2 * UNIT  # chunks by which the prediction holds on to the mean

# The chunk indices of each step.
Steps = list[list[int]]


@dataclasses.dataclass(frozen=True)
class Header:
    """What a decoder needs to know of a file before its body.

    Attributes:
      version: of the file.
      chunk_bits: selects one of the run's tables.
      stream: of the shared random numbers.
      body_size: of the whole body, in bytes.
      key: identifies the table; in version 2 it is a hash of the table's digest and of `keyed`.
      keyed: the bytes of the header that the key protects.
    """

    version: int
    chunk_bits: int
    stream: int
    body_size: int
    key: bytes
    keyed: bytes = b""

    def fits(self, digest: bytes) -> bool:
        """Whether the header is intact and names the table with this digest."""
        return self.key == (key_of(self.keyed, digest) if self.version > 1 else digest)


def key_of(keyed: bytes, digest: bytes) -> bytes:
    """Three bytes that identify a table and protect the bytes of a header."""
    return hashlib.sha256(keyed + digest).digest()[:_KEY_BYTES]


def version_byte(chunk_bits: int) -> int:
    """The second byte of a file."""
    return VERSION << _VERSION_BITS | chunk_bits


def version_of(byte: int) -> tuple[int, int]:
    """The version and chunk_bits in the second byte of a file."""
    return byte >> _VERSION_BITS, byte % (1 << _VERSION_BITS)


def pack(digest: bytes, chunk_bits: int, stream: int, body: bytes) -> bytes:
    """The contents of a file.

    Args:
      digest: of the table.
      chunk_bits: of the table.
      stream: of the random numbers, in [0, 2^16).
      body: the steps, and the residual.
    """
    size = len(body)
    keyed = _FIELDS.pack(MAGIC, version_byte(chunk_bits), stream, size >> 16, size & 0xFFFF, binascii.crc_hqx(body, 0))
    return keyed + key_of(keyed, digest) + body


def unpack(data: bytes, name: str) -> tuple[Header, bytes]:
    """The header of a file, and as much of the body as it holds.

    Raises:
      InputError: `data` is not a compressed image, of a later version, damaged, or cut off inside its header. The
        message quotes `name`.
    """
    if data[:1] == _MAGIC_1[:1]:
        return _unpack_1(data, name)
    check_start(data, MAGIC, name)
    _, version, number, high, low, crc = _FIELDS.unpack_from(data)
    header = Header(
        *version_of(version), number, high << 16 | low, data[_FIELDS.size : HEADER_BYTES],
        data[: _FIELDS.size],
    )  # fmt: skip
    body = data[HEADER_BYTES:]
    check_body(header, body, crc == binascii.crc_hqx(body, 0), name)
    return header, body


def check_start(data: bytes, magic: int, name: str) -> None:
    """Raises InputError unless `data` starts with this magic and this version, and holds a whole header."""
    if data[:1] != bytes([magic]):
        raise InputError(f"{name} is not a compressed image of diffusion_tf")
    version = version_of(data[1])[0] if len(data) > 1 else VERSION
    if version != VERSION:
        raise InputError(f"{name} is damaged, or has version {version}, but this program reads 1 and {VERSION}")
    if len(data) < HEADER_BYTES:
        raise InputError(f"{name} is cut off inside its header: {len(data)} of {HEADER_BYTES} bytes")


def check_body(header: Header, body: bytes, intact: bool, name: str) -> None:
    """Raises InputError if the body is longer than the header says, or whole but not `intact`."""
    if len(body) > header.body_size or (len(body) == header.body_size and not intact):
        raise InputError(f"{name} is damaged: its contents do not match their checksum")


def _unpack_1(data: bytes, name: str) -> tuple[Header, bytes]:
    """`unpack` of version 1."""
    if data[:4] != _MAGIC_1[: len(data)]:
        raise InputError(f"{name} is not a compressed image of diffusion_tf")
    if len(data) < _FIELDS_1.size:
        raise InputError(f"{name} is cut off inside its header: {len(data)} of {_FIELDS_1.size} bytes")
    _, version, digest, chunk_bits, *_, number, _, body_size, body_crc, crc = _FIELDS_1.unpack_from(data)
    if version != 1 or zlib.crc32(data[: _FIELDS_1.size - 4]) != crc:
        raise InputError(f"{name} is damaged: its header does not match its checksum")
    header, body = Header(1, chunk_bits, number, body_size, digest), data[_FIELDS_1.size :]
    check_body(header, body, zlib.crc32(body) == body_crc, name)
    return header, body


class StepModel:
    """The entropy model of a step: probabilities of the number of chunks and of each index.

    Images with many chunks in one step have many in the next, so the number is coded as its difference from a
    prediction. Version 1 codes the number itself.

    Args:
      chunks: integers proportional to the probabilities of the differences -D, ..., D from the prediction; in version 1
        of 0, 1, ... chunks. Other numbers get the least probability.
      indices: the same for the number of bits of index + 1 after its first.
      max_chunks: the largest possible number of chunks.
      means: mean numbers of chunks of the steps up to this one in units of 1 / 256; empty in version 1.
    """

    def __init__(self, chunks: Sequence[int], indices: Sequence[int], max_chunks: int, means: Sequence[int] = ()):
        self._chunks, self._max_chunks, self._means = chunks, max_chunks, means
        self._indices = _categorical(indices, INDEX_LENGTHS)
        self._chunk_models: dict[int, stream.model.Categorical] = {}

    def encode(self, encoder: stream.queue.RangeEncoder, indices: Sequence[int], before: Sequence[int]) -> None:
        """Appends the chunk indices of a step; `before` are the numbers of chunks of the steps before it."""
        encoder.encode(len(indices), self._chunk_model(before))
        for index in indices:
            bits = (index + 1).bit_length() - 1
            encoder.encode(bits, self._indices)
            for shift, width in _words_of(bits):
                encoder.encode(((index + 1) >> shift) & ((1 << width) - 1), _uniform(width))

    def decode(self, reader: "_PrefixReader", before: Sequence[int]) -> list[int]:
        """Reads the chunk indices of the next step; `before` are the numbers of chunks of the steps before it."""
        return [self._decode_index(reader) for _ in range(reader.read(self._chunk_model(before)))]

    def _chunk_model(self, before: Sequence[int]) -> stream.model.Categorical:
        """The law of the number of chunks, by the numbers before it."""
        shift = predicted_chunks(self._means, before) - len(self._chunks) // 2 if self._means else 0
        if shift not in self._chunk_models:
            law = [0] * shift + list(self._chunks)[max(0, -shift) :]
            self._chunk_models[shift] = _categorical(law[: self._max_chunks + 1], self._max_chunks + 1)
        return self._chunk_models[shift]

    def _decode_index(self, reader: "_PrefixReader") -> int:
        bits = reader.read(self._indices)
        value = 1
        for _, width in _words_of(bits):
            value = (value << width) | reader.read(_uniform(width))
        return value - 1


def predicted_chunks(means: Sequence[int], before: Sequence[int]) -> int:
    """The number of chunks to expect in a step: its mean, scaled as the numbers of the recent steps are to their means.

    Integers, so that every machine predicts the same.

    Args:
      means: mean numbers of chunks of the steps up to this one, in units of 1 / 256.
      before: the numbers of chunks of the steps before it.
    """
    scale = UNIT * sum(before[-_RECENT:]) + _PRIOR
    mean_scale = sum(means[:-1][-_RECENT:]) + _PRIOR
    return (2 * means[-1] * scale + UNIT * mean_scale) // (2 * UNIT * mean_scale)


def encode_steps(models: Sequence[StepModel], steps: Steps) -> bytes:
    """The shortest bytes that hold `steps`."""
    encoder = stream.queue.RangeEncoder()
    counts = [len(indices) for indices in steps]
    for step, (model, indices) in enumerate(zip(models, steps, strict=True)):
        model.encode(encoder, indices, counts[:step])
    encoder.encode(1 << 15, _uniform(16))  # the middle of all continuations, which the fewest bits identify
    data = _to_bytes(encoder)
    return data[: -(-prefix_bits(models, data, len(steps))[-1] // 8)]


def decode_steps(models: Sequence[StepModel], data: bytes, num_bits: int | None = None) -> Steps:
    """The whole steps in a prefix of what `encode_steps` gives: `data`, or its first `num_bits` bits."""
    reader = _PrefixReader(data, 8 * len(data) if num_bits is None else num_bits)
    steps: Steps = []
    try:
        for model in models:
            steps.append(model.decode(reader, [len(indices) for indices in steps]))
    except _Undetermined:
        pass
    return steps


def prefix_bits(models: Sequence[StepModel], data: bytes, num_steps: int) -> list[int]:
    """Number of bits that hold the first 0, 1, ..., num_steps steps."""
    steps_in = functools.cache(lambda num_bits: len(decode_steps(models, data, num_bits)))
    return [bisect.bisect_left(range(8 * len(data)), count, key=steps_in) for count in range(num_steps + 1)]


def encode_residual(frequencies: Sequence[int], residual: np.ndarray) -> bytes:
    """Codes a uint8 array by 256 integers proportional to the probabilities of its values."""
    encoder = stream.queue.RangeEncoder()
    encoder.encode(residual.reshape(-1).astype(np.int32), _categorical(frequencies, 256))
    return _to_bytes(encoder)


def decode_residual(frequencies: Sequence[int], data: bytes, shape: Sequence[int]) -> np.ndarray:
    """The inverse of `encode_residual`, uint8 of `shape`; arbitrary values for arbitrary `data`."""
    decoder = stream.queue.RangeDecoder(_to_words(data, b"\0"))
    try:
        return decoder.decode(_categorical(frequencies, 256), int(np.prod(shape))).astype(np.uint8).reshape(shape)
    except AssertionError:  # bytes that no encoder writes
        return np.zeros(shape, np.uint8)


class _Undetermined(Exception):  # noqa: N818 - no error: the file was cut
    """The next symbol depends on bytes beyond the prefix."""


class _PrefixReader:
    """Reads the symbols that do not depend on what may have followed the first `num_bits` bits of `data`."""

    def __init__(self, data: bytes, num_bits: int):
        kept = int.from_bytes(data) >> (8 * len(data) - num_bits)
        lowest = kept << (-num_bits % 8)
        highest = lowest | ((1 << (-num_bits % 8)) - 1)
        paddings = ((lowest, b"\0"), (highest, b"\xff"))
        self._decoders = [
            stream.queue.RangeDecoder(_to_words(value.to_bytes(-(-num_bits // 8)), byte)) for value, byte in paddings
        ]

    def read(self, symbol_model: stream.model.Model) -> int:
        """The next symbol; raises `_Undetermined` if the prefix does not determine it."""
        try:
            lowest, highest = (decoder.decode(symbol_model) for decoder in self._decoders)
        except AssertionError as error:  # bytes that no encoder writes
            raise _Undetermined from error
        if lowest != highest:
            raise _Undetermined
        return int(lowest)


def _to_words(data: bytes, padding: bytes) -> np.ndarray:
    """32-bit words, padded by more of them than a decoder reads ahead."""
    return np.frombuffer(data + padding * (16 - len(data) % 4), ">u4").astype(np.uint32)


def _to_bytes(encoder: stream.queue.RangeEncoder) -> bytes:
    return encoder.get_compressed().astype(">u4").tobytes()


def _words_of(bits: int) -> list[tuple[int, int]]:
    """(shift, width) of the words in which `bits` bits are coded, the highest first."""
    starts = range(0, bits, _WORD_BITS)
    return [(start, min(_WORD_BITS, bits - start)) for start in reversed(starts)]


@functools.cache
def _uniform(width: int) -> stream.model.Uniform:
    return stream.model.Uniform(1 << width)


def _categorical(frequencies: Sequence[int], size: int) -> stream.model.Categorical:
    """Probabilities of 0 ... size - 1, proportional to `frequencies`; values beyond them get the least probability.

    The sum of the integers is exact in float64, so that every machine builds the same model.
    """
    if not any(frequencies):
        return stream.model.Categorical(np.ones(size), perfect=False)
    probabilities = np.zeros(size)
    probabilities[: len(frequencies)] = frequencies
    return stream.model.Categorical(probabilities, perfect=False)
