"""The config files of a checkpoint, read when they are asked for: no torch, no weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longvid.errors import InputError

FACTS_FILE = "longvid.json"
"""Beside a checkpoint, optional: what diffusers' configs do not say (fps, native size, vocabulary)."""


@dataclass(frozen=True)
class Configs:
    """What a pipeline's ``model_index.json`` says (`index`), the FACTS_FILE beside it (`extra`), and its parts.

    `loaded` has the parts' configs of a pipeline that is in memory; else they are in `root`.
    """

    name: str
    index: Mapping[str, Any]
    extra: Mapping[str, Any]
    root: Path | None = None
    loaded: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def pipeline(self) -> str:
        """The name of the pipeline's class."""
        return str(self.index.get("_class_name"))

    @property
    def place(self) -> str:
        """Where it is, for messages."""
        return str(self.root or self.name)

    def has(self, part: str) -> bool:
        """Whether the pipeline has such a part."""
        entry = self.index.get(part)
        return isinstance(entry, list | tuple) and entry[0] is not None

    def of(self, part: str) -> Mapping[str, Any]:
        """The config of a part. Raises InputError, naming the file."""
        if part in self.loaded:
            return self.loaded[part]
        assert self.root is not None
        return read_json(self.root / part / "config.json")


def read_configs(name: str, root: Path) -> Configs:
    """The configs of a directory in diffusers' format. Raises InputError, naming the file."""
    return Configs(name, read_json(root / "model_index.json"), extra_facts(root), root)


def extra_facts(root: Path) -> dict[str, Any]:
    """What the FACTS_FILE of a checkpoint's directory says, if there is one."""
    path = root / FACTS_FILE
    return read_json(path) if path.exists() else {}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises InputError, naming the file."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object")
    return value
