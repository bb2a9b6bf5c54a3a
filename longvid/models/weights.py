"""Weights of a diffusers directory: checked, and read a part at a time. Safetensors only, never pickles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoTokenizer

from longvid.errors import InputError
from longvid.models.configs import Configs, read_json
from longvid.models.parts import ModelPart, PartNames


def take_layers(part: ModelPart, layers: nn.ModuleList, start: int = 0) -> nn.ModuleList:
    """A part's own of some layers, of which the first is layer ``start`` of the model."""
    return nn.ModuleList(layer for index, layer in enumerate(layers, start) if index in part.layers)


def load_part(
    kind: Any, folder: Path, part: ModelPart, names: PartNames, dtype: torch.dtype, device: torch.device
) -> Any:
    """A part of the transformer (class `kind`) in ``folder``: no tensor of other parts is read or allocated."""
    config = kind.load_config(folder)
    with init_empty_weights(include_buffers=False):  # rotary tables are not in the checkpoint
        dit = kind.from_config(config)
    names = names.of(config)
    wanted = {name for name in dit.state_dict() if part.owns(name, names)}
    for layers, start in names.lists.items():
        setattr(dit, layers, take_layers(part, getattr(dit, layers), start))
    in_fp32 = set(dit._keep_in_fp32_modules or ())
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in wanted & set(file.keys()):
                kept = torch.float32 if in_fp32 & set(name.split(".")) else dtype
                value = file.get_tensor(name)
                set_module_tensor_to_device(dit, part.local_name(name, names), device, value, dtype=kept)
                wanted.discard(name)
    if wanted:
        raise InputError(f"{folder}: lacks {len(wanted)} tensors that its config asks for, first {min(wanted)}")
    for module in dit.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, buffer.to(device), persistent=False)
    return dit.eval()


def load_whole(kind: Any, folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """A whole part of a pipeline. Raises InputError where the files lack tensors."""
    model, info = kind.from_pretrained(folder, dtype=dtype, use_safetensors=True, output_loading_info=True)
    missing = info["missing_keys"]
    if missing:
        raise InputError(f"{folder}: lacks {len(missing)} tensors that its config asks for, first {sorted(missing)[0]}")
    return model.eval().to(device)


def load_vae(kind: Any, root: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """A directory's VAE, in fp32 on a CPU."""
    return load_whole(kind, root / "vae", torch.float32 if device.type == "cpu" else dtype, device)


def load_text(kind: Any, root: Path, dtype: torch.dtype, device: torch.device, suffix: str = "") -> tuple[Any, Any]:
    """A directory's tokenizer, and its text encoder of a class ``kind``; ``suffix`` names those of several."""
    encoder = kind.from_pretrained(root / f"text_encoder{suffix}", dtype=dtype, use_safetensors=True)
    return AutoTokenizer.from_pretrained(root / f"tokenizer{suffix}"), encoder.eval().to(device)


def check_weights(root: Path, parts: Sequence[str]) -> None:
    """Open every weight file's header, so that a missing or truncated one is named before anything is loaded."""
    for part in parts:
        found = sorted((root / part).glob("*.safetensors"))
        for index in (root / part).glob("*.safetensors.index.json"):
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict):
                raise InputError(f"{index}: has no weight_map")
            for shard in sorted(set(map(str, shards.values()))):
                if not (root / part / shard).is_file():
                    raise InputError(f"{root / part / shard}: is missing, and {index.name} names it")
        if not found:
            raise InputError(f"{root / part}: holds no .safetensors file (other formats are never loaded)")
        for path in found:
            try:
                with safe_open(path, framework="pt") as file:
                    file.keys()
            except (SafetensorError, OSError) as error:
                raise InputError(f"{path}: is corrupt or truncated ({error})") from None


def load_scheduler(configs: Configs) -> Any:
    """The pipeline's scheduler, whatever class of diffusers it is. Raises InputError for an unknown one."""
    import diffusers

    assert configs.root is not None
    name = (configs.index.get("scheduler") or [None, None])[1]
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if kind is None:
        raise InputError(f"{configs.root / 'model_index.json'}: unknown scheduler {name!r}")
    return kind.from_pretrained(configs.root / "scheduler")


@contextmanager
def errors_name(root: Path, family: str) -> Iterator[None]:
    """What libraries raise for a damaged checkpoint becomes an InputError that names it."""
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        if "memory" in str(error):
            raise
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{root}: cannot be loaded as a {family} checkpoint ({first})") from error
