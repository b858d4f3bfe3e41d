"""The bytes of a compressed image: a header, the steps of the reverse process, and a residual if it is lossless.

    4 bytes   magic           b"DTFC"
    1         version         1
    8         digest          of the table (tables.py), which identifies the weights and holds the coarse schedule
    1         chunk_bits      selects one of the run's tables
    2, 2, 1   image shape     H, W, C
    4         stream          of the shared random numbers
    4, 4      sizes           of the steps, and of the whole body
    4         CRC-32          of the body
    4         CRC-32          of the bytes so far

Integers are big-endian. The steps are one range-coded stream. Each step holds its number of chunks, which is its KL in
units of chunk_bits rounded up, and an index for each chunk, as a number of bits and the bits. How to parse the stream
depends only on the values read so far and on the table's integers, never on the network: differences in float
arithmetic between machines change pixels, but not the parse.

A file can be cut anywhere without step lengths: any continuation of the remaining bytes lies between 0x00... and
0xff..., so the symbols on which these two continuations agree are certain. Any prefix beyond the header is a valid
shorter file that holds its whole steps; the checksum of the body is checked for whole files only.
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
INDEX_LENGTHS = 61  # index + 1 has 0 ... 60 bits after its first
_WORD_BITS = 16  # bits of an index that are coded at once

# The chunk indices of each step.
Steps = list[list[int]]


@dataclasses.dataclass(frozen=True)
class Header:
    """A file's header, as the module describes it; sizes in bytes."""

    digest: bytes
    chunk_bits: int
    image_shape: tuple[int, int, int]
    stream: int
    steps_size: int
    body_size: int
    body_crc: int


def pack(header: Header, body: bytes) -> bytes:
    """The contents of a file."""
    fields = _FIELDS.pack(
        MAGIC, VERSION, header.digest, header.chunk_bits, *header.image_shape, header.stream,
        header.steps_size, header.body_size, header.body_crc,
    )  # fmt: skip
    return fields + _CRC.pack(zlib.crc32(fields)) + body


def unpack(data: bytes, name: str) -> tuple[Header, bytes]:
    """The header of a file, and as much of the body as it holds.

    Raises:
      InputError: `data` is not a compressed image, of a later version, damaged, or cut off inside its header. The
        message quotes `name`.
    """
    if data[:4] != MAGIC[: len(data)] or not data:
        raise InputError(f"{name} is not a compressed image of diffusion_tf")
    if len(data) < HEADER_BYTES:
        raise InputError(f"{name} is cut off inside its header: {len(data)} of {HEADER_BYTES} bytes")
    if zlib.crc32(data[: _FIELDS.size]) != _CRC.unpack_from(data, _FIELDS.size)[0]:
        # The header of a later version may differ, but its version is in the same place.
        later = f", or has version {data[4]}, which this program does not read" if data[4] != VERSION else ""
        raise InputError(f"{name} is damaged{later}: its header does not match its checksum")
    _, version, digest, chunk_bits, height, width, channels, *rest = _FIELDS.unpack_from(data)
    if version != VERSION:
        raise InputError(f"{name} has version {version}, but this program reads {VERSION}: update it")
    header = Header(digest, chunk_bits, (height, width, channels), *rest)
    body = data[HEADER_BYTES:]
    whole = len(body) >= header.body_size
    if len(body) > header.body_size or (whole and zlib.crc32(body) != header.body_crc):
        raise InputError(f"{name} is damaged: its contents do not match their checksum")
    return header, body


class StepModel:
    """The entropy model of a step: probabilities of the number of chunks and of each index.

    Args:
      chunks: integers proportional to the probabilities of 0, 1, ... chunks; larger numbers get the least probability.
      indices: the same for the number of bits of index + 1 after its first.
      max_chunks: the largest possible number of chunks.
    """

    def __init__(self, chunks: Sequence[int], indices: Sequence[int], max_chunks: int):
        self._chunks = _categorical(chunks[: max_chunks + 1], max_chunks + 1)
        self._indices = _categorical(indices, INDEX_LENGTHS)

    def encode(self, encoder: stream.queue.RangeEncoder, indices: Sequence[int]) -> None:
        """Appends the chunk indices of a step."""
        encoder.encode(len(indices), self._chunks)
        for index in indices:
            bits = (index + 1).bit_length() - 1
            encoder.encode(bits, self._indices)
            for shift, width in _words_of(bits):
                encoder.encode(((index + 1) >> shift) & ((1 << width) - 1), _uniform(width))

    def decode(self, reader: "_PrefixReader") -> list[int]:
        """Reads the chunk indices of the next step."""
        return [self._decode_index(reader) for _ in range(reader.read(self._chunks))]

    def _decode_index(self, reader: "_PrefixReader") -> int:
        bits = reader.read(self._indices)
        value = 1
        for _, width in _words_of(bits):
            value = (value << width) | reader.read(_uniform(width))
        return value - 1


def encode_steps(models: Sequence[StepModel], steps: Steps) -> bytes:
    """The shortest bytes that hold `steps`."""
    encoder = stream.queue.RangeEncoder()
    for model, indices in zip(models, steps, strict=True):
        model.encode(encoder, indices)
    encoder.encode(1 << 15, _uniform(16))  # the middle of all continuations, which the fewest bits identify
    data = _to_bytes(encoder)
    return data[: -(-prefix_bits(models, data, len(steps))[-1] // 8)]


def decode_steps(models: Sequence[StepModel], data: bytes, num_bits: int | None = None) -> Steps:
    """The whole steps in a prefix of what `encode_steps` gives: `data`, or its first `num_bits` bits."""
    reader = _PrefixReader(data, 8 * len(data) if num_bits is None else num_bits)
    steps: Steps = []
    try:
        for model in models:
            steps.append(model.decode(reader))
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
    probabilities = np.zeros(size)
    probabilities[: len(frequencies)] = frequencies
    return stream.model.Categorical(probabilities, perfect=False)
