"""Where a model is, and what planning needs to know of it, from its config files alone: no torch, no weights."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from longvid.errors import InputError
from longvid.models.configs import Configs, read_configs
from longvid.models.families import family_of, read_facts, read_sizes
from longvid.models.known import KNOWN, known_configs
from longvid.models.parts import ModelPart, part_bytes
from longvid.models.sizes import Sizes
from longvid.plan import ModelFacts

NAMES = {"mini": "assets/mini"}


def find_model(name: str) -> Path:
    """The directory of a model: a known name, or a path. Raises InputError when there is none."""
    if name in NAMES:
        return Path(str(files("longvid").joinpath(NAMES[name])))
    path = Path(name).expanduser()
    if not path.is_dir():
        known = ", ".join(sorted(NAMES))
        if name in KNOWN:
            raise InputError(
                f"model.path: of {name} longvid has the configs alone, for `longvid plan`: give a directory"
            )
        raise InputError(f"model.path: {name!r} is neither a directory nor a known name ({known})")
    return path


def configs_of(name: str) -> Configs:
    """The configs of a model, which need not be on this machine if it is a known one. Raises InputError."""
    is_near = name in NAMES or Path(name).expanduser().is_dir()
    return known_configs(name) if name in KNOWN and not is_near else read_configs(name, find_model(name))


def weight_bytes(name: str, part: ModelPart, itemsize: int) -> int:
    """Bytes of a part's weights: by the headers of the files, of both experts where there are two; else by configs."""
    configs = configs_of(name)
    folders = [configs.root / name for name in ("transformer", "transformer_2")] if configs.root else []
    if any(any(folder.glob("*.safetensors")) for folder in folders):
        return sum(part_bytes(folder, part, family_of(configs).parts, itemsize) for folder in folders)
    return itemsize * read_sizes(configs).part_params(part)


def facts_of(name: str) -> ModelFacts:
    """What planning needs to know of a checkpoint, from its config files alone. Raises InputError."""
    return read_facts(configs_of(name))


def sizes_of(name: str) -> Sizes:
    """What a checkpoint's parts take and cost, from its config files alone. Raises InputError."""
    return read_sizes(configs_of(name))
