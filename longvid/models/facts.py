"""Where a model is, and what planning needs to know of it, from its config files alone: no torch, no weights."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from longvid.errors import InputError
from longvid.models.configs import read_configs
from longvid.models.families import family_of, read_facts
from longvid.models.parts import ModelPart, part_bytes
from longvid.plan import ModelFacts

NAMES = {"mini": "assets/mini"}


def find_model(name: str) -> Path:
    """The directory of a model: a known name, or a path. Raises InputError when there is none."""
    if name in NAMES:
        return Path(str(files("longvid").joinpath(NAMES[name])))
    path = Path(name).expanduser()
    if not path.is_dir():
        known = ", ".join(sorted(NAMES))
        raise InputError(f"model.path: {name!r} is neither a directory nor a known name ({known})")
    return path


def weight_bytes(name: str, part: ModelPart, itemsize: int) -> int:
    """Bytes of a part's weights, by the headers of the files: of both experts, where there are two."""
    root = find_model(name)
    configs = read_configs(name, root)
    names = family_of(configs).parts.of(configs.of("transformer"))
    return sum(part_bytes(root / folder, part, names, itemsize) for folder in ("transformer", "transformer_2"))


def facts_of(name: str) -> ModelFacts:
    """What planning needs to know of a checkpoint, from its config files alone. Raises InputError."""
    return read_facts(read_configs(name, find_model(name)))
