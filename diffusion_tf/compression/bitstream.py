"""The bytes of a compressed image: a header, then the steps of the reverse process, then a residual if it is lossless.

    4 bytes   magic           b"DTFC"
    1         version         1
    8         digest          of the table (codec.py), which names the weights and holds the coarse schedule
    1         chunk_bits      which of a run's tables
    2, 2, 1   image shape     H, W, C
    4         stream          of the shared random numbers
    4, 4      sizes           of the steps, and of the whole body
    4         CRC-32          of the body
    4         CRC-32          of the bytes so far

Integers are big-endian. The steps are one range-coded stream: of each step its number of chunks, which is its KL in
units of chunk_bits rounded up, and an index for each chunk, as a number of bits and the bits. How to read on follows
from the values before and the table's whole numbers alone, never from the network: float drift between machines moves
pixels, and not the reader.

No step lengths are needed to cut a file: whatever bytes may have followed lie between 0x00... and 0xff..., so what both
of these continuations mean alike is what the bytes at hand say. Any prefix beyond the header is a valid shorter file,
of which the whole steps count; the body's checksum is of whole files only.
"""

import bisect
import dataclasses
import functools
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from constriction import stream

from diffusion_tf.errors import InputError

MAGIC = b"DTFC"
VERSION = 1
_FIELDS = struct.Struct(">4sB8sBHHBIIII")
_CRC = struct.Struct(">I")
HEADER_BYTES = _FIELDS.size + _CRC.size
INDEX_LENGTHS = 61  # 0 ... 60 bits of an index's successor after its first
_MANTISSA_BITS = 16  # of an index that are coded at once

# The indices of each step's chunks.
Steps = list[list[int]]


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file says of itself; sizes in bytes."""

    digest: bytes
    chunk_bits: int
    image_shape: tuple[int, int, int]
    stream: int
    steps_size: int
    body_size: int
    body_crc: int


def pack(header: Header, body: bytes) -> bytes:
    """A whole file."""
    fields = _FIELDS.pack(
        MAGIC, VERSION, header.digest, header.chunk_bits, *header.image_shape, header.stream,
        header.steps_size, header.body_size, header.body_crc,
    )  # fmt: skip
    return fields + _CRC.pack(zlib.crc32(fields)) + body


def unpack(data: bytes, name: str) -> tuple[Header, bytes]:
    """The header and what there is of the body.

    Raises:
      InputError: not such a file, of a later version, damaged, or cut off inside its header; `name` is told.
    """
    if data[:4] != MAGIC[: len(data)] or not data:
        raise InputError(f"{name} is no compressed image of diffusion_tf")
    if len(data) < HEADER_BYTES:
        raise InputError(f"{name} is cut off inside its header: {len(data)} of {HEADER_BYTES} bytes")
    if zlib.crc32(data[: _FIELDS.size]) != _CRC.unpack_from(data, _FIELDS.size)[0]:
        # A later version may have another header, of which all that is known is where its version stands.
        later = f", or is of version {data[4]}, and this program reads {VERSION}" if data[4] != VERSION else ""
        raise InputError(f"{name} is damaged{later}: its header does not match its checksum")
    _, version, digest, chunk_bits, height, width, channels, *rest = _FIELDS.unpack_from(data)
    if version != VERSION:
        raise InputError(f"{name} is of version {version}, and this program reads {VERSION}: take a newer one")
    header = Header(digest, chunk_bits, (height, width, channels), *rest)
    body = data[HEADER_BYTES:]
    whole = len(body) >= header.body_size
    if len(body) > header.body_size or (whole and zlib.crc32(body) != header.body_crc):
        raise InputError(f"{name} is damaged: its contents do not match their checksum")
    return header, body


class StepLaw:
    """How likely which number of chunks and which index are in a step.

    Args:
      chunks: whole numbers in proportion to the probabilities of 0, 1, ... chunks; more are possible, and unlikely.
      indices: the same of the bits that index + 1 has after its first.
      max_chunks: more than this are impossible.
    """

    def __init__(self, chunks: Sequence[int], indices: Sequence[int], max_chunks: int):
        self._chunks = _categorical(chunks[: max_chunks + 1], max_chunks + 1)
        self._indices = _categorical(indices, INDEX_LENGTHS)

    def encode(self, encoder: stream.queue.RangeEncoder, indices: Sequence[int]) -> None:
        """Adds a step's chunks."""
        encoder.encode(len(indices), self._chunks)
        for index in indices:
            bits = (index + 1).bit_length() - 1
            encoder.encode(bits, self._indices)
            for shift, width in _pieces(bits):
                encoder.encode(((index + 1) >> shift) & ((1 << width) - 1), _uniform(width))

    def decode(self, reader: "_PrefixReader") -> list[int]:
        """The next step's chunks."""
        return [self._decode_index(reader) for _ in range(reader.read(self._chunks))]

    def _decode_index(self, reader: "_PrefixReader") -> int:
        bits = reader.read(self._indices)
        value = 1
        for _, width in _pieces(bits):
            value = (value << width) | reader.read(_uniform(width))
        return value - 1


def encode_steps(laws: Sequence[StepLaw], steps: Steps) -> bytes:
    """The shortest bytes that say `steps`."""
    encoder = stream.queue.RangeEncoder()
    for law, indices in zip(laws, steps, strict=True):
        law.encode(encoder, indices)
    encoder.encode(1 << 15, _uniform(16))  # amid all that may follow: the fewest bits tell where that is
    data = _to_bytes(encoder)
    return data[: -(-prefix_bits(laws, data, len(steps))[-1] // 8)]


def decode_steps(laws: Sequence[StepLaw], data: bytes, num_bits: int | None = None) -> Steps:
    """The steps that `data`, a prefix of what `encode_steps` gives, says whole; or its first bits."""
    reader = _PrefixReader(data, 8 * len(data) if num_bits is None else num_bits)
    steps: Steps = []
    try:
        for law in laws:
            steps.append(law.decode(reader))
    except _Undetermined:
        pass
    return steps


def prefix_bits(laws: Sequence[StepLaw], data: bytes, num_steps: int) -> list[int]:
    """How many bits say the first 0, 1, ..., num_steps steps."""
    says = functools.cache(lambda num_bits: len(decode_steps(laws, data, num_bits)))
    return [bisect.bisect_left(range(8 * len(data)), count, key=says) for count in range(num_steps + 1)]


def encode_residual(law: Sequence[int], residual: np.ndarray) -> bytes:
    """Whole numbers modulo 256 by their law, 256 whole numbers in proportion to the probabilities."""
    encoder = stream.queue.RangeEncoder()
    encoder.encode(residual.reshape(-1).astype(np.int32), _categorical(law, 256))
    return _to_bytes(encoder)


def decode_residual(law: Sequence[int], data: bytes, shape: Sequence[int]) -> np.ndarray:
    """What `encode_residual` was given, uint8 of `shape`; arbitrary where `data` is."""
    decoder = stream.queue.RangeDecoder(_to_words(data, b"\0"))
    try:
        return decoder.decode(_categorical(law, 256), int(np.prod(shape))).astype(np.uint8).reshape(shape)
    except AssertionError:  # no encoder gives such bytes
        return np.zeros(shape, np.uint8)


class _Undetermined(Exception):  # noqa: N818 - nothing is wrong: a file was cut
    """The bytes at hand leave open what comes next."""


class _PrefixReader:
    """Reads symbols as far as they do not depend on what may have followed the first bits of `data`."""

    def __init__(self, data: bytes, num_bits: int):
        kept = int.from_bytes(data) >> (8 * len(data) - num_bits)
        lowest = kept << (-num_bits % 8)
        highest = lowest | ((1 << (-num_bits % 8)) - 1)
        paddings = ((lowest, b"\0"), (highest, b"\xff"))
        self._decoders = [
            stream.queue.RangeDecoder(_to_words(value.to_bytes(-(-num_bits // 8)), byte)) for value, byte in paddings
        ]

    def read(self, symbol_model: stream.model.Model) -> int:
        try:
            lowest, highest = (decoder.decode(symbol_model) for decoder in self._decoders)
        except AssertionError as error:  # no encoder gives such bytes
            raise _Undetermined from error
        if lowest != highest:
            raise _Undetermined
        return int(lowest)


def _to_words(data: bytes, padding: bytes) -> np.ndarray:
    """As words of 32 bits, with more of them than a decoder looks ahead."""
    return np.frombuffer(data + padding * (16 - len(data) % 4), ">u4").astype(np.uint32)


def _to_bytes(encoder: stream.queue.RangeEncoder) -> bytes:
    return encoder.get_compressed().astype(">u4").tobytes()


def _pieces(bits: int) -> list[tuple[int, int]]:
    """(shift, width) of the pieces in which so many bits are coded, the highest first."""
    starts = range(0, bits, _MANTISSA_BITS)
    return [(start, min(_MANTISSA_BITS, bits - start)) for start in reversed(starts)]


@functools.cache
def _uniform(width: int) -> stream.model.Uniform:
    return stream.model.Uniform(1 << width)


def _categorical(law: Sequence[int], size: int) -> stream.model.Categorical:
    """Probabilities of 0 ... size - 1 in proportion to `law`; what it does not name gets the least that there is.

    Whole numbers of which the sum is exact in float64, so that all machines make the same model of them.
    """
    probabilities = np.zeros(size)
    probabilities[: len(law)] = law
    return stream.model.Categorical(probabilities, perfect=False)
