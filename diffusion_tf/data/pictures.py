"""Pictures that other programs wrote, as uint8 [H, W, C]: the one place where files are decoded and encoded.

The first frame of a picture is turned upright as its EXIF data says, and converted:

- Grey becomes colour by repeating it, and colour becomes grey by its luma (0.299 R + 0.587 G + 0.114 B).
- Transparent parts show white, unless the array has an alpha channel.
- 16-bit grey is scaled by 255/65535; of 16-bit colour, Pillow keeps the upper bytes.
- Palettes are looked up. CMYK is converted by Pillow's formula; colour profiles are ignored.

A mode without a defined white (LAB, floating point, integers that are not 8 or 16 bits) is refused, and so is a picture
of more than MAX_PIXELS pixels, before its pixels take memory.
"""

import contextlib
import functools
import io
import os
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps

from diffusion_tf.errors import ConfigError, InputError
from diffusion_tf.storage.files import MAX_BYTES, first_line, is_local, read_file

MAX_PIXELS = 2**26  # of a picture; decoding that many takes up to 1 GB of memory
# Without code to interpret, as PostScript has, and with a signature by which they are recognised.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
_ARRAY_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's mode of an array with so many channels
_MODES_8_BITS = frozenset(("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"))
_MODES_16_BITS = frozenset(("I;16", "I;16B", "I;16L", "I;16N"))
_stderr_lock = threading.Lock()


@functools.cache
def extensions() -> tuple[str, ...]:
    """The extensions of picture files, lower-case with their dots, sorted."""
    return tuple(sorted(key for key, name in PIL.Image.registered_extensions().items() if name in _FORMATS))


def read_bytes(path: str) -> bytes:
    """Returns the bytes of a file.

    Python reads local files, since TensorFlow takes only names in UTF-8.

    Raises:
      InputError: the file cannot be read; the message is the reason alone.
    """
    if not is_local(path):
        return read_file(path)
    if not os.path.isfile(path):  # opening a pipe would wait forever
        missing = "it is a link to nothing" if os.path.islink(path) else "it does not exist"
        raise InputError("it is not a file" if os.path.exists(path) else missing)
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size > MAX_BYTES:
                raise InputError(f"it holds more than {MAX_BYTES:,} bytes")
            return file.read()  # with a limit, Python would allocate all of it
    except OSError as error:
        raise InputError(error.strerror or type(error).__name__) from error


def decode_picture(encoded: bytes, channels: int, size: tuple[int, int] | None = None) -> np.ndarray:
    """Decodes a picture as the module's description says.

    Args:
      encoded: the contents of its file.
      channels: channels of the array: 1 is grey, 3 is RGB, 4 is RGB and alpha.
      size: the (width, height) that the upright picture must have; default: any.

    Returns:
      uint8 [H, W, channels].

    Raises:
      ConfigError: there are no pictures of so many channels.
      InputError: the picture is damaged, too large, of another size or of a mode that is refused; the message is the
        reason alone.
    """
    if channels not in _ARRAY_MODES:
        raise ConfigError("channels", f"={channels}: pictures have 1, 3 or 4")
    try:
        with warnings.catch_warnings(action="ignore"):  # the error says what is wrong
            pixels = np.asarray(_decode(encoded, _ARRAY_MODES[channels], size))
    except InputError:
        raise
    except PIL.UnidentifiedImageError as error:
        other = f"it is none of {', '.join(_open_formats())}, or its header is damaged"
        raise InputError(other if encoded else "it is empty") from error
    except PIL.Image.DecompressionBombError as error:
        raise InputError(f"it has more than {MAX_PIXELS:,} pixels") from error
    except Exception as error:  # Pillow raises a dozen types
        raise InputError(f"it is damaged: {first_line(error)}") from error
    return pixels[..., None] if pixels.ndim == 2 else pixels


def convert_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """Converts an image uint8 [H, W, C] as the module's description says: uint8 [H, W, channels].

    Raises:
      ConfigError: there are no pictures of C or of `channels` channels.
    """
    if image.shape[2] == channels:
        return image
    if not {channels, image.shape[2]} <= _ARRAY_MODES.keys():
        raise ConfigError("channels", f"={channels}: images of {image.shape[2]} channels keep them")
    picture = PIL.Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    return np.asarray(_convert(picture, _ARRAY_MODES[channels])).reshape(*image.shape[:2], channels)


def _decode(encoded: bytes, mode: str, size: tuple[int, int] | None) -> PIL.Image.Image:
    """The upright picture in one of the modes L, RGB and RGBA."""
    is_tiff = encoded.startswith((b"II", b"MM"))
    with (
        _quiet_stderr() if is_tiff else contextlib.nullcontext(),
        PIL.Image.open(io.BytesIO(encoded), formats=_open_formats()) as picture,
    ):
        _check_size(picture, size)
        _check_samples(picture)
        if picture.format == "PNG":
            with PIL.Image.open(io.BytesIO(encoded), formats=["PNG"]) as file:
                file.verify()  # the checksums, which decoding skips
            _scale_transparency(picture, encoded[24])
        picture.load()
        with contextlib.suppress(Exception):  # unreadable EXIF data does not say how to turn the picture
            PIL.ImageOps.exif_transpose(picture, in_place=True)
        if size and picture.size != size:
            raise InputError(_other_size(picture, size))
        return _convert(picture, mode)


@functools.cache
def _open_formats() -> list[str]:
    """The formats that this build of Pillow reads."""
    PIL.Image.init()
    return [name for name in _FORMATS if name in PIL.Image.OPEN]


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Discards what is written to the file descriptor of stderr: libtiff complains there besides failing."""
    with _stderr_lock, open(os.devnull, "wb") as nowhere:
        stderr = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def _check_size(picture: PIL.Image.Image, size: tuple[int, int] | None) -> None:
    """Refuses a picture by the size in its header; a picture that is still to be turned may have width for height."""
    width, height = picture.size
    if size and sorted(size) != sorted(picture.size):
        raise InputError(_other_size(picture, size))
    if width * height > MAX_PIXELS:
        raise InputError(f"it has {width} x {height} pixels, and may have {MAX_PIXELS:,} in all")


def _other_size(picture: PIL.Image.Image, size: tuple[int, int]) -> str:
    return "its size is {} x {} pixels, and must be {} x {} (width x height)".format(*picture.size, *size)


def _check_samples(picture: PIL.Image.Image) -> None:
    """Refuses a picture whose samples have no defined black and white."""
    mode = picture.mode
    # A PGM of 16 bits is "I". Its samples are scaled to 16 bits, and those of JPEG 2000 too.
    if mode not in _MODES_8_BITS | _MODES_16_BITS and (mode, picture.format) not in (("I", "PPM"), ("I", "PNG")):
        raise InputError(f"its mode is {mode}, of which black and white are not known: save it as RGB or grey")
    if picture.format == "TIFF":
        tags = picture.tag_v2  # type: ignore[attr-defined]
        bits, black_is_zero, kinds = tags.get(258, (1,)), tags.get(262) != 0, tags.get(339, (1,))
        # Pillow reads signed bytes as unsigned ones, and does not scale 12 bits or invert 16.
        if set(kinds) != {1} or (mode in _MODES_16_BITS and not (bits == (16,) and black_is_zero)):
            raise InputError("it is a TIFF of signed, 12-bit or inverted 16-bit samples: save it as RGB or grey")


def _scale_transparency(picture: PIL.Image.Image, bits: int) -> None:
    """Scales the transparent level of a grey PNG to 8 bits, as Pillow scales the samples but not the level."""
    if "transparency" in picture.info and picture.mode == "RGB" and bits == 16:
        raise InputError("it is a PNG of 16-bit samples with one transparent colour: save it with an alpha channel")
    if "transparency" in picture.info and picture.mode == "L":
        picture.info["transparency"] *= 255 // (2**bits - 1)


def _convert(picture: PIL.Image.Image, mode: str) -> PIL.Image.Image:
    """A picture whose samples were checked, in one of the modes L, RGB and RGBA."""
    if picture.mode not in _MODES_8_BITS:
        picture = _eight_bits(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        if mode != "RGBA":
            white = PIL.Image.new("RGBA", picture.size, "white")
            picture = PIL.Image.alpha_composite(white, picture)
    elif picture.mode not in ("1", "L"):  # not every mode converts to every other one
        picture = picture if picture.mode == "RGB" else picture.convert("RGB")
    return picture if picture.mode == mode else picture.convert(mode)


def _eight_bits(picture: PIL.Image.Image) -> PIL.Image.Image:
    """A picture of 16-bit grey in mode L, or LA if one of its levels is transparent."""
    wide = np.asarray(picture).astype(np.uint32)
    grey = PIL.Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    if "transparency" in picture.info:
        grey.putalpha(PIL.Image.fromarray((wide != picture.info["transparency"]).astype(np.uint8) * 255))
    return grey


def encode_picture(image: np.ndarray, name: str, **options: Any) -> bytes:
    """An image uint8 [H, W, C] in a format that Pillow writes, with that format's options."""
    buffer = io.BytesIO()
    # Pillow has no axis for a single channel.
    PIL.Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(buffer, name, **options)
    return buffer.getvalue()
