"""Reads safetensors files from untrusted sources: the header first, then the arrays.

A safetensors file holds the length of its header (8 bytes, little-endian), the header (JSON: name, dtype, shape and
offsets of each array, and free metadata) and the arrays. It never holds code.
"""

import dataclasses
import json
import math
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401 (gives NumPy the name bfloat16)
import numpy as np
import safetensors

from diffusion_tf.errors import DamagedFileError, InputError
from diffusion_tf.storage import gfile
from diffusion_tf.storage.files import Arrays, first_line, read_file

MAX_HEADER_BYTES = 2**24  # a network of a thousand variables needs 2**19
_PICKLES = (b"PK\x03\x04", b"\x80")  # a zip archive, as torch.save writes, or a pickle of protocol 2 or newer
_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
}  # fmt: skip


class ArraySpec(NamedTuple):
    """The dtype, by its NumPy name, and the shape of an array."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Header:
    """The header of a safetensors file.

    Attributes:
      specs: dtype and shape of each array, by name.
      metadata: the free metadata.
      file_bytes: bytes of the file.
    """

    specs: dict[str, ArraySpec]
    metadata: dict[str, Any]
    file_bytes: int

    @property
    def array_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(spec.num_bytes for spec in self.specs.values())


def read_header(path: str, kind: str = "safetensors file") -> Header:
    """Reads the header of a safetensors file, after checking that its length fits the file.

    Args:
      path: the file.
      kind: what error messages call the file.

    Raises:
      InputError: the file cannot be read.
      DamagedFileError: the file is not a safetensors file, or its size is not what its header states.
    """
    try:
        file_bytes = gfile.size(path)
        with gfile.open_binary(path, "rb") as file:
            prefix = file.read(8)
            header_bytes = int.from_bytes(prefix, "little")
            if not header_bytes <= min(MAX_HEADER_BYTES, file_bytes - 8):
                is_pickle = prefix.startswith(_PICKLES)
                raise ValueError("it is a pickle, which may run code" if is_pickle else "its header does not fit")
            specs, metadata = _parse(file.read(header_bytes))
        header = Header(specs, metadata, file_bytes)
        stated_bytes = 8 + header_bytes + header.array_bytes
        if stated_bytes != file_bytes:
            raise ValueError(f"it has {file_bytes:,} bytes, and its header states {stated_bytes:,}")
    except gfile.file_errors() as error:
        raise InputError(f"cannot read {path} ({first_line(error)})") from error
    except ValueError as error:
        raise DamagedFileError(f"{path} is not a {kind}, or is damaged ({first_line(error)})") from error
    return header


def read_arrays(path: str, header: Header, kind: str = "safetensors file") -> Arrays:
    """Reads all arrays of a safetensors file.

    Args:
      path: the file.
      header: what `read_header` returned for it, which bounds the memory that is taken.
      kind: what error messages call the file.

    Raises:
      InputError: the file cannot be read.
      DamagedFileError: the file does not hold the arrays that its header states.
    """
    data = read_file(path, header.file_bytes)
    try:
        # safetensors.numpy.load does not know bfloat16.
        return {name: _array(header.specs[name], view["data"]) for name, view in safetensors.deserialize(data)}
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise DamagedFileError(f"{path} is not a {kind}, or is damaged ({first_line(error)})") from error


def _array(spec: ArraySpec, data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.dtype(spec.dtype)).reshape(spec.shape)


def _parse(text: bytes) -> tuple[dict[str, ArraySpec], dict[str, Any]]:
    """Returns the specs and the metadata in the JSON text of a header."""
    try:
        entries = json.loads(text)
        metadata = dict(entries.pop("__metadata__", {}))
        specs = {name: _spec(name, entry) for name, entry in entries.items()}
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise ValueError("its header does not describe arrays") from error
    return specs, metadata


def _spec(name: str, entry: dict[str, Any]) -> ArraySpec:
    shape = tuple(entry["shape"])
    if not name.isprintable() or not all(type(size) is int for size in shape):  # names are quoted in one-line errors
        raise ValueError
    return ArraySpec(_DTYPES[entry["dtype"]], shape)
