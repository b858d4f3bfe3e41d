"""Reads the tensors of PyTorch's .pth files from untrusted sources, without unpickling them.

Such a file holds a pickle, which says where in which storage a tensor lies, and the storages: as members of a zip
archive, or in a row after the pickle, as PyTorch wrote before version 1.6. A pickle is a program. Of its opcodes this
interprets those of a dictionary of tensors, as data: it imports nothing and calls nothing that the file names.
"""

import io
import math
import os
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from diffusion_tf.errors import DamagedFileError, quoted
from diffusion_tf.storage.files import Arrays, first_line, read_file

ZIP_MAGIC = b"PK\x03\x04"
# The pickle of a number, with which files before version 1.6 begin.
LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
_MAX_PICKLE_BYTES = 2**20  # Inception's 470 tensors take 2**17
_DTYPES = {
    "torch BoolStorage": "bool", "torch ByteStorage": "uint8", "torch CharStorage": "int8",
    "torch ShortStorage": "int16", "torch IntStorage": "int32", "torch LongStorage": "int64",
    "torch HalfStorage": "float16", "torch BFloat16Storage": "bfloat16", "torch FloatStorage": "float32",
    "torch DoubleStorage": "float64",
}  # fmt: skip
_ORDERED_DICT, _TENSOR = "collections OrderedDict", "torch._utils _rebuild_tensor_v2"


class _Global(NamedTuple):
    """A name that a pickle would import."""

    name: str


class _Storage(NamedTuple):
    """A storage of `size` numbers."""

    key: str
    dtype: str
    size: int


class _Tensor(NamedTuple):
    """Where in its storage a tensor lies: offset and strides count numbers."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_torch(path: str) -> Arrays:
    """Returns the tensors of a file that `torch.save` wrote of a dictionary of tensors, such as a `state_dict`.

    Takes the memory of the file twice.

    Raises:
      InputError: the file cannot be read, or is larger than 1 GiB.
      DamagedFileError: the file is damaged, or holds anything but a dictionary of tensors.
    """
    data = read_file(path)
    try:
        if data.startswith(ZIP_MAGIC):
            tensors, storages = _read_zip(data)
        elif data.startswith(LEGACY_MAGIC):
            tensors, storages = _read_legacy(data)
        else:
            raise ValueError("it begins as neither a zip archive nor a pickle of PyTorch")
        return {name: _array(tensor, storages) for name, tensor in tensors.items()}
    except Exception as error:  # a damaged pickle or archive raises a dozen types
        raise DamagedFileError(
            f"{path} is not a PyTorch file of tensors alone, or is damaged ({first_line(error)})"
        ) from error


def _read_zip(data: bytes) -> tuple[dict[str, _Tensor], dict[str, bytes]]:
    """The tensors of an archive, and its storages by their keys."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {member.filename: member for member in archive.infolist()}
        # PyTorch does not compress: a member that unpacks to more than it takes is hostile.
        if any(member.compress_type != zipfile.ZIP_STORED for member in members.values()):
            raise ValueError("its members are compressed")
        if sum(member.file_size for member in members.values()) > len(data):
            raise ValueError("its members overlap")
        (pickle,) = (name for name in members if os.path.basename(name) == "data.pkl")
        folder = pickle.removesuffix("data.pkl")
        if f"{folder}byteorder" in members and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("its numbers are not little-endian")
        tensors = _tensors(_interpret(io.BytesIO(archive.read(pickle))))
        keys = {tensor.storage.key for tensor in tensors.values()}
        return tensors, {key: archive.read(f"{folder}data/{key}") for key in keys}


def _read_legacy(data: bytes) -> tuple[dict[str, _Tensor], dict[str, bytes]]:
    """The tensors of a file from before version 1.6, and its storages by their keys."""
    stream = io.BytesIO(data)
    _, _, system, pickled, keys = (_interpret(stream) for _ in range(5))
    if system["little_endian"] is not True:
        raise ValueError("its numbers are not little-endian")
    tensors = _tensors(pickled)
    itemsizes = {tensor.storage.key: tf.as_dtype(tensor.storage.dtype).size for tensor in tensors.values()}
    storages = {}
    for key in keys:
        size = int.from_bytes(stream.read(8), "little")
        storages[key] = stream.read(size * itemsizes[key])
    return tensors, storages


def _tensors(pickled: Any) -> dict[str, _Tensor]:
    """Checks that an interpreted pickle is a dictionary of tensors, and returns it."""
    if not isinstance(pickled, dict):
        raise ValueError("it holds no dictionary")
    for name, value in pickled.items():
        if not name.isprintable() or not isinstance(value, _Tensor):
            raise ValueError(f"its entry {quoted(name)} is no tensor")
    return pickled


def _array(tensor: _Tensor, storages: Mapping[str, bytes]) -> np.ndarray:
    """The array of a tensor, which is a view of its storage."""
    dtype = tf.as_dtype(tensor.storage.dtype).as_numpy_dtype
    flat = np.frombuffer(storages[tensor.storage.key], dtype)
    offset, shape, strides = tensor.offset, tensor.shape, tensor.strides
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if any(type(number) is not int or number < 0 for number in (offset, *shape, *strides)):
        raise ValueError("a tensor has no shape")
    if len(flat) != tensor.storage.size or math.prod(shape) > len(flat) or (0 not in shape and last >= len(flat)):
        raise ValueError("a tensor lies outside its storage")
    steps = [stride * flat.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(flat[offset:], shape, steps, writeable=False)


def _interpret(stream: io.BytesIO) -> Any:
    """Reads the next pickle of a stream; returns its value, in which a tensor is a `_Tensor`."""
    start = stream.tell()
    pickle = io.BytesIO(stream.read(_MAX_PICKLE_BYTES))
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    operations: Iterator[tuple[Any, Any, Any]] = pickletools.genops(pickle)

    def pop_marked() -> list[Any]:
        first = marks.pop()
        items = stack[first:]
        del stack[first:]
        return items

    for opcode, argument, _ in operations:
        match opcode.name:
            case "PROTO":
                pass
            case "STOP":
                stream.seek(start + pickle.tell())
                return stack.pop()
            case "MARK":
                marks.append(len(stack))
            case "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1":
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                stack.append({"EMPTY_DICT": {}, "EMPTY_LIST": [], "EMPTY_TUPLE": ()}[opcode.name])
            case "TUPLE":
                stack.append(tuple(pop_marked()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(opcode.name[-1])
                stack[-size:] = [tuple(stack[-size:])]
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "APPEND" | "APPENDS":
                items = pop_marked() if opcode.name == "APPENDS" else [stack.pop()]
                stack[-1].extend(items)
            case "SETITEM" | "SETITEMS":
                items = pop_marked() if opcode.name == "SETITEMS" else [stack.pop(-2), stack.pop()]
                if not all(isinstance(name, str) for name in items[::2]):
                    raise ValueError("a name in it is no text")
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "GLOBAL":
                stack.append(_known(argument))
            case "BINPERSID":
                stack.append(_storage(*stack.pop()))
            case "REDUCE":
                arguments = stack.pop()
                stack.append(_call(stack.pop(), *arguments))
            case "BUILD":  # attributes of an OrderedDict: PyTorch's versions of layers
                if not isinstance(stack.pop(), dict) or not isinstance(stack[-1], dict):
                    raise ValueError("it sets attributes of an object")
            case _:
                raise ValueError(f"its pickle has the opcode {opcode.name}, which tensors do not need")
    raise ValueError("its pickle has no end")


def _known(name: str) -> _Global:
    if name not in (*_DTYPES, _ORDERED_DICT, _TENSOR):
        raise ValueError(f"it names {quoted(name.replace(' ', '.'))}, which is no part of a tensor")
    return _Global(name)


def _storage(kind: str, dtype: _Global, key: str, _device: str, size: int, view: None = None) -> _Storage:
    """The storage that a persistent id names."""
    if kind != "storage" or not isinstance(key, str) or view is not None:
        raise ValueError("it refers to something that is no storage")
    return _Storage(key, _DTYPES[dtype.name], size)


def _call(function: _Global, *arguments: Any) -> Any:
    """What a call of one of two known functions stands for."""
    if function.name == _ORDERED_DICT and not arguments:
        return {}
    if function.name == _TENSOR:
        storage, offset, shape, strides = arguments[:4]
        if isinstance(storage, _Storage):
            return _Tensor(storage, offset, shape, strides)
    raise ValueError("it calls something that is no tensor")
