"""Where a model is, and what planning needs to know of it, from its config files alone: no torch, no weights."""

from __future__ import annotations

from importlib.resources import files
from os.path import expanduser
from pathlib import Path

from longvid.errors import InputError
from longvid.models import families
from longvid.models.configs import Configs, read_configs
from longvid.models.families import family_of, read_facts, read_sizes
from longvid.models.hub import SHORT_NAMES, HubModel
from longvid.models.known import KNOWN, known_configs
from longvid.models.parts import ModelPart, part_bytes
from longvid.models.sizes import Sizes
from longvid.plan import ModelFacts

NAMES = {"mini": "assets/mini"}


def find_model(name: str, *, weights: bool = True) -> Path:
    """The directory of a model: a known name, a path, or an id of the Hugging Face Hub, downloaded if need be.

    Of a model on the Hub no weights are fetched unless asked for. Raises InputError when there is none.
    """
    if name in NAMES:
        return Path(str(files("longvid").joinpath(NAMES[name])))
    path = Path(expanduser(name))
    if path.is_dir():
        return path
    model = hub_model(name)
    if model is None:
        known = ", ".join((*sorted(NAMES), *SHORT_NAMES))
        raise InputError(
            f"model.path: {name!r} is neither a directory nor a known name ({known}), nor an id like OWNER/NAME"
        )
    return model.fetch(weights=weights)


def hub_model(name: str) -> HubModel | None:
    """What a name means on the Hub; None for what is on this machine, and for what is no name there."""
    return None if name in NAMES or Path(expanduser(name)).is_dir() else HubModel.of(name)


def configs_of(name: str) -> Configs:
    """The configs of a model, which need not be on this machine if it is a known one. Raises InputError."""
    model = hub_model(name)
    if model and model.published_name in KNOWN:
        return known_configs(model.published_name)
    return read_configs(name, find_model(name, weights=False))


def weight_bytes(name: str, part: ModelPart, itemsize: int) -> int:
    """Bytes of a part's weights: by the headers of the files, of both experts where there are two; else by configs."""
    configs = configs_of(name)
    folders = [configs.root / name for name in ("transformer", "transformer_2")] if configs.root else []
    if any(any(folder.glob("*.safetensors")) for folder in folders):
        names = family_of(configs).parts.of(configs.of("transformer"))
        return sum(part_bytes(folder, part, names, itemsize) for folder in folders)
    return itemsize * read_sizes(configs).part_params(part)


def facts_of(name: str) -> ModelFacts:
    """What planning needs to know of a checkpoint, from its config files alone. Raises InputError."""
    return read_facts(configs_of(name))


def sizes_of(name: str) -> Sizes:
    """What a checkpoint's parts take and cost, from its config files alone. Raises InputError."""
    return read_sizes(configs_of(name))


def known_sizes(name: str) -> Sizes | None:
    """The same; None where it is not known of such a checkpoint."""
    return families.known_sizes(configs_of(name))
