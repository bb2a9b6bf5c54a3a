"""Sizes of images: averaging down by whole factors."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def shrink(frames: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Average frames [..., H, W, 3] over squares, by the largest whole factor that leaves at least `side` pixels."""
    return box_average(frames, max(1, min(frames.shape[-3:-1]) // side))


def box_average(frames: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    """Average frames [..., H, W, 3] over squares of `factor` pixels; rows and columns left over at the end are cut."""
    if factor == 1:
        return frames
    *lead, height, width, channels = frames.shape
    rows, columns = height // factor, width // factor
    even = frames[..., : rows * factor, : columns * factor, :]
    # Rows first: that sum runs over contiguous memory.
    total = even.reshape(*lead, rows, factor, columns * factor * channels).sum(axis=-2, dtype=np.uint32)
    total = total.reshape(*lead, rows, columns, factor, channels).sum(axis=-2)
    return np.asarray((total + factor * factor // 2) // (factor * factor), np.uint8)
