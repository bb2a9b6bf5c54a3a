"""Noise levels for training windows: what the queue shows the model, and what makes it robust.

A window is [left context | own latents | right context]. ``u`` is the unshifted level, 1 pure
noise and 0 clean; one step of a schedule of T steps lowers u by 1/T. Pure, numpy only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

STEP_COUNTS = (6, 8, 8, 8, 12, 20)


@dataclass(frozen=True)
class Span:
    """How a window of latents divides: context, own, context."""

    left: int
    own: int
    right: int

    @property
    def num_latents(self) -> int:
        return self.left + self.own + self.right


def shift_levels(u: NDArray[np.float64], shift: float) -> NDArray[np.float64]:
    """Flow-match sigma of an unshifted level: more of the schedule at high noise."""
    return shift * u / (1 + (shift - 1) * u)


def draw_levels(rng: np.random.Generator, batch: int, span: Span) -> NDArray[np.float64]:
    """Unshifted levels [batch, latents]: mostly staircases, the rest uniform, clean prefix or independent."""
    kinds = rng.choice(4, batch, p=(0.6, 0.2, 0.1, 0.1))
    own = rng.random((batch, 1))
    step = 1 / rng.choice(STEP_COUNTS, (batch, 1))
    # Some staircases start at pure noise, where the queue decides what it will show.
    own = np.where((kinds[:, None] == 0) & (rng.random((batch, 1)) < 0.1), 1.0, own)
    fresher = rng.random((batch, 1)) < 0.7
    left = np.where(kinds[:, None] == 0, np.where(fresher, np.maximum(own - step, 0), own), own)
    left = np.where(kinds[:, None] == 2, 0.0, left)
    right = np.where(kinds[:, None] == 0, np.minimum(own + step, 1), own)
    u = np.repeat(np.concatenate([left, own, right], axis=1), [span.left, span.own, span.right], axis=1)
    return np.where(kinds[:, None] == 3, rng.random(u.shape), u)
