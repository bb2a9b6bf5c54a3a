"""The storyboard: what a user asks for, read from YAML and validated."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from longvid.document import (
    Document,
    Section,
    check_characters,
    nearest,
    parse_document,
    read_document,
    show,
    validate,
)
from longvid.errors import InputError

MAX_HOURS = 24
MAX_FPS = 240
MAX_PROMPT_CHARACTERS = 2000
MAX_SEED = 2**63 - 1
TransitionKind = Literal["cut", "blend", "share"]
TRANSITIONS: tuple[TransitionKind, ...] = ("cut", "blend", "share")


@dataclass(frozen=True)
class Duration:
    """A length of film in seconds or frames."""

    value: float
    unit: Literal["s", "f"]

    def frames(self, fps: float) -> int:
        """The nearest whole number of frames, at least one."""
        return max(1, math.floor(self.value * (fps if self.unit == "s" else 1) + 0.5))

    def __str__(self) -> str:
        return f"{self.value:.10g}{self.unit}"


@dataclass(frozen=True)
class Transition:
    """How a scene begins: at once (`cut`, a new shot), or from the scene before, in the same shot.

    A `blend` goes from prompt to prompt over 1 s unless said. With `share` the prompt changes at once, but for `over`
    (None: the whole scene) what is new still sees how the scene before ended: its identity is kept.
    """

    kind: TransitionKind = "cut"
    over: Duration | None = None

    def __post_init__(self) -> None:
        if self.kind == "blend" and self.over is None:
            object.__setattr__(self, "over", Duration(1, "s"))


@dataclass(frozen=True)
class Scene:
    """A stretch of film with one prompt; `prompt` has the storyboard's style appended already."""

    prompt: str
    duration: Duration
    transition: Transition = Transition()
    seed: int | None = None
    negative: str = ""
    line: int = 0
    image: Path | None = None
    """The shot's first frame; only of a scene that begins a shot."""


@dataclass(frozen=True)
class Script:
    """A whole storyboard. What is None comes from the model. `path` names the file in messages."""

    scenes: tuple[Scene, ...]
    seed: int = 0
    title: str | None = None
    fps: float | None = None
    size: tuple[int, int] | None = None
    path: str = "storyboard"
    size_line: int = 0
    style: str = field(default="", compare=False)
    """What every prompt has at its end, for scenes that are added later."""

    def __post_init__(self) -> None:
        if not self.scenes:
            raise InputError(f"{self.path}: a storyboard needs at least one scene")
        if self.scenes[0].transition.kind != "cut":
            place = self.place(self.scenes[0].line)
            kind = self.scenes[0].transition.kind
            raise InputError(f"{place}: the first scene has none before it to {kind} from; leave its transition out")

    def place(self, line: int) -> str:
        """`story.yaml:12`, or the file alone where there is no line."""
        return f"{self.path}:{line}" if line else self.path


def load_script(path: str | Path) -> Script:
    """Read a storyboard file. Raises InputError with file and line."""
    return script_of(read_document(Path(path)))


def parse_script(text: str | bytes, name: str) -> Script:
    """Parse a storyboard; `name` stands for the file in messages. Raises InputError with `name` and line."""
    return script_of(parse_document(text, name))


def parse_scene(prompt: str, length: str, kind: TransitionKind, over: str | None, seed: int | None) -> Scene:
    """One scene of a film, by the options of `longvid extend`. Raises InputError that names the option."""
    if not prompt.strip():
        raise InputError("--scene: says nothing")
    if over and kind == "cut":
        raise InputError("--over: a cut takes no time")
    change = Transition(kind, option_duration("--over", over) if over else None)
    return Scene(_one_line(prompt), option_duration("--for", length), change, seed)


def parse_prompt(text: str, name: str) -> str:
    """A prompt that comes from a program, as a storyboard would take it; `name` is what messages call it.

    Raises InputError.
    """
    if not isinstance(text, str):
        raise InputError(f"{name} must be text, not {show(text)}")
    line: str = _one_line(text)
    if len(line) > MAX_PROMPT_CHARACTERS:
        raise InputError(f"{name}: must hold at most {MAX_PROMPT_CHARACTERS} characters, not {len(line)}")
    check_characters(line, name)
    return line


def option_duration(option: str, text: str) -> Duration:
    """The duration that an option gives. Raises InputError that names it."""
    try:
        duration: Duration = parse_duration(text)
    except ValueError as error:
        raise InputError(f"{option}: {error}") from None
    return duration


def transition_frames(script: Script, scene: Scene, fps: float) -> int:
    """Frames of the blend or share that a scene begins with. Raises InputError where it is longer than its scene."""
    kind, over, whole = scene.transition.kind, scene.transition.over or scene.duration, scene.duration
    assert kind != "cut", "a cut takes no time"
    if over.frames(fps) > whole.frames(fps):
        raise InputError(f"{script.place(scene.line)}: the {kind} over {over} is longer than its scene of {whole}")
    return over.frames(fps)


# --------------------------------------------------------------------------------------------------------- writing


def storyboard_text(script: Script) -> str:
    """A storyboard's YAML, a scene a line, that reads as this script."""
    style = f" {script.style}" if all(scene.prompt.endswith(f" {script.style}") for scene in script.scenes) else ""
    top: dict[str, Any] = {"title": script.title, "seed": script.seed, "fps": script.fps}
    top |= {"size": list(script.size) if script.size else None, "style": style.strip() or None}
    lines = [f"{name}: {_flow(value)}" for name, value in top.items() if value is not None]
    return "\n".join([*lines, "scenes:", *(f"  - {_scene_text(scene, style)}" for scene in script.scenes)]) + "\n"


def _scene_text(scene: Scene, style: str) -> str:
    change = scene.transition
    over = {"kind": change.kind, "over": _exact(change.over)} if change.over else change.kind
    keys = {
        "prompt": scene.prompt.removesuffix(style),
        "for": _exact(scene.duration),
        "transition": None if change.kind == "cut" else over,
        "seed": scene.seed,
        "negative": scene.negative or None,
        "image": str(scene.image.absolute()) if scene.image else None,
    }
    return _flow({name: value for name, value in keys.items() if value is not None})


def _flow(value: Any) -> str:
    """A value in YAML's flow style, every text that is no plain word in quotes."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_flow(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(_flow, value))}]"
    if isinstance(value, str) and not _PLAIN.fullmatch(value):
        return _BREAK.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))
    return str(value)


def _exact(duration: Duration) -> str:
    return f"{Decimal(repr(duration.value)):f}{duration.unit}" if duration.unit == "s" else f"{duration.value:.0f}f"


_BREAK = re.compile("[\x85\u2028\u2029\ufeff]")
"""What YAML takes for the end of a line, or does not keep, even in quotes."""
_PLAIN = re.compile(f"{'|'.join(TRANSITIONS)}|[0-9]+(\\.[0-9]+)?[sf]")

# ----------------------------------------------------------------------------------------------------- the YAML's shape

_DURATION = re.compile(r"(?:([0-9]+)h)?(?:([0-9]+)m)?(?:([0-9]+(?:\.[0-9]+)?)s)?")


def parse_duration(value: Any) -> Any:
    """A duration of its text; a Duration stays what it is. Raises ValueError for what is none."""
    if isinstance(value, Duration):
        return value
    text = value if isinstance(value, str) else ""
    if re.fullmatch("[0-9]{1,12}f", text):
        duration, longest = Duration(int(text[:-1]), "f"), MAX_HOURS * 3600 * MAX_FPS
    elif 0 < len(text) <= 32 and (match := _DURATION.fullmatch(text)):
        hours, minutes, seconds = (float(part or 0) for part in match.groups())
        duration, longest = Duration(hours * 3600 + minutes * 60 + seconds, "s"), MAX_HOURS * 3600
    else:
        raise ValueError(f"must be a duration like 12s, 1m30s or 480f, not {show(value)}")
    if duration.value <= 0:
        raise ValueError(f"must be longer than zero, not {text}")
    if duration.value > longest:
        raise ValueError(f"must be at most {MAX_HOURS} hours, not {text}")
    return duration


def _parse_transition(value: Any) -> Any:
    if isinstance(value, str):
        if value not in TRANSITIONS:
            raise ValueError(f"unknown kind {show(value)}: {nearest(value, TRANSITIONS)}")
        return {"kind": value}
    return value


def _one_line(value: Any) -> Any:
    return " ".join(value.split()) if isinstance(value, str) else value


_Text = Annotated[str, BeforeValidator(_one_line), Field(max_length=MAX_PROMPT_CHARACTERS)]
_Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
_Side = Annotated[int, Field(ge=16, le=8192)]
_Length = Annotated[Duration, BeforeValidator(parse_duration)]
_File = Annotated[str, Field(min_length=1, max_length=4096)]


class _TransitionYaml(Section):
    kind: TransitionKind
    over: _Length | None = None

    @field_validator("over")
    @classmethod
    def _a_cut_takes_no_time(cls, over: Duration | None, info: Any) -> Duration | None:
        if over is not None and info.data.get("kind") == "cut":
            raise ValueError("a cut takes no time; only blend and share have `over`")
        return over


class _SceneYaml(Section):
    prompt: Annotated[_Text, Field(min_length=1)]
    duration: _Length = Field(alias="for")
    transition: Annotated[_TransitionYaml, BeforeValidator(_parse_transition)] = _TransitionYaml(kind="cut")
    seed: _Seed | None = None
    negative: _Text | None = None
    image: _File | None = None


class _StoryYaml(Section):
    title: str | None = None
    seed: _Seed = 0
    style: _Text = ""
    negative: _Text = ""
    image: _File | None = None
    fps: Annotated[float, Field(ge=1, le=MAX_FPS)] | None = None
    size: Annotated[list[_Side], Field(min_length=2, max_length=2)] | None = None
    scenes: Annotated[list[_SceneYaml], Field(min_length=1)]


def script_of(document: Document) -> Script:
    """The storyboard that a document's plain data is. Raises InputError with the place of what is wrong."""
    if document.data is None:
        raise InputError(f"{document.name}:1: the storyboard is empty; it needs `scenes`")
    story = validate(_StoryYaml, document)
    script = Script(
        scenes=tuple(_scene(story, i, document) for i in range(len(story.scenes))),
        seed=story.seed,
        title=story.title,
        fps=story.fps,
        size=(story.size[0], story.size[1]) if story.size else None,
        path=document.name,
        size_line=document.line(("size",)),
        style=story.style,
    )
    for scene in script.scenes:
        over = scene.transition.over
        # Seconds against frames needs a frame rate; where only the model knows it, the plan checks.
        if over and (script.fps or over.unit == scene.duration.unit):
            transition_frames(script, scene, script.fps or float(MAX_FPS))
    return script


def _scene(story: _StoryYaml, index: int, document: Document) -> Scene:
    scene = story.scenes[index]
    begins_shot = scene.transition.kind == "cut"
    if scene.image and not begins_shot:
        place = document.place(("scenes", index, "image"))
        raise InputError(f"{place}: only a scene that begins with a cut has an image: it is the shot's first frame")
    image = (scene.image or story.image) if begins_shot else None
    return Scene(
        prompt=f"{scene.prompt} {story.style}".strip(),
        duration=scene.duration,
        transition=Transition(scene.transition.kind, scene.transition.over),
        seed=scene.seed,
        negative=story.negative if scene.negative is None else scene.negative,
        line=document.line(("scenes", index)),
        image=Path(document.name).parent / image if image else None,
    )
