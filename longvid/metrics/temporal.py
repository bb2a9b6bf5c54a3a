"""Steadiness over time: flicker, seams between chunks, drift. Each meter takes frames one by one.

Frames are uint8 [H, W, 3] and belong to a section of the film: a scene, or what is left of it when its transition is
over. Nothing is compared across sections, so a cut is neither flicker nor a seam.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
FloatArray = NDArray[np.float64]

STILL_CHANGE = 0.25
"""Levels of mean change between frames that no eye sees. Sections that change less count as changing this much."""


@dataclass(frozen=True)
class Moment:
    """A frame, its index in the film and its section."""

    index: int
    section: int
    image: Image


class Meter(Protocol):
    """Measures a film frame by frame."""

    def push(self, moment: Moment) -> None:
        """Take the next frame."""

    def value(self) -> Any:
        """The measure of all frames so far; None where they were too few."""


def feed(moments: Iterable[Moment], meters: Collection[Meter]) -> None:
    """Show every frame to every meter."""
    for moment in moments:
        for meter in meters:
            meter.push(moment)


class Flicker:
    """VBench's temporal flickering: (255 - mean |I[t] - I[t-1]|) / 255. 1 is a film that never changes."""

    def __init__(self) -> None:
        self._last: Moment | None = None
        self._total, self._pairs = 0.0, 0

    def push(self, moment: Moment) -> None:
        if self._last is not None and _follows(moment, self._last):
            self._total += mean_change(moment.image, self._last.image)
            self._pairs += 1
        self._last = moment

    def value(self) -> float | None:
        return (255 - self._total / self._pairs) / 255 if self._pairs else None


class Seams:
    """Change at chunk borders over the median change elsewhere in the same section. 1: chunks meet without a seam.

    A border is the first frame f of a chunk: its change is |I[f] - I[f-1]|, its bend |I[f-1] - 2 I[f] + I[f+1]|. Both
    ratios are sums over borders, of the value there over the median of its section; in a film of one section that is
    the mean at borders over the median elsewhere. Keeps two numbers a frame.
    """

    def __init__(self, borders: Collection[int]) -> None:
        self._borders = frozenset(borders)
        self._last: list[Moment] = []
        self._first_order = _Contrast()
        self._second_order = _Contrast()

    def push(self, moment: Moment) -> None:
        if self._last and not _follows(moment, self._last[-1]):
            self._last = []
        index, section = moment.index, moment.section
        if self._last:
            change = mean_change(moment.image, self._last[-1].image)
            self._first_order.add(section, change, index in self._borders)
        # The bend before a border has the border in it, too: it is neither one nor elsewhere.
        if len(self._last) == 2 and index not in self._borders:
            a, b = (m.image.astype(np.int16) for m in self._last)
            bend = float(np.abs(a - 2 * b + moment.image).mean())
            self._second_order.add(section, bend, index - 1 in self._borders)
        self._last = [*self._last[-1:], moment]

    def value(self) -> dict[str, float] | None:
        """`ratio` and `second_ratio`; None where no border was seen."""
        ratio, second = self._first_order.ratio(), self._second_order.ratio()
        return None if ratio is None or second is None else {"ratio": ratio, "second_ratio": second}


class _Contrast:
    """Values at borders and elsewhere, by section."""

    def __init__(self) -> None:
        self._border: defaultdict[int, list[float]] = defaultdict(list)
        self._elsewhere: defaultdict[int, array[float]] = defaultdict(lambda: array("f"))

    def add(self, section: int, value: float, at_border: bool) -> None:
        (self._border if at_border else self._elsewhere)[section].append(value)

    def ratio(self) -> float | None:
        at_borders, usual = 0.0, 0.0
        for section, values in self._border.items():
            if elsewhere := self._elsewhere[section]:
                at_borders += sum(values)
                usual += len(values) * max(float(np.median(np.asarray(elsewhere))), STILL_CHANGE)
        return at_borders / usual if usual else None


class Drift:
    """How colour, contrast and sharpness wander: slope a minute, and distance between the first and last quarter.

    Measures of a frame: mean red, green, blue; standard deviation of luma; Laplacian energy of luma, the mean square of
    its four-neighbour Laplacian (levels squared). The slope is one least-squares slope with an intercept a section, so
    that scenes of different colours do not drift; the distances are means over sections, by their frames. Keeps six
    numbers a frame.
    """

    def __init__(self, fps: float) -> None:
        self._frames_a_minute = 60 * fps
        self._series: defaultdict[int, array[float]] = defaultdict(lambda: array("f"))
        self._indices: defaultdict[int, array[int]] = defaultdict(lambda: array("q"))

    def push(self, moment: Moment) -> None:
        pixels = moment.image.astype(np.float32)
        luma = pixels @ np.array([0.2126, 0.7152, 0.0722], np.float32)
        around = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:]
        energy = np.square(around - 4 * luma[1:-1, 1:-1]).mean()
        rgb = pixels.mean(axis=0).mean(axis=0)  # over both at once, numpy takes ten times as long
        self._series[moment.section].extend([*rgb.tolist(), float(luma.std()), float(energy)])
        self._indices[moment.section].append(moment.index)

    def value(self) -> dict[str, list[float] | float] | None:
        """`rgb`, `std` and `laplacian`, each with `_per_minute` and `_quarters`; None where no section has 4 frames."""
        covariance, variance, distance, weight = np.zeros(5), 0.0, np.zeros(5), 0
        for section, values in self._series.items():
            measures_T5 = np.asarray(values, np.float64).reshape(-1, 5)
            count = len(measures_T5)
            if count < 4:
                continue
            minutes = np.asarray(self._indices[section]) / self._frames_a_minute
            minutes -= minutes.mean()
            covariance += minutes @ (measures_T5 - measures_T5.mean(axis=0))
            variance += float(minutes @ minutes)
            ends = measures_T5[: count // 4].mean(axis=0), measures_T5[-(count // 4) :].mean(axis=0)
            distance += count * np.abs(ends[1] - ends[0])
            weight += count
        if not weight:
            return None
        return _name("per_minute", covariance / variance) | _name("quarters", distance / weight)


def mean_change(a: Image, b: Image) -> float:
    """Mean absolute difference of two frames, in levels."""
    return float((np.maximum(a, b) - np.minimum(a, b)).mean())


def _name(kind: str, five: FloatArray) -> dict[str, list[float] | float]:
    rgb, std, laplacian = five[:3].tolist(), float(five[3]), float(five[4])
    return {f"rgb_{kind}": rgb, f"std_{kind}": std, f"laplacian_{kind}": laplacian}


def _follows(moment: Moment, last: Moment) -> bool:
    return moment.section == last.section and moment.index == last.index + 1
