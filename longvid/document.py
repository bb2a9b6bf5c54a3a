"""YAML as plain data in which every value knows its place, and its validation with messages that name that place.

We read YAML's events ourselves instead of loading objects: every value gets a line, and aliases, tags, duplicate keys
and deep nesting are refused before they cost anything. Scalars follow YAML 1.2's core schema: `no` and `1:30` are text,
`1e-3` is a number.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from longvid.errors import InputError

Loc = tuple[str | int, ...]
"""Where a value stands: keys and list positions from the top."""


@dataclass(frozen=True)
class Document:
    """Plain data (dicts, lists, scalars), and the origin of each value: its line, or the option that set it."""

    name: str
    data: Any
    origins: dict[Loc, int | str] = field(default_factory=dict)

    def place(self, loc: Loc) -> str:
        """Where a value stands, like `story.yaml:12`; where it was left out, the place of what stands nearest."""

        def nearness(item: tuple[int, Loc]) -> tuple[int, bool, int, int]:
            order, known = item
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(known, loc, strict=False)))
            # An option is nearer than the file: it came last.
            return same, isinstance(self.origins[known], str), -len(known), order

        if not self.origins:
            return self.name
        origin = self.origins[max(enumerate(self.origins), key=nearness)[1]]
        return f"{self.name}:{origin}" if isinstance(origin, int) else origin

    def line(self, loc: Loc) -> int:
        """The line of a value; 0 for one that no line of the file holds."""
        origin = self.origins.get(loc, 0)
        return origin if isinstance(origin, int) else 0

    def set(self, keys: tuple[str, ...], value: Any, option: str) -> None:
        """Set one value, as an option does. Raises InputError where a key on the way holds no mapping."""
        node = self.data
        for i, key in enumerate(keys[:-1]):
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise InputError(f"{option}: {'.'.join(keys[: i + 1])} is not a section")
        node[keys[-1]] = value
        self.origins[keys] = option


# ------------------------------------------------------------------------------------------------------------- reading

MAX_BYTES = 1 << 20
MAX_DEPTH = 16

_CONTROL = re.compile("[^\\t\\n\\r\\x20-\\x7e\\x85\\xa0-\\ud7ff\\ue000-\\ufffd\U00010000-\U0010ffff]")
_INT = re.compile(r"[-+]?[0-9]{1,20}")
_FLOAT = re.compile(r"[-+]?(?:[0-9]{1,20}(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,4})?")
_WORDS: dict[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf"), float("inf")),
    "-.inf": float("-inf"),
}


def read_document(path: Path) -> Document:
    """Read a YAML file. Raises InputError for a file that cannot be read or is not a small, plain YAML document."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return parse_document(content, str(path))


def parse_document(content: str | bytes, name: str) -> Document:
    """Parse a YAML text; `name` stands for the file in messages. Raises InputError with the line."""
    try:
        data = content.encode() if isinstance(content, str) else content
        if len(data) > MAX_BYTES:
            raise InputError(f"{name}: is larger than {MAX_BYTES >> 20} MiB")
        text = data.decode("utf-8-sig")
    except UnicodeError as error:
        raise InputError(f"{name}: is not UTF-8 text") from error
    if control := _CONTROL.search(text):
        line = text.count("\n", 0, control.start()) + 1
        raise InputError(f"{name}:{line}: control character {control[0]!r}")
    return _Reader(text, name).read()


def parse_scalar(text: str) -> Any:
    """An unquoted YAML scalar as null, bool, int, float or str."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def check_characters(text: str, place: str) -> None:
    """Refuse a text that no document could hold. Raises InputError."""
    if control := _CONTROL.search(text):
        raise InputError(f"{place}: control character {control[0]!r}")


class _Reader:
    """Builds a Document from the events of one YAML stream."""

    def __init__(self, text: str, name: str) -> None:
        # libyaml is a hundred times faster than PyYAML's own scanner; their events are the same.
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        self.events: Iterator[Any] = iter(yaml.parse(text, Loader=loader))
        self.text = text
        self.name = name
        self.lines: dict[Loc, int | str] = {}

    def read(self) -> Document:
        try:
            next(self.events)  # the start of the stream
            data = None
            if isinstance(next(self.events), yaml.DocumentStartEvent):
                data = self.value(next(self.events), ())
                next(self.events)  # the end of the document
                extra = next(self.events)
                if not isinstance(extra, yaml.StreamEndEvent):
                    self.refuse(extra, "a second document starts here; a file holds one")
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            text = ": ".join(part for part in (error.context, error.problem) if part)
            lines = self.text.splitlines() or [""]
            line = min(mark.line, len(lines) - 1) if mark else 0  # what is missing at the end, libyaml misses behind it
            if re.match(" *\t", lines[line]):
                text = "indent with spaces, not tabs"
            raise InputError(f"{self.name}:{line + 1}: is not valid YAML: {text}") from error
        except yaml.YAMLError as error:
            raise InputError(f"{self.name}: is not valid YAML: {error}") from error
        return Document(self.name, data, self.lines)

    def value(self, event: Any, loc: Loc) -> Any:
        self.lines.setdefault(loc, _line(event))
        self.check(event)
        if isinstance(event, yaml.ScalarEvent):
            return parse_scalar(event.value) if event.implicit[0] else event.value
        if len(loc) == MAX_DEPTH:
            self.refuse(event, f"nested more than {MAX_DEPTH} levels deep")
        return self.sequence(loc) if isinstance(event, yaml.SequenceStartEvent) else self.mapping(loc)

    def sequence(self, loc: Loc) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            items.append(self.value(event, (*loc, len(items))))
        return items

    def mapping(self, loc: Loc) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                self.refuse(event, "a key must be a word")
            self.check(event)
            key = event.value
            if key in entries:
                self.refuse(event, f"{show(key)} stands twice, first at line {self.lines[(*loc, key)]}")
            self.lines[(*loc, key)] = _line(event)
            entries[key] = self.value(next(self.events), (*loc, key))
        return entries

    def check(self, event: Any) -> None:
        if event.anchor is not None:  # an alias has one too
            self.refuse(event, "anchors and aliases are not supported; write the value out")
        if event.tag is not None:
            self.refuse(event, f"tags are not supported: {show(event.tag)}")
        if isinstance(event, yaml.ScalarEvent) and (control := _CONTROL.search(event.value)):
            self.refuse(event, f"control character {control[0]!r}")  # from an escape in double quotes

    def refuse(self, event: Any, message: str) -> NoReturn:
        raise InputError(f"{self.name}:{_line(event)}: {message}")


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1


# ---------------------------------------------------------------------------------------------------------- validation


class Section(BaseModel):
    """A mapping with fixed keys: frozen, no coercion, and an unknown key names the nearest known one."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any) -> Any:
        known = [info.alias or name for name, info in cls.model_fields.items()]
        for key in data if isinstance(data, Mapping) else ():
            if key not in known:
                context = {"key": key, "shown": show(key), "hint": nearest(str(key), known)}
                raise PydanticCustomError("unknown_key", "unknown key {shown}: {hint}", context)
        return data


def with_policy(data: Any, default: str, known: Sequence[str]) -> Any:
    """A section whose keys depend on its `policy`: `default` unless named; an unknown one names the nearest."""
    if not isinstance(data, Mapping):
        return data
    policy = data.get("policy", default)
    if policy not in known:
        context = {"shown": show(policy), "hint": nearest(str(policy), known)}
        raise PydanticCustomError("unknown_policy", "unknown policy {shown}: {hint}", context)
    return {"policy": policy, **data}


SectionT = TypeVar("SectionT", bound=Section)


def validate(model: type[SectionT], document: Document) -> SectionT:
    """The document as `model`. Raises InputError with the place of the first thing that is wrong."""
    try:
        return model.model_validate(document.data)
    except ValidationError as error:
        first = error.errors()[0]
        first["loc"] = _in_document(first["loc"], document.data)
        loc = (*first["loc"], first["ctx"]["key"]) if first["type"] == "unknown_key" else first["loc"]
        if first["type"] == "too_much_beside" and loc not in document.origins:  # it is the other that somebody set
            loc = (*loc[:-1], first["ctx"]["beside"])
        raise InputError(f"{document.place(loc)}: {_describe(first)}") from None


def _in_document(loc: Loc, data: Any) -> Loc:
    """A place without the tags that pydantic adds where a mapping's kind depends on one of its values."""
    known: list[str | int] = []
    for key in loc:
        inside = isinstance(data, dict) and key in data
        if known and isinstance(data, dict) and not inside and key in (data.get("policy"), "dense", "none"):
            continue
        known.append(key)
        data = data[key] if inside or (isinstance(data, list) and isinstance(key, int) and key < len(data)) else None
    return tuple(known)


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: the nearest known one, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(word[:64], known, n=1, cutoff=0.45)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"


def _describe(error: ErrorDetails) -> str:
    name, kind = _name(error["loc"]), error["type"]
    if kind in ("unknown_key", "unknown_policy", "too_much_beside"):
        return f"{name}: {error['msg']}" if name else error["msg"]
    if kind == "missing":
        return f"{name!r} is missing"
    if kind == "value_error":
        return f"{name}: {error['ctx']['error']}" if name else str(error["ctx"]["error"])
    if kind in ("too_short", "too_long"):
        bound, number = ("least", "min_length") if kind == "too_short" else ("most", "max_length")
        unit = "characters" if isinstance(error["input"], str) else "items"
        return f"{name}: must hold at {bound} {error['ctx'][number]} {unit}, not {error['ctx']['actual_length']}"
    special = {"model_type": "must be a mapping of keys to values", "string_type": "must be text (put it in quotes)"}
    what = special.get(kind) or re.sub(r"^\w+ should", "must", error["msg"])
    return f"{name}: {what}, not {show(error['input'])}".removeprefix(": ")


def _name(loc: Loc) -> str:
    """`queue.left`; inside a list only what follows the position, for the line says which item it is."""
    keys = loc
    for i, key in enumerate(loc[:-1]):
        if isinstance(key, int):
            keys = loc[i + 1 :]
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).removeprefix(".")


def show(value: Any) -> str:
    """A value as a message shows it: short, and on one line."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:56]}...{text[0]}"
