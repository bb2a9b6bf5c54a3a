"""Opens a checkpoint of any family: a stock diffusers directory, or a pipeline that is in memory."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from longvid.errors import InputError
from longvid.models.checkpoint import Checkpoint
from longvid.models.configs import Configs, extra_facts, read_configs
from longvid.models.facts import find_model
from longvid.models.families import FAMILIES, family_of, read_facts
from longvid.models.lora import open_loras
from longvid.models.offload import require_zero
from longvid.models.quantize import require_torchao
from longvid.models.weights import Loading
from longvid.parallel.collectives import LONE, Group
from longvid.settings import Settings


def open_checkpoint(name: str) -> Checkpoint:
    """Check a diffusers directory and read what is small.

    Raises InputError, naming the file, for anything missing, corrupt, truncated, or not safetensors.
    """
    return _open(read_configs(name, find_model(name)), None)


def checkpoint_of(pipeline: Any) -> Checkpoint:
    """A pipeline that is already loaded, its parts where they are and in their dtype. InputError for what is none."""
    if not isinstance(pipeline, DiffusionPipeline):
        raise InputError(f"model: a {type(pipeline).__name__} is no name, no path, and no pipeline of diffusers")
    origin = Path(str(pipeline.config.get("_name_or_path") or ""))
    extra = extra_facts(origin) if origin.is_dir() else {}
    index = {**pipeline.config, "_class_name": type(pipeline).__name__}
    parts = {name: part.config for name, part in pipeline.components.items() if hasattr(part, "config")}
    loaded = {name: config.to_dict() if hasattr(config, "to_dict") else config for name, config in parts.items()}
    return _open(Configs("pipeline", index, extra, origin if extra else None, loaded), pipeline)


def open_loading(checkpoint: Checkpoint, settings: Settings, device: torch.device, peers: Group = LONE) -> Loading:
    """What becomes of the transformer's weights as they are read; `peers` share a unit's tokens.

    Raises InputError for LoRAs that do not fit, and for what this machine or a pipeline in memory cannot do.
    """
    memory, root = settings.memory, checkpoint.root
    wishes = {"model.lora": bool(settings.model.lora), "memory.offload": memory.offload != "none"}
    wishes["memory.quantize"] = memory.quantize != "none"
    if root is None or checkpoint.pipeline is not None:
        wished = ", ".join(name for name, is_wished in wishes.items() if is_wished)
        if wished:
            raise InputError(f"{wished}: the pipeline is in memory already, so do this to the pipeline itself")
        return Loading()
    if memory.offload == "host" and device.type == "cpu":
        raise InputError("memory.offload must be none or disk, not host: the layers run from host memory as it is")
    if memory.offload == "zero":
        _require_peers(settings, device, peers)
    if memory.quantize != "none":
        require_torchao()
    names = next(family.parts for family in FAMILIES if family.name == checkpoint.facts.family)
    return Loading(open_loras(settings.model.lora, root, names.original), memory, peers)


def _require_peers(settings: Settings, device: torch.device, peers: Group) -> None:
    """Refuse to spread weights where they cannot be. Raises InputError."""
    if peers.size == 1:
        raise InputError("memory.offload: zero spreads weights over the ranks of mesh.seq, and here that is 1: set it")
    if settings.memory.quantize != "none":
        raise InputError("memory.offload: zero splits no weights of 8 bits: memory.quantize must be none")
    require_zero(device)


def _open(configs: Configs, pipeline: Any) -> Checkpoint:
    facts = read_facts(configs)
    checkpoint: Checkpoint = import_module(family_of(configs).module).open_family(configs, facts, pipeline)
    return checkpoint
