"""Jobs of a batch: films to be made, read from storyboards and prompt files. Pure but for the reading.

A wrong line costs its own film and no other: what is read is a list of jobs and of refusals, each with its place.
"""

from __future__ import annotations

import csv
import hashlib
import json
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from longvid.document import Document, Loc, nearest, parse_scalar, read_document, show
from longvid.errors import InputError
from longvid.fingerprint import Plain, describe_file
from longvid.script import Script, script_of
from longvid.settings import Settings, load_settings

STORYBOARDS = (".yaml", ".yml")
PROMPTS = (".txt", ".jsonl", ".csv")
MAX_NAME_BYTES = 120
"""A film's name with its endings must be a file's name everywhere."""

_STORY_FIELDS = ("title", "seed", "style", "negative", "fps", "size")
_FIELDS = ("name", "prompt", "for", "seconds", "scenes", *_STORY_FIELDS)
_NUMBERS = ("seed", "seconds", "fps")
"""Fields that a CSV cell holds as a number; all others are text."""

_SAME_FILM: dict[str, Any] = {
    "mesh": True,
    "output": {"keep_state"},
    "runtime": {"device", "threads", "timeout_s", "checkpoint_s"},
}
"""Settings that may change between two runs of one job."""


@dataclass(frozen=True)
class Job:
    """One film to be made. `story` is a storyboard as plain data; `place` is its file, `origins` its lines."""

    name: str
    place: str
    story: Plain
    settings: Settings
    origins: dict[Loc, int | str] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def script(self) -> Script:
        """The storyboard."""
        return script_of(Document(self.place, self.story, self.origins))

    @cached_property
    def content(self) -> Plain:
        """What decides which film it is: two jobs of equal content are one job."""
        script = self.script
        scenes = [
            {
                "prompt": scene.prompt,
                "for": str(scene.duration),
                "transition": scene.transition.kind,
                "over": str(scene.transition.over) if scene.transition.over else None,
                "seed": scene.seed,
                "negative": scene.negative,
                **({"image": _mark_of(scene.image)} if scene.image else {}),
            }
            for scene in script.scenes
        ]
        size = list(script.size) if script.size else None
        return {
            "story": {"seed": script.seed, "fps": script.fps, "size": size, "scenes": scenes},
            "settings": self.settings.model_dump(mode="json", exclude=_SAME_FILM),
        }

    @property
    def digest(self) -> str:
        """A short text that stands for `content`."""
        return digest_of(self.content)


@dataclass(frozen=True)
class Refused:
    """What should have been a job, and why it is none. `reason` begins with the place."""

    name: str
    place: str
    reason: str


@dataclass
class Defaults:
    """What holds for all jobs: preset and overrides of settings, and how long a prompt's film is.

    `threads` a rank are for settings that leave it to the machine, for several workers share it.
    """

    preset: str | None = None
    overrides: tuple[str, ...] = ()
    length: str = "5s"
    threads: int = 0
    _known: dict[tuple[str, ...], Settings] = field(default_factory=dict)

    def settings(self, own: tuple[str, ...] = ()) -> Settings:
        """The settings of a job with overrides of its own. Raises InputError."""
        if own not in self._known:
            found = load_settings(self.preset, (*self.overrides, *own))
            if not found.runtime.threads:
                found = found.model_copy(update={"runtime": found.runtime.model_copy(update={"threads": self.threads})})
            self._known[own] = found
        return self._known[own]


def _mark_of(image: Path) -> str:
    """What stands for an image: its bytes; where there is no such file, which planning refuses, its path."""
    return str(describe_file(image)["digest"]) if image.is_file() else str(image)


def digest_of(value: Any) -> str:
    """A digest of plain data."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


# ----------------------------------------------------------------------------------------------------------- many files


def read_jobs(paths: Sequence[Path], defaults: Defaults) -> list[Job | Refused]:
    """All jobs of storyboards, folders of storyboards and prompt files, in order; names are unique among the jobs.

    A name stands for one film. Where it comes again for the same film, it is one job; for another film, the later one
    is refused. Raises InputError for wrong settings, a path that is not there, or a file of another kind.
    """
    defaults.settings()
    files = [file for path in paths for file in files_of(path)]
    return without_doubles(item for file in files for item in read_file(file, defaults))


def files_of(path: Path) -> list[Path]:
    """The job files that a path names: itself, or the storyboards in a folder. Raises InputError."""
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in STORYBOARDS)
        if not found:
            raise InputError(f"{path}: holds no storyboard (*.yaml)")
        return found
    if not path.exists():
        raise InputError(f"{path}: is not there")
    if path.suffix.lower() not in STORYBOARDS + PROMPTS:
        raise InputError(f"{path}: jobs come from {', '.join(STORYBOARDS + PROMPTS)} or a folder of storyboards")
    return [path]


def read_file(path: Path, defaults: Defaults) -> Iterator[Job | Refused]:
    """The jobs of one file. Raises InputError for one that cannot be read at all."""
    if path.suffix.lower() in STORYBOARDS:
        yield _storyboard(path, defaults)
        return
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    yield from parse_prompts(content, path, defaults)


def without_doubles(items: Iterable[Job | Refused]) -> list[Job | Refused]:
    """The same with one job a name."""
    jobs: dict[str, Job] = {}
    kept: list[Job | Refused] = []
    for item in items:
        first = jobs.get(item.name) if isinstance(item, Job) else None
        if first is None:
            kept.append(item)
            if isinstance(item, Job):
                jobs[item.name] = item
        elif isinstance(item, Job) and item.digest != first.digest:
            reason = f"{item.place}: {first.place} is another film of the name {item.name!r}; give one another `name`"
            kept.append(Refused(item.name, item.place, reason))
    return kept


def _storyboard(path: Path, defaults: Defaults) -> Job | Refused:
    try:
        document = read_document(path)
        script_of(document)
        name = check_name(path.stem, str(path))
        return Job(name, str(path), document.data, defaults.settings(), document.origins)
    except InputError as error:
        return Refused(path.stem, str(path), str(error))


# --------------------------------------------------------------------------------------------------------- prompt files


def parse_prompts(content: bytes, path: Path, defaults: Defaults) -> Iterator[Job | Refused]:
    """The jobs of a prompt file, one a line; its ending says how lines are read.

    `.txt`: a prompt; `.jsonl`: an object; `.csv`: cells under the first line's names. Empty lines, and in `.txt` those
    that begin with `#`, are left out. Raises InputError where a CSV's first line is wrong, for then every line is.
    """
    lines = [(i, line) for i, line in enumerate(_lines(content), start=1) if line.strip()]
    read: Callable[[str], Plain]
    match path.suffix.lower():
        case ".txt":
            lines = [(i, line) for i, line in lines if not line.lstrip().startswith("#")]
            read = _prompt_alone
        case ".csv":
            header = _header(lines[0][1], f"{path}:{lines[0][0]}") if lines else []
            lines = lines[1:]

            def read(line: str) -> Plain:
                return _csv_row(line, header)

        case _:
            read = _json_object
    width = max(4, len(str(len(lines))))
    for i, line in lines:
        place, name = f"{path}:{i}", f"{path.stem}-{i:0{width}}"
        try:
            _check_text(line)
            yield _job(read(line), place, name, defaults)
        except InputError as error:
            text = str(error)
            yield Refused(name, place, text if text.startswith(place) else f"{place}: {text}")


def _lines(content: bytes) -> list[str]:
    text = content.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    return [line.removesuffix("\r") for line in text.split("\n")]


def _check_text(text: str) -> None:
    for character in text:
        match unicodedata.category(character):
            case "Cs":
                raise InputError("is not UTF-8 text")
            case "Cc" if character != "\t":
                raise InputError(f"control character {character!r}")
            case _:
                pass


def _prompt_alone(line: str) -> Plain:
    return {"prompt": line.strip()}


def _json_object(line: str) -> Plain:
    try:
        value = json.loads(line, object_pairs_hook=_unique_keys, parse_constant=_no_number)
    except RecursionError:
        raise InputError("is nested too deeply") from None
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"must be an object like {{'prompt': ...}}, not {show(value)}")
    _check_texts(value)
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> Plain:
    found: Plain = {}
    for key, value in pairs:
        if key in found:
            raise InputError(f"{show(key)} stands twice")
        found[key] = value
    return found


def _no_number(text: str) -> float:
    raise InputError(f"{text} is no number")


def _check_texts(value: Any) -> None:
    """Refuse control characters that escapes of JSON hold."""
    if isinstance(value, str):
        _check_text(value)
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_texts(part)


def _header(line: str, place: str) -> list[str]:
    try:
        _check_text(line)
        names = [cell.strip() for cell in _cells(line)]
        if "prompt" not in names:
            raise InputError(f"the first line must name the columns, with `prompt` among them, not {show(line)}")
        for name in names:
            _check_field(name)
            if names.count(name) > 1:
                raise InputError(f"the column {show(name)} stands twice")
    except InputError as error:
        raise InputError(f"{place}: {error}") from None
    return names


def _csv_row(line: str, header: Sequence[str]) -> Plain:
    cells = _cells(line)
    if len(cells) > len(header):
        raise InputError(f"{len(cells)} cells under {len(header)} columns: put text that holds a comma in quotes")
    filled = {name: cell.strip() for name, cell in zip(header, cells, strict=False) if cell.strip()}
    return {name: parse_scalar(cell) if name in _NUMBERS else cell for name, cell in filled.items()}


def _cells(line: str) -> list[str]:
    try:
        return next(csv.reader([line], strict=True, skipinitialspace=True))
    except csv.Error as error:
        raise InputError(f"is not CSV: {error}") from None


# ---------------------------------------------------------------------------------------------------------- one prompt


def _job(fields: Mapping[str, Any], place: str, name: str, defaults: Defaults) -> Job:
    """The job of one line. Raises InputError."""
    for key in fields:
        _check_field(key)
    settings = defaults.settings(tuple(f"{key}={_setting(fields[key])}" for key in fields if "." in key))
    if "name" in fields:
        if not isinstance(fields["name"], str):
            raise InputError(f"name: must be text, not {show(fields['name'])}")
        name = fields["name"].removesuffix(".mp4")
    story = _story(fields, place, defaults)
    job = Job(check_name(name, place), place, story, settings)
    assert job.script.scenes, "reading it checks it"
    return job


def _story(fields: Mapping[str, Any], place: str, defaults: Defaults) -> Plain:
    story = {key: fields[key] for key in _STORY_FIELDS if key in fields}
    given = [key for key in ("prompt", "scenes") if key in fields]
    if len(given) != 1:
        raise InputError(f"{place}: needs either `prompt` or `scenes`" + (", not both" if given else ""))
    if "scenes" in fields:
        if extra := [key for key in ("for", "seconds") if key in fields]:
            raise InputError(f"{place}: `{extra[0]}` belongs into the scenes")
        return {**story, "scenes": fields["scenes"]}
    return {**story, "scenes": [{"prompt": fields["prompt"], "for": _length(fields, defaults)}]}


def _length(fields: Mapping[str, Any], defaults: Defaults) -> Any:
    if "for" in fields and "seconds" in fields:
        raise InputError("`for` and `seconds` say the same: give one of them")
    if "seconds" not in fields:
        return fields.get("for", defaults.length)
    seconds = fields["seconds"]
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < 1e6:
        raise InputError(f"seconds: must be a number above zero, not {show(seconds)}")
    return f"{seconds:.6f}s"


def _setting(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None or isinstance(value, int | float | str):
        return "null" if value is None else str(value)
    return json.dumps(value)


def _check_field(name: str) -> None:
    if name not in _FIELDS and "." not in name:
        hint = nearest(name, _FIELDS)
        raise InputError(f"unknown field {show(name)}: {hint} (a setting has a dot, like sampler.steps)")


def check_name(name: str, place: str) -> str:
    """A film's name as it is, if it can be one of a file. Raises InputError."""
    wrong = ""
    if not name or name[0] in ".-" or name != name.strip():
        wrong = "must begin with a letter or digit, and hold no spaces at its ends"
    elif any(character in "/\\" or unicodedata.category(character) in ("Cc", "Cs") for character in name):
        wrong = "must hold no slashes and control characters"
    elif len(name.encode()) > MAX_NAME_BYTES:
        wrong = f"must be at most {MAX_NAME_BYTES} bytes long"
    if wrong:
        raise InputError(f"{place}: the name {show(name)} {wrong}")
    return name
