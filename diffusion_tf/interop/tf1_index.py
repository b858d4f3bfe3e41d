"""Checks the index of a TF1 checkpoint, since TensorFlow ends the process where an entry of it is not as it expects.

An index is a table of LevelDB, without compression: blocks of entries, each followed by its type (0) and a checksum, a
block that lists the blocks, and a footer of 48 bytes that says where that one is.
"""

from collections.abc import Iterator

from tensorflow.core.framework import types_pb2
from tensorflow.core.protobuf.tensor_bundle_pb2 import BundleEntryProto, BundleHeaderProto

from diffusion_tf.storage.files import read_file

_FOOTER_BYTES = 48
_MAGIC = 0xDB4775248B80FB57
_MAX_BYTES = 2**24  # a network of a thousand variables, with moments, needs 2**18


def check_index(path: str) -> None:
    """Checks that each entry of the index at `path` describes a tensor.

    Raises:
      InputError: the file cannot be read, or is larger than an index.
      Exception: the file is not an index; protobuf's own DecodeError has no public name.
    """
    data = read_file(path, _MAX_BYTES)
    for offset, size in find_blocks(data):
        for key, entry in _entries(data, offset, size):
            _check_entry(key, entry)


def find_blocks(data: bytes) -> list[tuple[int, int]]:
    """Returns the offset and size of each block of entries; raises ValueError or IndexError if `data` is no index."""
    footer = data[-_FOOTER_BYTES:]
    if len(data) < _FOOTER_BYTES or int.from_bytes(footer[-8:], "little") != _MAGIC:
        raise ValueError("bad magic number")
    _, place = _handle(footer, 0)
    (offset, size), _ = _handle(footer, place)
    return [_handle(value, 0)[0] for _, value in _entries(data, offset, size)]


def _check_entry(key: bytes, value: bytes) -> None:
    key.decode()  # the name of a variable
    if not key:
        BundleHeaderProto.FromString(value)
        return
    entry = BundleEntryProto.FromString(value)
    sizes = [dim.size for dim in entry.shape.dim]
    if entry.dtype not in types_pb2.DataType.values() or entry.slices or min((*sizes, entry.size, entry.offset)) < 0:
        raise ValueError(f"the entry of {key!r} is not that of a tensor")


def _entries(data: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Yields the keys and values of a block; each key begins with a part of the one before it."""
    block = data[offset : offset + size]
    if len(block) < size or data[offset + size] != 0:  # its type
        raise ValueError("a block does not fit")
    num_restarts = int.from_bytes(block[-4:], "little")
    place, key = 0, b""
    while place < size - 4 - 4 * num_restarts:
        shared, place = _varint(block, place)
        rest, place = _varint(block, place)
        length, place = _varint(block, place)
        if shared > len(key) or place + rest + length > size:
            raise ValueError("an entry does not fit")
        key = key[:shared] + block[place : place + rest]
        place += rest + length
        yield key, block[place - length : place]


def _handle(data: bytes, place: int) -> tuple[tuple[int, int], int]:
    """Returns the offset and size of a block, and the place after them."""
    offset, place = _varint(data, place)
    size, place = _varint(data, place)
    return (offset, size), place


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """Returns a number of seven bits in each byte, and the place after it."""
    value = 0
    for shift in range(0, 64, 7):
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise ValueError("a number does not end")
