"""Rate and distortion of compressed images at each step, and of the same images in other formats."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from diffusion_tf import figures
from diffusion_tf.compression.bitstream import HEADER_BYTES
from diffusion_tf.compression.image_files import CompressedImage, RateDistortion
from diffusion_tf.data.pictures import encode_picture

_QUALITIES = (1, 10, 30, 50, 75, 90, 100)  # of JPEG and WebP
_SHOWN_IMAGES = 8
_SHOWN_STEPS = 12


class Measurement:
    """Collects encoded images, and averages their sizes, rates and distortions.

    Args:
      timesteps: the coarse schedule of their table.
    """

    def __init__(self, timesteps: Sequence[int]):
        self._timesteps = timesteps
        self._sizes: list[int] = []
        self._mses: list[float] = []
        self._curves: list[RateDistortion] = []
        self._shown: list[np.ndarray] = []

    def add(self, image: CompressedImage) -> None:
        """Adds one image; keeps the pictures of the first eight only."""
        self._sizes.append(len(image.data))
        self._mses.append(image.mse)
        self._curves.append(image.curve)
        if len(self._shown) < _SHOWN_IMAGES:
            self._shown.append(image.shown)

    @property
    def mean_bytes(self) -> float:
        """Mean size of a file in bytes."""
        return float(np.mean(self._sizes))

    @property
    def rmse(self) -> float:
        """RMSE of the decoded files on [0, 255]."""
        return float(np.sqrt(np.mean(self._mses)))

    def record(self, images: np.ndarray) -> dict[str, Any]:
        """JSON values: means after each step, and other formats, for the images uint8 [N, H, W, C] in order."""
        rows = step_rows(self._curves, self._timesteps, images[0].size)
        return {"header_bytes": HEADER_BYTES, "table": rows, "other_formats": other_formats(images)}

    def picture(self, images: np.ndarray, subject: str) -> bytes:
        """A PNG of the first images, decoded from prefixes of growing size; `subject` names them in the caption."""
        shown = np.unique(np.linspace(0, len(self._timesteps) - 1, _SHOWN_STEPS).round().astype(int))
        file_bytes = np.mean([_file_bytes(curve) for curve in self._curves], axis=0)
        return figures.labelled_grid(
            [np.concatenate([steps[shown], images[i : i + 1]]) for i, steps in enumerate(self._shown)],
            row_labels=[str(i) for i in range(len(self._shown))],
            column_labels=[*(f"{file_bytes[step]:.0f} B" for step in shown), "image"],
            caption=f"{subject}: decoded from a prefix of the file, by its mean size in bytes",
        )


def step_rows(curves: Sequence[RateDistortion], timesteps: Sequence[int], num_dims: int) -> list[dict[str, float]]:
    """Means over images after each step; rates in bits/dim, that of a file with its header and in whole bytes."""
    bits, kl, mse = (np.mean([getattr(curve, name) for curve in curves], axis=0) for name in ("bits", "kl_bits", "mse"))
    file_bytes = np.mean([_file_bytes(curve) for curve in curves], axis=0)
    return [
        {
            "reverse_process_time": timesteps[0] + 1 - t,
            "kl_bits_per_dim": float(kl[step]) / num_dims,
            "steps_bits_per_dim": float(bits[step]) / num_dims,
            "file_bits_per_dim": 8 * float(file_bytes[step]) / num_dims,
            "distortion_rmse": float(np.sqrt(mse[step])),
        }
        for step, t in enumerate(timesteps)
    ]


def other_formats(images: np.ndarray) -> list[dict[str, Any]]:
    """Bits/dim and RMSE on [0, 255] of images uint8 [N, H, W, C] as JPEG, WebP and PNG, one file each."""
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


def _file_bytes(curve: RateDistortion) -> np.ndarray:
    """Size of the image's file after each step, in bytes."""
    return HEADER_BYTES + np.ceil(curve.bits / 8)
