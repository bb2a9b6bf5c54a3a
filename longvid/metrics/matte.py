"""The matte: which pixels of a clip show its object, told from the background by colour.

Shapes: T frames, H rows, W columns, C = 3 (RGB, 0 to 255). The drawn world is a torus, so neighbours wrap around edges.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]
AnyScalar = TypeVar("AnyScalar", bound=np.generic)

MIN_CONTRAST = 24.0
"""Least distance in RGB between an object and its background; no two of the drawn world are nearer than 70."""
_SMALL_SHARE = 0.01
"""Share of a frame that even the core of the smallest shape exceeds."""
_SPREAD = 2
"""Pixels outside the half-covered contour in which a blurred edge ends."""


@dataclass(frozen=True)
class Matte:
    """The object of a clip: its share of each pixel, float32 [T, H, W], and its colour, float32 [T, 3].

    A frame without the object has a share of 0 everywhere and a colour of nan.
    """

    cover_THW: FloatArray
    colour_T3: FloatArray


def find_object(frames_THWC: NDArray[np.uint8]) -> Matte | None:
    """Separate the object from a plain or shaded background; None where nothing stands out from it."""
    ground_HC = fit_ground(frames_THWC)
    difference = frames_THWC - ground_HC[:, None]
    distance2 = np.einsum("thwc,thwc->thw", difference, difference)
    contrast2 = np.quantile(sample(distance2), 1 - _SMALL_SHARE)
    if contrast2 < MIN_CONTRAST**2:
        return None
    colour = np.median(frames_THWC[distance2 > 0.64 * contrast2].astype(np.float32), axis=0)
    # Projected on the line from background to object, so that a shaded background does not tilt the edges.
    toward_HC = colour - ground_HC
    toward_HC /= np.maximum(np.einsum("hc,hc->h", toward_HC, toward_HC), MIN_CONTRAST**2)[:, None]
    cover = np.einsum("thwc,hc->thw", difference, toward_HC)
    mask = cover > 0.5
    # Far from the object, noise clipped at zero would add up to an area of its own.
    cover = np.where(grow(mask, _SPREAD), np.clip(cover, 0, 1), 0)
    return Matte(cover, _mean_colours(frames_THWC, mask))


def fit_ground(frames_THWC: NDArray[np.uint8]) -> FloatArray:
    """The background as one colour a row, float32 [H, C], linear from top to bottom.

    Medians of rows, then of slopes: right as long as the object covers less than half of most rows.
    """
    height = frames_THWC.shape[1]
    pixels = sample(frames_THWC).swapaxes(0, 1).reshape(height, -1, 3).astype(np.float32)
    rows = np.median(pixels, axis=1)
    half = height // 2
    slope = np.median(rows[half : 2 * half] - rows[:half], axis=0) / half
    place = np.arange(height)[:, None]
    return np.asarray(np.median(rows - slope * place, axis=0) + slope * place, np.float32)


def sample(frames: NDArray[AnyScalar], count: int = 8) -> NDArray[AnyScalar]:
    """At most `count` frames, evenly spread."""
    chosen: NDArray[AnyScalar] = frames[np.linspace(0, len(frames) - 1, min(count, len(frames))).astype(int)]
    return chosen


def grow(mask_THW: BoolArray, pixels: int) -> BoolArray:
    """Add the pixels within a distance (the larger of rows and columns)."""
    for axis in (1, 2):
        reach = [np.roll(mask_THW, shift, axis) for shift in range(-pixels, pixels + 1)]
        mask_THW = np.logical_or.reduce(reach)
    return mask_THW


def count_pieces(cover_THW: FloatArray) -> NDArray[np.int64]:
    """Number of separate pieces in each frame, int64 [T]; pieces under a tenth of the largest do not count."""
    even = cover_THW[:, : cover_THW.shape[1] // 2 * 2, : cover_THW.shape[2] // 2 * 2]
    coarse = even[:, ::2, ::2] + even[:, 1::2, ::2] + even[:, ::2, 1::2] + even[:, 1::2, 1::2]  # a quarter of the work
    labels = np.where(coarse > 2, np.arange(1, coarse[0].size + 1).reshape(coarse[0].shape), 0)
    while True:  # each pixel takes the largest label around it, until every piece has one
        spread = labels
        for axis in (1, 2):
            spread = np.maximum(spread, np.maximum(np.roll(spread, 1, axis), np.roll(spread, -1, axis)))
        spread = np.where(labels > 0, spread, 0)
        if np.array_equal(spread, labels):
            break
        labels = spread
    areas = [np.unique(frame[frame > 0], return_counts=True)[1] for frame in labels]
    return np.array([np.count_nonzero(area > 0.1 * area.max()) if len(area) else 0 for area in areas])


def _mean_colours(frames_THWC: NDArray[np.uint8], mask_THW: BoolArray) -> FloatArray:
    core = mask_THW & ~grow(~mask_THW, 1)
    core |= mask_THW & ~core.any(axis=(1, 2), keepdims=True)  # where nothing is left of it, take all of the object
    total = np.einsum("thwc,thw->tc", frames_THWC, core, dtype=np.float32, casting="unsafe")
    count = core.sum(axis=(1, 2), dtype=np.float32)[:, None]
    return np.asarray(np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0), np.float32)
