"""The scenes of a film: where they lie, and what each shows, read window by window while its frames stream past."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longvid.metrics.adherence import Reading, expected, read_matte, score
from longvid.metrics.images import shrink
from longvid.metrics.matte import find_object
from longvid.metrics.subject import SubjectMeter
from longvid.script import Script, transition_frames
from longvid.training import world

WINDOW = 48
"""Frames that are read as one clip; a slow orbit turns far enough in them to be told from a straight line."""
_READING_SIDE = 64
_MIN_SIDE = 32
_MIN_FRAMES = 3


@dataclass(frozen=True)
class Span:
    """The frames of one scene: [first, stop), of which those before `settled` still show the change from the last."""

    index: int
    prompt: str
    first: int
    settled: int
    stop: int


def scene_spans(script: Script, fps: float) -> list[Span]:
    """Where each scene lies in a film of that rate. A blend settles when it and the world's own morph are over.

    With `share` the prompt changes at once: there the morph alone.
    """
    lengths = [scene.duration.frames(fps) for scene in script.scenes]
    spans = []
    for i, (scene, length, stop) in enumerate(zip(script.scenes, lengths, accumulate(lengths), strict=True)):
        first = stop - length
        change = 0
        if scene.transition.kind != "cut":
            blended = transition_frames(script, scene, fps) if scene.transition.kind == "blend" else 0
            change = min(world.MORPH_FRAMES + blended, length // 2)
        spans.append(Span(i, scene.prompt, first, first + change, stop))
    return spans


@dataclass(frozen=True)
class Window:
    """What some frames of a scene showed, and whether that is what its prompt says."""

    first: int
    frames: int
    reading: Reading
    matches: dict[str, bool]


class SceneMeter:
    """Reads the settled frames of one scene in windows; memory holds two of them."""

    def __init__(self, span: Span) -> None:
        self.span = span
        self.wanted = expected(span.prompt)
        self.frames = 0
        self.windows: list[Window] = []
        self.subject = SubjectMeter(self.wanted.get("motion"))
        self._waiting: list[NDArray[np.uint8]] = []
        self._next = span.settled

    def push(self, image: NDArray[np.uint8]) -> None:
        """Take the next settled frame, uint8 [H, W, 3]. Only square frames show the drawn world."""
        self.frames += 1
        height, width = image.shape[:2]
        if height == width >= _MIN_SIDE:
            self._waiting.append(shrink(image, _READING_SIDE))
        if len(self._waiting) == 2 * WINDOW:
            self._read(WINDOW)

    def finish(self) -> None:
        """Read what is left; a short rest counts with the window before it."""
        if len(self._waiting) >= _MIN_FRAMES:
            self._read(len(self._waiting))

    def summary(self) -> dict[str, Any]:
        """The scene for a report: its prompt, what most of its frames show, and whether all of that is asked for."""
        read = {name: self._most(name) for name in (*world.ATTRIBUTES, "count")}
        matches = {name: read[name] == value for name, value in self.wanted.items()}
        judged = bool(self.wanted and self.windows)
        return {
            "prompt": self.span.prompt,
            "first_frame": self.span.first,
            "frames": self.span.settled - self.span.first + self.frames,
            **read,
            "expected": self.wanted,
            "matches": matches if judged else {},
            "shares": {name: self._share(name, read[name]) for name in world.ATTRIBUTES} if self.windows else {},
            "joint_adherence": joint_adherence(self.windows) if judged else None,
            "subject": self.subject.value(),
            "ok": all(matches.values()) if judged else None,
        }

    def period_frames(self) -> float | None:
        """Median period of the object's own motion; None where it has none."""
        periods = [window.reading.motion_track.period_frames for window in self.windows]
        known = [period for period in periods if period is not None]
        return float(np.median(known)) if known else None

    def _read(self, count: int) -> None:
        clip, self._waiting = np.stack(self._waiting[:count]), self._waiting[count:]
        matte = find_object(clip)
        reading = read_matte(clip, matte)
        self.subject.push(clip, matte)
        self.windows.append(Window(self._next, count, reading, score(reading, self.wanted)))
        self._next += count

    def _most(self, name: str) -> Any:
        votes: Counter[Any] = Counter()
        for window in self.windows:
            votes[getattr(window.reading, name)] += window.frames
        return votes.most_common(1)[0][0] if votes else None

    def _share(self, name: str, value: str | None) -> float:
        """Share of frames that agree with a value: of the windows that read so, their own shares."""
        agreeing = sum(w.frames * w.reading.shares[name] for w in self.windows if getattr(w.reading, name) == value)
        return float(agreeing / sum(window.frames for window in self.windows))


def joint_adherence(windows: list[Window], frames: range | None = None) -> float | None:
    """Share of frames, among those given, that lie in windows which show all that is asked for; None for no frames."""
    good, total = 0, 0
    for window in windows:
        inside = window.frames
        if frames is not None:
            inside = max(0, min(window.first + window.frames, frames.stop) - max(window.first, frames.start))
        total += inside
        good += inside * window.matches["ok"]
    return good / total if total else None


def attribute_adherence(windows: list[Window]) -> dict[str, float]:
    """For each attribute that prompts name, the share of frames in windows that show it as asked."""
    named = {name: [w for w in windows if name in w.matches] for name in world.ATTRIBUTES}
    return {
        name: sum(w.frames for w in among if w.matches[name]) / sum(w.frames for w in among)
        for name, among in named.items()
        if among
    }


def quarters(windows: list[Window], num_frames: int) -> list[float | None]:
    """Joint adherence of each quarter of a film."""
    ends = [num_frames * quarter // 4 for quarter in range(5)]
    return [joint_adherence(windows, range(first, stop)) for first, stop in pairwise(ends)]
