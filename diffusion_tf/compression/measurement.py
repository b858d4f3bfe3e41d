"""Rate and distortion of compressed images at each step, and of the same images in other formats."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from diffusion_tf import figures
from diffusion_tf.compression.bitstream import HEADER_BYTES
from diffusion_tf.compression.image_files import CompressedImage, RateDistortion
from diffusion_tf.compression.other_formats import other_formats

_SHOWN_IMAGES = 8
_SHOWN_BYTES = (20, 30, 60, 120, 250, 500, 1000, 2000, 4000)


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
        others = [{**row, **equal_rmse(rows, row["rmse"])} for row in other_formats(images)]
        return {"header_bytes": HEADER_BYTES, "table": rows, "other_formats": others}

    def picture(self, images: np.ndarray, subject: str) -> bytes:
        """A PNG of the first images, decoded from the first bytes of their files; `subject` is for its caption."""
        file_bytes = np.array([_file_bytes(curve) for curve in self._curves[:_SHOWN_IMAGES]])
        limits = [limit for limit in _SHOWN_BYTES if file_bytes[:, 1].min() <= limit < file_bytes[:, -1].mean()]
        steps = [np.searchsorted(sizes, [*limits, np.inf], side="right") - 1 for sizes in file_bytes]
        return figures.labelled_grid(
            [np.concatenate([self._shown[i][step], images[i : i + 1]]) for i, step in enumerate(steps)],
            row_labels=[str(i) for i in range(len(self._shown))],
            column_labels=[*(f"{limit} B" for limit in limits), f"{file_bytes[:, -1].mean():.0f} B", "image"],
            caption=f"{subject}: decoded from the first bytes of a file, the last ones from whole files",
        )


def equal_rmse(rows: Sequence[dict[str, float]], rmse: float) -> dict[str, float]:
    """What our files take for this RMSE on [0, 255], interpolated between `step_rows`; empty if they do not reach it.

    Keys are as in `other_formats`, after `our_`: with the header in whole bytes, and the steps alone.
    """
    distortions = [row["distortion_rmse"] for row in reversed(rows)]
    if not distortions[0] <= rmse <= distortions[-1]:
        return {}
    columns = {"our_bits_per_dim": "file_bits_per_dim", "our_payload_bits_per_dim": "steps_bits_per_dim"}
    return {
        name: float(np.interp(rmse, distortions, [row[column] for row in reversed(rows)]))
        for name, column in columns.items()
    }


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


def _file_bytes(curve: RateDistortion) -> np.ndarray:
    """Size of the image's file after each step, in bytes."""
    return HEADER_BYTES + np.ceil(curve.bits / 8)
