"""What compressed images take and show at each step, as a record, and the same images as other formats have them."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from diffusion_tf.compression.bitstream import HEADER_BYTES
from diffusion_tf.compression.image_files import Measured

_QUALITIES = (1, 10, 30, 50, 75, 90, 100)  # of JPEG and WebP


def step_rows(measured: Sequence[Measured], timesteps: Sequence[int], num_dims: int) -> list[dict[str, float]]:
    """Means over images after each step; rates in bits/dim, for files with header and whole bytes too."""
    bits, kl, mse = (np.mean([getattr(m, name) for m in measured], axis=0) for name in ("bits", "kl_bits", "mse"))
    file_bits = 8 * (HEADER_BYTES + np.mean([np.ceil(m.bits / 8) for m in measured], axis=0))
    return [
        {
            "reverse_process_time": timesteps[0] + 1 - t,
            "kl_bits_per_dim": float(kl[step]) / num_dims,
            "steps_bits_per_dim": float(bits[step]) / num_dims,
            "file_bits_per_dim": float(file_bits[step]) / num_dims,
            "distortion_rmse": float(np.sqrt(mse[step])),
        }
        for step, t in enumerate(timesteps)
    ]


def other_formats(images: np.ndarray) -> list[dict[str, Any]]:
    """Bits/dim and RMSE on [0, 255] of images uint8 [N, H, W, C] as Pillow writes them, one file each."""
    settings = [(name, {"quality": quality}) for name in ("JPEG", "WEBP") for quality in _QUALITIES]
    settings += [("WEBP", {"lossless": True, "quality": 100}), ("PNG", {"optimize": True})]
    rows = []
    for name, options in settings:
        sizes, squares = [], []
        for image in images:
            data = encode_picture(image, name, **options)
            sizes.append(len(data))
            with Image.open(io.BytesIO(data)) as picture:
                decoded = np.asarray(picture.convert("L" if image.shape[-1] == 1 else "RGB"), float)
            squares.append(np.square(decoded.reshape(image.shape) - image).mean())
        bits = 8 * float(np.mean(sizes)) / images[0].size
        rows.append({"format": name, **options, "bits_per_dim": bits, "rmse": float(np.sqrt(np.mean(squares)))})
    return rows


def encode_picture(image: np.ndarray, name: str, **options) -> bytes:
    """An image uint8 [H, W, C] in a format of Pillow's, which knows no axis of one channel."""
    buffer = io.BytesIO()
    Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(buffer, name, **options)
    return buffer.getvalue()
