"""Many compressed images in one file, which share a header; each decodes by itself.

    1 byte    magic           0xDA
    1         version         as in a file of one image (bitstream.py)
    3         number          of images, N
    2         stream          of the first image; each of the others has the next
    2         CRC-16          of the entries
    3         key             as in a file of one image
    N entries                 size of the body, 7 bits a byte with the lowest first, and its CRC-16
    N bodies                  as in files of one image

An archive that is cut off holds the images before the cut, and a coarse version of the one at the cut.
"""

import binascii
import struct
from collections.abc import Sequence

from diffusion_tf.compression.bitstream import (
    HEADER_BYTES,
    NUM_STREAMS,
    Header,
    check_body,
    check_start,
    key_of,
    unpack,
    version_byte,
    version_of,
)
from diffusion_tf.errors import InputError

EXTENSION = ".dtfa"
MAGIC = 0xDA
MAX_IMAGES = 2**24 - 1
_FIELDS = struct.Struct(">BBBHHH")
_CRC = struct.Struct(">H")
_MAX_SIZE_BYTES = 4  # of an entry's size: bodies have at most 2^24 bytes


def pack_archive(files: Sequence[bytes], digest: bytes) -> bytes:
    """The archive of files with consecutive streams that were made with one table.

    Args:
      files: whole files of one image each.
      digest: of their table.

    Raises:
      InputError: there are too many files.
    """
    if len(files) > MAX_IMAGES:
        raise InputError(f"an archive holds at most {MAX_IMAGES:,} images, not {len(files):,}")
    first, _ = unpack(files[0], "files[0]")
    bodies = [file[HEADER_BYTES:] for file in files]
    entries = b"".join(_size_bytes(len(body)) + _CRC.pack(binascii.crc_hqx(body, 0)) for body in bodies)
    fields = _FIELDS.pack(
        MAGIC, version_byte(first.chunk_bits), len(files) >> 16, len(files) & 0xFFFF, first.stream,
        binascii.crc_hqx(entries, 0),
    )  # fmt: skip
    return fields + key_of(fields, digest) + entries + b"".join(bodies)


def unpack_archive(data: bytes, name: str) -> list[tuple[Header, bytes]]:
    """The headers and bodies of an archive's images; those beyond a cut have no body.

    Raises:
      InputError: `data` is not an archive, is damaged, or is cut off before its first image. The message quotes `name`.
    """
    check_start(data, MAGIC, name)
    _, version, high, low, stream, crc = _FIELDS.unpack_from(data)
    sizes, checksums, start = [], [], HEADER_BYTES
    for _ in range(high << 16 | low):
        size, start = _read_size(data, start, name)
        sizes.append(size)
        checksums.append(int.from_bytes(data[start : start + _CRC.size]))
        start += _CRC.size
    if start > len(data):
        raise InputError(f"{name} is cut off inside its table of images")
    if binascii.crc_hqx(data[HEADER_BYTES:start], 0) != crc or len(data) > start + sum(sizes):
        raise InputError(f"{name} is damaged: its contents do not match their checksum")
    images = []
    for i, (size, checksum) in enumerate(zip(sizes, checksums, strict=True)):
        body = data[start : start + size]
        header = Header(
            *version_of(version), (stream + i) % NUM_STREAMS, size, data[_FIELDS.size : HEADER_BYTES],
            data[: _FIELDS.size],
        )  # fmt: skip
        check_body(header, body, binascii.crc_hqx(body, 0) == checksum, f"image {i} of {name}")
        images.append((header, body))
        start += size
    return images


def _size_bytes(size: int) -> bytes:
    """A number, 7 bits a byte with the lowest first; the eighth bit says that another byte follows."""
    data = bytearray()
    while size >= 128:
        data.append(size & 127 | 128)
        size >>= 7
    return bytes([*data, size])


def _read_size(data: bytes, start: int, name: str) -> tuple[int, int]:
    """The number that starts there, and where the next thing starts."""
    size = 0
    for i, byte in enumerate(data[start : start + _MAX_SIZE_BYTES]):
        size |= (byte & 127) << 7 * i
        if byte < 128:
            return size, start + i + 1
    raise InputError(f"{name} is cut off or damaged inside its table of images")
