"""Whether a scene's subject and background stay what they were: consistency from frame to frame, drift over time.

Of the drawn world no network is needed for this: the subject is cut out by its matte, and its colour, size, speed and
path are measured. Shapes: T frames, H rows, W columns, K side of a cut-out, C = 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longvid.metrics.matte import FloatArray, Matte, fit_ground
from longvid.metrics.track import centres, read_motion

CUT_OUT = 17
"""Pixels that a cut-out reaches from the subject's middle, of 64 a side: a large triangle with a rounded edge."""
GREY = 128.0
ALONG = {"left": 0, "right": 0, "up": 1, "down": 1}
"""The axis of a straight motion."""
STEADINESS = ("size", "colour", "speed", "path")
"""What is followed: percent of the root of the area, levels, percent, and pixels of 64 a side."""


@dataclass(frozen=True)
class State:
    """What some frames show of the subject: root of its area in pixels, RGB, speed in pixels a frame, its line."""

    frames: int
    size: float
    colour_C: FloatArray
    speed: float
    line: FloatArray
    """Pixels: where it stands across its motion; for one without a direction, where its middle is."""


class _Consistency:
    """VBench's formula: of each frame but the first, the mean cosine similarity to the first and to the one before.

    Its features are of networks; these are pixels.
    """

    def __init__(self) -> None:
        self._first: FloatArray | None = None
        self._last: FloatArray | None = None
        self._total, self._count = 0.0, 0

    def push(self, features_TF: FloatArray) -> None:
        norms = np.maximum(np.linalg.norm(features_TF, axis=1, keepdims=True), 1e-6)
        unit = features_TF.astype(np.float64) / norms
        if self._first is None or self._last is None:
            self._first, self._last = unit[0], unit[0]
            unit_after, before = unit[1:], unit[:-1]
        else:
            unit_after, before = unit, np.concatenate([self._last[None], unit[:-1]])
        alike = np.maximum(unit_after @ self._first, 0) + np.maximum((unit_after * before).sum(axis=1), 0)
        self._total += float(alike.sum()) / 2
        self._count += len(unit_after)
        self._last = unit[-1]

    def value(self) -> float:
        return self._total / max(1, self._count)


@dataclass
class SubjectMeter:
    """Follows the subject of a scene, clip by clip, and keeps a few numbers of each.

    `motion` is what the prompt says of it. Frames without a subject count as no longer consistent.
    """

    motion: str | None
    states: list[State | None] = field(default_factory=list)
    _subject: _Consistency = field(default_factory=_Consistency)
    _ground: _Consistency = field(default_factory=_Consistency)
    _bends: list[float] = field(default_factory=list)

    def push(self, frames_THWC: NDArray[np.uint8], matte: Matte | None) -> None:
        """Take the next clip, and its matte if there is a subject."""
        ground_HC = fit_ground(frames_THWC) - GREY
        self._ground.push(np.broadcast_to(ground_HC.ravel(), (len(frames_THWC), ground_HC.size)))
        if matte is None:
            self.states.append(None)
            self._subject.push(np.zeros((len(frames_THWC), 3 * (2 * CUT_OUT + 1) ** 2), np.float32))
            return
        middle = centres(matte.cover_THW)
        self._subject.push(cut_outs(frames_THWC, matte, middle))
        seen = np.isfinite(middle[:, 0])
        self.states.append(_state(matte, middle, seen, self.motion) if seen.any() else None)
        if seen.sum() > 2:
            steps = (np.diff(middle[seen], axis=0) + 0.5) % 1.0 - 0.5
            bends = np.hypot(*np.diff(steps, axis=0).T) * frames_THWC.shape[1]
            self._bends += bends.tolist()

    def value(self) -> dict[str, Any] | None:
        """Consistency, smoothness, drift and wander; None for less than two clips with a subject."""
        known = [state for state in self.states if state is not None]
        if len(known) < 2:
            return None
        quarter = max(1, len(known) // 4)
        return {
            "subject_consistency": self._subject.value(),
            "background_consistency": self._ground.value(),
            "jolt": float(np.mean(self._bends)),
            "drift": _departure(known[:quarter], [known[-quarter:]]),
            "wander": _departure(known[:quarter], [[state] for state in known[quarter:]]),
        }


def cut_outs(frames_THWC: NDArray[np.uint8], matte: Matte, middle_T2: FloatArray) -> FloatArray:
    """The subject around its middle, float32 [T, K · K · C], by how much it is brighter than grey; 0 elsewhere.

    Between pixels they are interpolated, so that a subject that moves by half of one stays as it is.
    """
    side = frames_THWC.shape[1]
    place = np.nan_to_num(middle_T2) * side - 0.5
    whole = np.floor(place).astype(int)
    x_rest, y_rest = ((place - whole)[:, i, None, None, None] for i in (0, 1))
    reach = np.arange(-CUT_OUT, CUT_OUT + 2)
    x, y = ((whole[:, i, None] + reach) % side for i in (0, 1))
    at = np.arange(len(frames_THWC))[:, None, None], y[:, :, None], x[:, None, :]
    pixels = (frames_THWC[at].astype(np.float32) - GREY) * matte.cover_THW[at][..., None]
    pixels = (1 - x_rest) * pixels[:, :, :-1] + x_rest * pixels[:, :, 1:]
    pixels = (1 - y_rest) * pixels[:, :-1] + y_rest * pixels[:, 1:]
    return np.asarray(pixels.reshape(len(pixels), -1), np.float32)


def _state(matte: Matte, middle_T2: FloatArray, seen: NDArray[np.bool_], motion: str | None) -> State:
    side = matte.cover_THW.shape[1]
    turns = np.exp(2j * np.pi * middle_T2[seen].astype(np.float64)).mean(axis=0)
    place = np.asarray(np.angle(turns) / (2 * np.pi) % 1.0 * side, np.float32)
    axis = ALONG.get(motion or "")
    return State(
        frames=len(middle_T2),
        size=float(np.sqrt(matte.cover_THW.sum(axis=(1, 2))[seen]).mean()),
        colour_C=np.nanmean(matte.colour_T3[seen], axis=0),
        speed=read_motion(middle_T2).speed * side,
        line=place if axis is None else place[[1 - axis]],
    )


def _departure(first: Sequence[State], others: Sequence[Sequence[State]], side: int = 64) -> dict[str, float | None]:
    """How far later states lie from the first ones, by mean; of an object at rest without speed."""
    start = _mean(first)
    found: dict[str, list[float]] = {name: [] for name in STEADINESS}
    for later in map(_mean, others):
        found["size"].append(100 * abs(later.size / start.size - 1))
        found["colour"].append(float(np.abs(later.colour_C - start.colour_C).mean()))
        if start.speed > 0.5:
            found["speed"].append(100 * abs(later.speed / start.speed - 1))
        found["path"].append(float(np.abs((later.line - start.line + side / 2) % side - side / 2).mean()))
    return {name: float(np.mean(values)) if values else None for name, values in found.items()}


def _mean(states: Sequence[State], side: int = 64) -> State:
    turns = np.exp(2j * np.pi * np.stack([state.line for state in states]) / side).mean(axis=0)
    return State(
        frames=sum(state.frames for state in states),
        size=float(np.mean([state.size for state in states])),
        colour_C=np.mean([state.colour_C for state in states], axis=0),
        speed=float(np.mean([state.speed for state in states])),
        line=np.asarray(np.angle(turns) / (2 * np.pi) % 1.0 * side, np.float32),
    )
