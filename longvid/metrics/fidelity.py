"""Fidelity to a reference film: PSNR, and SSIM as in Wang et al., "Image Quality Assessment", 2004. Frame by frame."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
Image = NDArray[np.uint8]

IDENTICAL_DB = 100.0
"""PSNR of identical films, which is infinite, so that it can be written as a number."""
WINDOW = 11
SIGMA = 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


class Fidelity:
    """Compares frames with their references, uint8 [H, W, 3] each, of at least 11 x 11 pixels."""

    def __init__(self) -> None:
        self.num_frames = 0
        self._squares, self._ssim = 0.0, 0.0

    def push(self, image: Image, reference: Image) -> None:
        """Compare one frame."""
        assert image.shape == reference.shape, (image.shape, reference.shape)
        self.num_frames += 1
        self._squares += float(np.square(image.astype(np.float32) - reference).mean(dtype=np.float64))
        self._ssim += ssim(_luma(image), _luma(reference))

    def psnr(self) -> float:
        """Peak signal to noise ratio of the mean squared error over all frames, in dB, at most `IDENTICAL_DB`."""
        error = self._squares / self.num_frames
        return min(IDENTICAL_DB, 10 * math.log10(255**2 / error)) if error else IDENTICAL_DB

    def ssim(self) -> float:
        """Structural similarity of luma, the mean over frames, at most 1."""
        return self._ssim / self.num_frames


def ssim(x: FloatArray, y: FloatArray) -> float:
    """Mean structural similarity (equation 13) of two images [H, W] from 0 to 255, where the whole window fits.

    As its authors ask, images of more than 256 pixels a side are averaged down first.
    """
    factor = max(1, round(min(x.shape) / 256))
    # Moved to the middle, float32 is enough: variances are differences of squares, and do not change with the origin.
    x, y = _average(x, factor) - 128, _average(y, factor) - 128
    mean_x, mean_y = _window(x), _window(y)
    var_x, var_y = _window(x * x) - mean_x**2, _window(y * y) - mean_y**2
    covariance = _window(x * y) - mean_x * mean_y
    mean_x, mean_y = mean_x + 128, mean_y + 128
    above = (2 * mean_x * mean_y + _C1) * (2 * covariance + _C2)
    below = (mean_x**2 + mean_y**2 + _C1) * (var_x + var_y + _C2)
    return float(np.mean(above / below, dtype=np.float64))


def _window(image: FloatArray) -> FloatArray:
    """Gaussian mean around every pixel, as two products with banded matrices."""
    height, width = image.shape
    return np.asarray(_bands(height) @ image @ _bands(width).T, np.float32)


@lru_cache(maxsize=8)
def _bands(size: int) -> FloatArray:
    """[size - 10, size]: each row is the window at one place."""
    assert size >= WINDOW, f"SSIM needs {WINDOW} pixels a side, got {size}"
    window = np.exp(-np.square(np.arange(WINDOW) - WINDOW // 2) / (2 * SIGMA**2))
    bands = np.zeros((size - WINDOW + 1, size), np.float32)
    for row in range(len(bands)):
        bands[row, row : row + WINDOW] = window / window.sum()
    return bands


def _luma(image: Image) -> FloatArray:
    return np.asarray(image @ np.array([0.2126, 0.7152, 0.0722], np.float32), np.float32)


def _average(image: FloatArray, factor: int) -> FloatArray:
    rows, columns = image.shape[0] // factor, image.shape[1] // factor
    even = image[: rows * factor, : columns * factor]
    return np.asarray(even.reshape(rows, factor, columns, factor).mean(axis=(1, 3)), np.float32)
