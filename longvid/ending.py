"""How a finished film ended: what is kept beside it so that scenes can be added later. Pure.

With `output.keep_state` the film's working folder `film.mp4.longvid/` keeps its segments, and

    state/ending.json
    state/ending_000960.safetensors     last latents, decoder, frames of the last latent behind the film's end

The first, replaced as a whole, names the second.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from longvid.errors import InputError
from longvid.fingerprint import differences
from longvid.manifest import ENDING, state_folder
from longvid.script import Scene, Script, parse_script, storyboard_text

_HOW = "films are kept so by `longvid render --keep-state` (output.keep_state=true)"
_FREE_SETTINGS = ("mesh", "sequence", "runtime")
"""Sections that may differ from those of the film that goes on: they say where and how fast it is rendered."""

Count = Annotated[int, Field(ge=0)]


class Ending(BaseModel):
    """A film of `frames` frames, as it is kept: its `storyboard`, `settings`, and the fingerprint of its last render.

    It ended at the frames `ends` before, and has `segments` on the disk, some of them `short` (segment, frames).
    `tensors` is a file in the state folder, of so many `bytes`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal[1] = 1
    frames: Count
    ends: list[Count]
    segments: Count
    short: list[tuple[Count, Count]]
    storyboard: str
    settings: dict[str, Any]
    fingerprint: dict[str, Any]
    tensors: Annotated[str, Field(pattern=r"^ending_[0-9]+\.safetensors$")]
    bytes: Count

    @classmethod
    def read(cls, film: Path) -> Self:
        """That of a film. Raises InputError where there is none, or it is damaged."""
        path = state_folder(film) / ENDING
        try:
            ending = cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise InputError(f"{film}: cannot go on, for its state was not kept ({path} is missing); {_HOW}") from None
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from None
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise InputError(f"{path}: is damaged ({place}: {first['msg']}): {film} cannot go on") from None
        file = state_folder(film) / ending.tensors
        if not file.is_file() or file.stat().st_size != ending.bytes:
            raise InputError(f"{file}: is missing or damaged: {film} cannot go on")
        return ending

    def script(self) -> Script:
        """The storyboard of the film so far."""
        return parse_script(self.storyboard, ENDING)

    def require(self, film: Path, fingerprint: dict[str, Any]) -> None:
        """Raise InputError, with what changed, where a render is not of the same model, settings and scenes so far."""
        count = len(self.fingerprint["story"]["scenes"])
        changed = differences(_what_counts(self.fingerprint, count), _what_counts(fingerprint, count))
        if changed:
            listed = "\n".join(f"  {line}" for line in changed[:12])
            raise InputError(f"{film}: cannot go on, for it would not be one film:\n{listed}\nundo this")


def _what_counts(fingerprint: dict[str, Any], num_scenes: int) -> dict[str, Any]:
    """Of a fingerprint what makes a film one film; rounding may differ from one end to the other."""
    settings = {name: value for name, value in fingerprint["settings"].items() if name not in _FREE_SETTINGS}
    settings["runtime"] = {"dtype": fingerprint["settings"]["runtime"]["dtype"]}
    story = {**fingerprint["story"], "scenes": fingerprint["story"]["scenes"][:num_scenes]}
    return {"model": fingerprint["model"], "settings": settings, "story": story}


def longer_script(script: Script, scenes: tuple[Scene, ...], name: str) -> Script:
    """A storyboard with scenes added, whose prompts get its style; `name` stands for it in messages."""
    styled = (replace(scene, prompt=f"{scene.prompt} {script.style}".strip()) for scene in scenes)
    # Read anew, so that what a storyboard may not say is refused here as there.
    return parse_script(storyboard_text(replace(script, scenes=(*script.scenes, *styled))), name)
