"""The loop detector: does a scene come back to what it showed seconds ago?

For each lag L the similarity of frames L apart is S(L) = 1 - mean |x[t] - x[t-L]|^2 / (2 variance), the autocorrelation
of frames averaged down to 8 x 8. A loop is a peak of S that is as high as S between neighbouring frames.

What moves periodically comes back by right: an object that crosses a torus or goes round in an orbit shows S near 1 at
every multiple of its own period. So a loop counts only where the scene's own motion does not explain it: a film that
starts anew with every chunk has a period that is not its object's. A scene that does not move has no loop.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from longvid.metrics.images import shrink
from longvid.metrics.temporal import Moment

FloatArray = NDArray[np.float64]

MIN_LAG_S = 1.0
MAX_LAG_S = 30.0
LOOP = 0.98
"""Similarity, relative to that of neighbours, from which a return is a loop."""
_AS_GOOD = 0.01
_CELLS = 8
_STATIC_LEVELS = 1.0
"""A scene whose cells vary less than this (root mean square) shows no motion that could loop."""


@dataclass(frozen=True)
class Return:
    """The lag at which a scene comes back best, with its similarity and that of neighbouring frames (1: identical)."""

    lag_frames: int
    similarity: float
    neighbour_similarity: float

    @property
    def relative(self) -> float:
        """Similarity over that of neighbouring frames."""
        return self.similarity / self.neighbour_similarity if self.neighbour_similarity > 0 else 0.0

    def is_loop(self, period_frames: float | None) -> bool:
        """Whether this is a loop in a scene whose own motion has that period (None: it has none)."""
        if self.relative < LOOP:
            return False
        if period_frames is None:
            return True
        off = abs(self.lag_frames - period_frames * max(1, round(self.lag_frames / period_frames)))
        return off > max(2.0, 0.05 * period_frames)  # the period is read from pixels


class LoopDetector:
    """Finds the best return in each section. Memory holds `MAX_LAG_S` of 8 x 8 frames."""

    def __init__(self, fps: float) -> None:
        self._min_lag, max_lag = max(2, round(MIN_LAG_S * fps)), max(4, round(MAX_LAG_S * fps))
        self._recent: deque[FloatArray] = deque(maxlen=max_lag)
        self._section: int | None = None
        self._returns: dict[int, Return] = {}
        self._begin()

    def push(self, moment: Moment) -> None:
        if moment.section != self._section:
            self._end()
            self._section = moment.section
        cells = _cells(moment.image)
        if self._recent:
            past = np.stack(self._recent)[::-1]  # past[L - 1] is the frame L ago
            self._distances[: len(past)] += np.square(past - cells).sum(axis=1)
            self._counts[: len(past)] += 1
        self._recent.append(cells)
        self._sum += cells
        self._squares += float(cells @ cells)
        self._frames += 1

    def value(self) -> dict[int, Return]:
        """The best return of each section that moves, lasts and comes back at all."""
        self._end()
        return dict(self._returns)

    def _begin(self) -> None:
        lags = self._recent.maxlen or 0
        self._recent.clear()
        self._distances, self._counts = np.zeros(lags), np.zeros(lags)
        self._sum, self._squares, self._frames = np.zeros(_CELLS * _CELLS * 3), 0.0, 0

    def _end(self) -> None:
        if self._section is not None and self._frames > 1:
            found = self._best_return()
            if found:
                self._returns[self._section] = found
        self._section = None
        self._begin()

    def _best_return(self) -> Return | None:
        mean = self._sum / self._frames
        variance = self._squares / self._frames - float(mean @ mean)
        if variance < _STATIC_LEVELS**2 * mean.size:
            return None
        # A lag seen by fewer pairs than it has frames would compare one moment, not a recurrence.
        lags = int(np.count_nonzero(self._counts >= self._min_lag))
        similarity = 1 - self._distances[:lags] / np.maximum(self._counts[:lags], 1) / (2 * variance)
        inner = similarity[1:-1]
        is_peak = (inner >= similarity[:-2]) & (inner >= similarity[2:])
        peaks = 1 + np.flatnonzero(is_peak)
        peaks = peaks[peaks + 1 >= self._min_lag]
        if not len(peaks):
            return None
        # A period comes back at its multiples, too: the first of those that are as good is the period.
        best = int(peaks[similarity[peaks] >= similarity[peaks].max() - _AS_GOOD][0])
        return Return(best + 1, float(similarity[best]), float(similarity[0]))


def _cells(image: NDArray[np.uint8]) -> FloatArray:
    """A frame as 8 x 8 mean colours, float64 [192]."""
    image = shrink(image, 4 * _CELLS)  # fast on large frames, where cells need not be exact to the pixel
    height, width = image.shape[:2]
    rows, columns = (np.arange(_CELLS) * size // _CELLS for size in (height, width))
    total = np.add.reduceat(np.add.reduceat(image, rows, axis=0, dtype=np.float64), columns, axis=1)
    areas = np.diff(np.append(rows, height))[:, None] * np.diff(np.append(columns, width))
    return np.asarray((total / areas[:, :, None]).ravel())
