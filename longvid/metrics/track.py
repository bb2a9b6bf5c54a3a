"""The track of an object on the torus, and the motion that it shows.

Lengths are shares of the image side, and y grows downwards.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]

STILL_SPEED = 0.006
"""Sides a frame; the slowest motion of the drawn world has 0.014."""
ORBIT_TURN = 0.03
"""Radians a frame; the slowest orbit of the drawn world turns by 0.058, straight motions by none."""
_LAG = 4
"""Frames over which velocity is taken: one latent, so that motion that comes latent by latent reads as steady."""
_LEAST_SHARE = 0.5
_NAMES = np.array(["right", "down", "left", "up"])


@dataclass(frozen=True)
class Motion:
    """A motion: its name or None, the share of frames that agree, sides a frame, radians a frame."""

    name: str | None
    share: float
    speed: float
    turn: float

    @property
    def period_frames(self) -> float | None:
        """Frames after which the motion comes back to where it was; None for an object at rest."""
        if self.name == "orbit":
            return float(2 * np.pi / abs(self.turn))
        return 1 / self.speed if self.name not in (None, "still") else None


def centres(cover_THW: FloatArray) -> FloatArray:
    """Centre of the object in each frame, float32 [T, 2] (x, y) in [0, 1); nan where there is none.

    The mean on a circle: the angle of the sum of cover times exp(2 pi i position).
    """
    found = []
    for axis, size in ((1, cover_THW.shape[2]), (2, cover_THW.shape[1])):
        phase = np.exp(2j * np.pi * (np.arange(size) + 0.5) / size)
        total = cover_THW.sum(axis=axis) @ phase
        found.append(np.where(np.abs(total) > 0, np.angle(total) / (2 * np.pi) % 1.0, np.nan))
    return np.stack(found, axis=1).astype(np.float32)


def read_motion(centres_T2: FloatArray) -> Motion:
    """The motion of a track; frames without the object are bridged, unless they are the most."""
    seen = np.flatnonzero(np.isfinite(centres_T2[:, 0]))
    if len(seen) < max(3, len(centres_T2) / 2):
        return Motion(None, 0.0, 0.0, 0.0)
    velocity = _velocity(centres_T2, seen)
    speeds = np.abs(velocity)
    speed = float(np.median(speeds))
    if speed < STILL_SPEED:
        return Motion("still", float(np.mean(speeds < STILL_SPEED)), speed, 0.0)
    lag = min(_LAG, len(velocity) - 1)
    turns = velocity[lag:] * velocity[: len(velocity) - lag].conj()
    turn = float(np.angle(turns.sum())) / lag
    steady = float(np.mean(np.angle(turns) / lag * np.sign(turn) > ORBIT_TURN / 2))
    if abs(turn) > ORBIT_TURN and steady > _LEAST_SHARE:
        return Motion("orbit", steady, speed, turn)
    quarters = np.round(np.angle(velocity) / (np.pi / 2)).astype(int) % 4
    counts = np.bincount(quarters[speeds >= STILL_SPEED], minlength=4)
    share = float(counts.max() / len(velocity))
    return Motion(str(_NAMES[counts.argmax()]) if share > _LEAST_SHARE else None, share, speed, turn)


def _velocity(centres_T2: FloatArray, seen: NDArray[np.int64]) -> NDArray[np.complex128]:
    """Velocity over a few frames each, as x + iy."""
    places = centres_T2[seen].astype(np.float64)
    steps = (np.diff(places, axis=0) + 0.5) % 1.0 - 0.5
    track = np.concatenate([places[:1], places[0] + np.cumsum(steps, axis=0)])
    frames = np.arange(seen[0], seen[-1] + 1)
    x, y = (np.interp(frames, seen, track[:, i]) for i in (0, 1))
    lag = min(_LAG, len(frames) // 2)
    path = x + 1j * y
    return np.asarray((path[lag:] - path[:-lag]) / lag)
