"""Opens a checkpoint of any family: a stock diffusers directory, or a pipeline that is in memory."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from longvid.models.checkpoint import Checkpoint
from longvid.models.configs import Configs, extra_facts, read_configs
from longvid.models.facts import find_model
from longvid.models.families import family_of, read_facts


def open_checkpoint(name: str) -> Checkpoint:
    """Check a diffusers directory and read what is small.

    Raises InputError, naming the file, for anything missing, corrupt, truncated, or not safetensors.
    """
    return _open(read_configs(name, find_model(name)), None)


def checkpoint_of(pipeline: Any) -> Checkpoint:
    """A pipeline that is already loaded, its parts where they are and in their dtype."""
    origin = Path(str(pipeline.config.get("_name_or_path") or ""))
    extra = extra_facts(origin) if origin.is_dir() else {}
    index = {**pipeline.config, "_class_name": type(pipeline).__name__}
    loaded = {name: part.config for name, part in pipeline.components.items() if hasattr(part, "config")}
    return _open(Configs("pipeline", index, extra, origin if extra else None, loaded), pipeline)


def _open(configs: Configs, pipeline: Any) -> Checkpoint:
    facts = read_facts(configs)
    checkpoint: Checkpoint = import_module(family_of(configs).module).open_family(configs, facts, pipeline)
    return checkpoint
