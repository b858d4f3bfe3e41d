"""Reads JSON of a stated type, and writes it."""

import json
import math
from typing import Any

import msgspec

from diffusion_tf.errors import DamagedFileError
from diffusion_tf.storage.files import first_line, listed, read_file, write_file

MAX_JSON_BYTES = 2**26  # Python's objects take up to twenty times as much
_MAX_FLOAT, _MAX_INT = 1e39, 2**63  # in JSON of this program; no float32 is larger


def read_json(path: str, schema: Any = None, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Returns the value in a JSON file.

    Args:
      path: the file.
      schema: for a file that this program writes, the type of its value: a TypedDict, say; further keys are allowed.
      max_bytes: the largest size of the file.

    Raises:
      InputError: the file cannot be read, or is larger than `max_bytes`.
      DamagedFileError: the file is not JSON, or its value is not of that type.
    """
    return parse_json(read_file(path, max_bytes), schema, path)


def parse_json(text: bytes | str, schema: Any, place: str) -> Any:
    """Returns the value in JSON text from `place`, a file or a line of one; `schema` as for `read_json`.

    Raises:
      DamagedFileError: the text is not JSON, or its value is not of that type.
    """
    # What others write may hold NaN and numbers of any size.
    limits: dict[str, Any] = (
        {} if schema is None else {"parse_float": _float, "parse_constant": _float, "parse_int": _int}
    )
    try:
        value = json.loads(text, **limits)
        if schema is not None:
            msgspec.convert(value, schema)
    except msgspec.ValidationError as error:
        there = f"; there are: {listed(value)}" if isinstance(value, dict) else ""
        raise DamagedFileError(f"{place} is damaged, or not of this program ({error}{there})") from error
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{place} is not JSON, or is damaged ({first_line(error)})") from error
    return value


def _float(text: str) -> float:
    if not abs(number := float(text)) < _MAX_FLOAT:
        raise ValueError(f"the number {text[:20]} is too large, or not finite")
    return number


def _int(text: str) -> int:
    if not abs(number := int(text)) < _MAX_INT:
        raise ValueError(f"the number {text[:20]}... is too large")
    return number


def write_json(path: str, value: Any) -> None:
    """Writes a value as an indented JSON file."""
    write_file(path, (to_json(value, indent=2) + "\n").encode())


def to_json(value: Any, indent: int | None = None) -> str:
    """Returns a value as JSON text; NaN and infinity become null, since JSON has no word for them."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    """Replaces NaN and infinity in nested dicts and lists by None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
