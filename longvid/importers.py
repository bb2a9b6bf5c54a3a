"""Prompts in others' formats, as storyboards: frame-keyed maps, LongLive's JSON lines, and plain lists. Pure.

- A map from frames to prompts, as YAML or JSON: `{"0": "a circle", "48": "a ring --neg blurred"}`. It may stand under
  `prompts`, with `fps`, and `max_frames` where the film ends (Deforum's keys).
- JSON lines, each a film: `{"prompts": ["a circle", "a ring"], "switch_frames": [48]}`, or with `durations` in seconds.
- A list of prompts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longvid.document import Document, Loc, parse_document, show
from longvid.errors import InputError
from longvid.script import (
    MAX_FPS,
    Duration,
    Scene,
    Script,
    Transition,
    TransitionKind,
    parse_duration,
    parse_script,
    storyboard_text,
)

_KEYS = ("prompts", "switch_frames", "durations", "fps", "max_frames", "seed")
_USUAL_FPS = 16.0
_MAX_BYTES = 16 << 20


@dataclass(frozen=True)
class Defaults:
    """What a file may leave open: how long a scene is whose end it does not say, how later scenes begin, which line of
    several is meant (from 1), and the frame rate.
    """

    length: Duration | None = None
    transition: TransitionKind = "blend"
    line: int | None = None
    fps: float | None = None


def import_prompts(path: Path, defaults: Defaults) -> Script:
    """A file's prompts as a storyboard. Raises InputError with file and line of what cannot be one."""
    lines = _read(path).split("\n")
    text = _chosen_line(path, lines, defaults.line) if path.suffix == ".jsonl" else "\n".join(lines)
    document = parse_document(_PAIR.sub(_character, text), str(path))
    return _Importer(document, defaults).script()


_PAIR = re.compile(r"\\u(d[89ab][0-9a-f]{2})\\u(d[c-f][0-9a-f]{2})", re.IGNORECASE)
"""A character beyond 16 bits as JSON escapes it, which YAML does not know."""


def _character(pair: re.Match[str]) -> str:
    return bytes.fromhex(pair[1] + pair[2]).decode("utf-16-be")


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InputError(f"{path}: is larger than {_MAX_BYTES >> 20} MiB")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeError:
        raise InputError(f"{path}: is not UTF-8 text") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _chosen_line(path: Path, lines: list[str], wanted: int | None) -> str:
    """One line of JSON lines, where it stands; it need not be named where there is one alone."""
    filled = [number for number, line in enumerate(lines, 1) if line.strip()]
    if wanted is None and len(filled) != 1:
        raise InputError(f"{path}: holds {len(filled)} films, a line each: choose one by --line")
    number = filled[0] if wanted is None else wanted
    if number not in filled:
        raise InputError(f"{path}: has no film in line {number}")
    return "\n" * (number - 1) + lines[number - 1]


@dataclass(frozen=True)
class _Importer:
    document: Document
    defaults: Defaults

    def script(self) -> Script:
        data: Any = self.document.data
        loc: Loc = ()
        prompts, options = data, dict[str, Any]()
        if isinstance(data, dict) and "prompts" in data:
            unknown = next((key for key in data if key not in _KEYS), None)
            if unknown is not None:
                raise self.error((unknown,), f"unknown key {unknown!r}: there may be {', '.join(_KEYS)}")
            loc, prompts, options = ("prompts",), data["prompts"], data
        fps = self.number(options, "fps") or self.defaults.fps
        if isinstance(prompts, dict):
            scenes = self.by_frame(loc, prompts, self.whole(options.get("max_frames"), ("max_frames",)))
        elif isinstance(prompts, list):
            scenes = self.in_order(loc, prompts, options)
        else:
            raise self.error(loc, f"must be a map from frames to prompts, or a list of prompts, not {show(prompts)}")
        if not scenes:
            raise self.error(loc, "holds no prompt")
        seed = self.whole(options.get("seed"), ("seed",)) or 0
        made = Script(tuple(self.joined(scenes, fps)), seed=seed, fps=fps, path=self.document.name)
        # Read anew: what a storyboard may not say is refused here.
        return parse_script(storyboard_text(made), f"{self.document.name} as a storyboard")

    def by_frame(self, loc: Loc, prompts: dict[str, Any], end: int | None) -> list[Scene]:
        """Scenes from each frame that has a prompt to the next."""
        starts = []
        for key in prompts:
            if not (key.isascii() and key.isdigit() and len(key) <= 9):
                raise self.error((*loc, key), f"{key!r} is no frame: prompts are keyed by whole numbers")
            starts.append((int(key), key))
        starts.sort()
        if starts and starts[0][0] != 0:
            raise self.error((*loc, starts[0][1]), f"the first prompt is of frame {starts[0][0]}, and must be of 0")
        scenes = []
        for i, (start, key) in enumerate(starts):
            stop = starts[i + 1][0] if i + 1 < len(starts) else end
            if stop is None:
                length = self.left_open((*loc, key))
            elif stop <= start:
                raise self.error((*loc, key), f"frame {start} has a prompt, and frame {stop} ends it")
            else:
                length = Duration(stop - start, "f")
            scenes.append(self.scene((*loc, key), prompts[key], length))
        return scenes

    def in_order(self, loc: Loc, prompts: list[Any], options: dict[str, Any]) -> list[Scene]:
        """Scenes one after the other, of the lengths that are said."""
        lengths: Sequence[Duration | None] = [None] * len(prompts)
        if "durations" in options:
            lengths = self.durations(options["durations"], len(prompts))
        elif "switch_frames" in options:
            lengths = self.between(options["switch_frames"], len(prompts), options.get("max_frames"))
        return [
            self.scene((*loc, i), prompt, length or self.left_open((*loc, i)))
            for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
        ]

    def durations(self, values: Any, count: int) -> list[Duration]:
        if not isinstance(values, list) or len(values) != count:
            raise self.error(("durations",), f"durations must be a list of {count}, one for each prompt")
        found = []
        for i, value in enumerate(values):
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            try:
                found.append(parse_duration(f"{value:f}s" if is_number else value))
            except ValueError as error:
                raise self.error(("durations", i), str(error)) from None
        return found

    def between(self, values: Any, count: int, end: Any) -> list[Duration | None]:
        """Lengths between frames at which prompts change."""
        if not isinstance(values, list) or len(values) != count - 1:
            raise self.error(("switch_frames",), f"switch_frames must be a list of {count - 1}, one for each change")
        edges = [0, *(self.whole(value, ("switch_frames", i)) or 0 for i, value in enumerate(values))]
        if end is not None:
            edges.append(self.whole(end, ("max_frames",)) or 0)
        lengths: list[Duration | None] = []
        for i in range(len(edges) - 1):
            if edges[i + 1] <= edges[i]:
                raise self.error(("switch_frames",), f"frames must go up, not from {edges[i]} to {edges[i + 1]}")
            lengths.append(Duration(edges[i + 1] - edges[i], "f"))
        return [*lengths, *[None] * (count - len(lengths))]

    def scene(self, loc: Loc, prompt: Any, length: Duration) -> Scene:
        """Behind `--neg` stands what the scene should not show."""
        if not isinstance(prompt, str):
            raise self.error(loc, f"a prompt must be text (put it in quotes), not {show(prompt)}")
        text, _, negative = (" ".join(part.split()) for part in prompt.partition("--neg"))
        if not text:
            raise self.error(loc, "a prompt must say something")
        return Scene(text, length, negative=negative)

    def joined(self, scenes: list[Scene], fps: float | None) -> list[Scene]:
        """With transitions, none longer than its scene."""
        kind = self.defaults.transition
        made = [scenes[0]]
        for scene in scenes[1:]:
            over: Duration | None = None
            if kind == "blend":
                rate = fps or _USUAL_FPS
                is_short = scene.duration.frames(rate) < Duration(1, "s").frames(rate)
                in_frames = scene.duration.unit == "f" and fps is None
                over = scene.duration if is_short else Duration(rate, "f") if in_frames else Duration(1, "s")
            made.append(Scene(scene.prompt, scene.duration, Transition(kind, over), negative=scene.negative))
        return made

    def left_open(self, loc: Loc) -> Duration:
        if self.defaults.length is None:
            raise self.error(loc, "the file does not say how long this prompt holds: give --for")
        return self.defaults.length

    def number(self, options: dict[str, Any], key: str) -> float | None:
        value = options.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value <= MAX_FPS:
            raise self.error((key,), f"{key} must be a number from 1 to {MAX_FPS}, not {show(value)}")
        return float(value)

    def whole(self, value: Any, loc: Loc) -> int | None:
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 10**9:
            raise self.error(loc, f"{loc[0]} must hold whole numbers, not {show(value)}")
        return value

    def error(self, loc: Loc, text: str) -> InputError:
        return InputError(f"{self.document.place(loc)}: {text}")
