"""The same images as JPEG, WebP, AVIF, JPEG XL and PNG, each image a file."""

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from diffusion_tf.data.pictures import encode_picture

with contextlib.suppress(ImportError):
    import pillow_jxl  # noqa: F401  # importing it adds JPEG XL to Pillow

_QUALITIES = (1, 5, 10, 20, 30, 50, 75, 90, 95)


def other_formats(images: np.ndarray) -> list[dict[str, Any]]:
    """Sizes and RMSE on [0, 255] of images uint8 [N, H, W, C] in other formats, as far as Pillow writes them here.

    `payload_bits_per_dim` leaves out what a black image of the same size takes with the same settings: headers, and
    tables that do not depend on the image.
    """
    rows = []
    for name, options in _settings():
        header_bytes = len(encode_picture(np.zeros_like(images[0]), name, **options))
        files = [encode_picture(image, name, **options) for image in images]
        squares = [
            np.square(_decoded(file, image.shape) - image).mean() for file, image in zip(files, images, strict=True)
        ]
        mean_bytes = float(np.mean([len(file) for file in files]))
        rows.append(
            {
                "format": name,
                **options,
                "bits_per_dim": 8 * mean_bytes / images[0].size,
                "payload_bits_per_dim": 8 * (mean_bytes - header_bytes) / images[0].size,
                "rmse": float(np.sqrt(np.mean(squares))),
            }
        )
    return rows


def _settings() -> Iterator[tuple[str, dict[str, Any]]]:
    """Format and options of each row."""
    Image.init()
    for name in ("JPEG", "WEBP", "AVIF", "JXL"):
        if name in Image.SAVE:
            yield from ((name, {"quality": quality}) for quality in _QUALITIES)
    yield "WEBP", {"lossless": True, "quality": 100}
    if "JXL" in Image.SAVE:
        yield "JXL", {"lossless": True}
    yield "PNG", {"optimize": True}


def _decoded(data: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """The pixels of a file, float64 of `shape`."""
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture.convert("L" if shape[-1] == 1 else "RGB"), float).reshape(shape)
