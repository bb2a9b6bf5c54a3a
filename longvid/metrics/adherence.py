"""Adherence: what a clip of the drawn world shows, read from its pixels, and whether that is what its prompt says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from longvid.metrics.images import shrink
from longvid.metrics.matte import FloatArray, Matte, count_pieces, find_object, sample
from longvid.metrics.shapes import fit_shapes
from longvid.metrics.track import Motion, centres, read_motion
from longvid.training import world

MIN_IOU = 0.6
"""Best overlap with a drawn shape under which an object has none."""
_WORKING_SIDE = 64
"""Frames are averaged down to between this and twice this side before they are read."""
_SHAPE_FRAMES = 16
"""Frames that vote on the shape; it is the costliest to read."""
_Vote = tuple[str | None, float]


@dataclass(frozen=True)
class Reading:
    """What a clip shows. An attribute that cannot be read is None.

    `shares` holds for each attribute the share of frames that agree. `count` is the number of pieces that the object is
    in: 1, or it is not there (0) or broken. `motion_track` holds speed and turn.
    """

    colour: str | None
    background: str | None
    shape: str | None
    size: str | None
    motion: str | None
    count: int
    shares: Mapping[str, float]
    motion_track: Motion


def read_clip(frames: NDArray[np.uint8]) -> Reading:
    """Read a clip of one scene, uint8 [T, side, side, 3], of at least 3 frames, at any side of at least 32."""
    assert frames.ndim == 4 and len(frames) >= 3 and frames.shape[1] == frames.shape[2], frames.shape
    frames = shrink(frames, _WORKING_SIDE)
    return read_matte(frames, find_object(frames))


def read_matte(frames: NDArray[np.uint8], matte: Matte | None) -> Reading:
    """Read a clip whose object was told from its background."""
    votes = {"background": _vote(_backgrounds(frames))}
    if matte is None:
        motion = Motion(None, 0.0, 0.0, 0.0)
        votes |= dict.fromkeys(("colour", "shape", "size"), (None, 0.0))
        count = 0
    else:
        middle = centres(matte.cover_THW)
        motion = read_motion(middle)
        count = Counter(count_pieces(sample(matte.cover_THW, 12)).tolist()).most_common(1)[0][0]
        votes["colour"] = _vote(_nearest_colours(matte.colour_T3))
        votes["shape"], votes["size"] = _shape_and_size(matte, middle)
    votes["motion"] = (motion.name, motion.share)
    read = {name: votes[name][0] for name in world.ATTRIBUTES}
    return Reading(**read, count=count, shares={name: votes[name][1] for name in votes}, motion_track=motion)


def expected(prompt: str) -> dict[str, str]:
    """The attributes that a prompt names, with their values."""
    return world.read_caption(prompt)


def score(reading: Reading, wanted: Mapping[str, str]) -> dict[str, bool]:
    """For each attribute wanted, whether the reading has it; and `ok`, whether it has all."""
    matches = {name: getattr(reading, name) == value for name, value in wanted.items()}
    return {**matches, "ok": all(matches.values())}


# ------------------------------------------------------------------------------------------------- colours and shapes


def _backgrounds(frames: NDArray[np.uint8]) -> list[str]:
    """The background of each frame: the one, plain or shaded, that is nearest to the median pixel of its border."""
    height, width = frames.shape[1:3]
    y, x = np.mgrid[:height, :width]
    at_border = (y < 2) | (y >= height - 2) | (x < 2) | (x >= width - 2)
    rows = y[at_border][::3]
    border = frames[:, at_border][:, ::3].astype(np.int16)
    names, ramps = _drawn_backgrounds(height)
    distances = [np.median(np.abs(border - ramp[rows]).sum(-1), axis=1) for ramp in ramps]
    return [names[i] for i in np.argmin(distances, axis=0)]


@lru_cache(maxsize=8)
def _drawn_backgrounds(side: int) -> tuple[list[str], list[NDArray[np.int16]]]:
    """Names and rows [side, 3] of all backgrounds, plain and shaded, as the world draws them."""
    names, ramps = [], []
    centre = world.Track((0.5, 0.5), np.zeros((1, 2), np.float32))
    for name in world.BACKGROUNDS:
        for shaded in (False, True):
            look = world.Look(name, name, "circle", "small", "still", shaded)
            image = world.draw([look], np.ones((1, 1), np.float32), centre, side)[0]
            names.append(name)
            ramps.append(image[:, 0].astype(np.int16))
    return names, ramps


def _nearest_colours(colour_T3: FloatArray) -> list[str | None]:
    palette = np.array(list(world.PALETTE.values()), np.float32)
    distances = np.square(colour_T3[:, None] - palette).sum(-1)
    return [None if np.isnan(row[0]) else world.COLOURS[row.argmin()] for row in distances]


def _shape_and_size(matte: Matte, centres_T2: FloatArray) -> tuple[_Vote, _Vote]:
    frames = sample(np.flatnonzero(np.isfinite(centres_T2[:, 0])), _SHAPE_FRAMES)
    overlaps, radii = fit_shapes(matte.cover_THW[frames], centres_T2[frames])
    shape = _vote(world.SHAPES[row.argmax()] if row.max() >= MIN_IOU else None for row in overlaps)
    if shape[0] is None:
        return shape, (None, 0.0)
    names = list(world.SIZES)
    steps = np.log(radii[:, world.SHAPES.index(shape[0]), None] / np.array(list(world.SIZES.values())))
    return shape, _vote([names[i] for i in np.abs(steps).argmin(axis=1)])


def _vote(names: Iterable[str | None]) -> _Vote:
    counts = Counter(names)
    name, votes = counts.most_common(1)[0]
    return name, votes / counts.total()
