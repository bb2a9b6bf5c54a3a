"""LoRA files: which weights of a transformer they change, checked by the files' headers, and the changed weights.

A LoRA (Hu et al. 2021, arXiv:2106.09685) adds ``weight · scale · up · down`` to a weight, and it may be a difference to
the bias. It is added as weights are read, in fp32, so a stage reads of the file what its own layers need. Names may be
those of diffusers and peft, or the original model's (with dots, or with underscores as kohya's scripts write them).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os.path import expanduser
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from longvid.errors import InputError
from longvid.models.parts import read_metadata, read_shapes
from longvid.settings import LoraSettings

_FOLDERS = {"both": ("transformer", "transformer_2"), "high": ("transformer",), "low": ("transformer_2",)}
_PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.", "lora_unet_")
_ENDINGS = {
    "down": (".lora_A.weight", ".lora_A.default.weight", ".lora_down.weight", ".lora.down.weight"),
    "up": (".lora_B.weight", ".lora_B.default.weight", ".lora_up.weight", ".lora.up.weight"),
    "bias": (".lora_B.bias", ".lora_B.default.bias", ".diff_b"),
    "difference": (".diff",),
    "alpha": (".alpha",),
}
_METADATA = "lora_adapter_metadata"
"""Where diffusers keeps the adapter's config in a file's header."""


@dataclass
class _Change:
    """Names of the tensors that change a module, in the file; `scale` is of all, an `alpha` of up and down alone."""

    names: dict[str, str] = field(default_factory=dict)
    scale: float = 1.0


@dataclass(frozen=True)
class Lora:
    """A file that was found to fit. `changes` goes by a module's name in the transformer."""

    path: Path
    weight: float
    folders: Sequence[str]
    changes: Mapping[str, _Change]

    def changed(self, name: str, value: Tensor) -> Tensor:
        """A tensor of the transformer with this LoRA: fp32 if it changes it, else as it is."""
        module, _, kind = name.rpartition(".")
        change = self.changes.get(module)
        if change is None or kind not in ("weight", "bias"):
            return value
        with safe_open(self.path, framework="pt") as file:
            tensors = {part: file.get_tensor(key).float() for part, key in change.names.items() if _is_of(part, kind)}
        if not tensors:
            return value
        delta = tensors.get("bias", tensors.get("difference", 0.0))
        if "up" in tensors:
            up, down = tensors["up"].flatten(1), tensors["down"].flatten(1)
            scale = tensors["alpha"].item() / len(down) if "alpha" in tensors else 1.0
            delta = delta + (scale * up @ down).view(value.shape)
        result: Tensor = value.float() + self.weight * change.scale * delta
        return result


def _is_of(part: str, kind: str) -> bool:
    return (part == "bias") == (kind == "bias")


def open_loras(entries: Sequence[LoraSettings], root: Path, original_names: Mapping[str, str]) -> list[Lora]:
    """The LoRAs of the settings, for a checkpoint in `root`; no weights are read.

    `original_names` says what the original model calls some modules that diffusers calls otherwise. Raises InputError
    that names the file: for one that is no safetensors, holds something else than LoRAs, or is for another model.
    """
    return [_open(entry, root, original_names) for entry in entries]


def _open(entry: LoraSettings, root: Path, original_names: Mapping[str, str]) -> Lora:
    path, config = _find(Path(expanduser(entry.path)))
    folders = [folder for folder in _FOLDERS[entry.expert] if (root / folder).is_dir()]
    if entry.expert != "both" and not (root / "transformer_2").is_dir():
        raise InputError(f"model.lora: {path}: expert must be both, not {entry.expert}: {root} has one transformer")
    shapes = read_shapes(path)
    weights = [_shapes_of(root / folder) for folder in folders]
    changes = _changes(path, shapes, _aliases(weights[0], original_names), root)
    for module, change in changes.items():
        for known in weights:
            _check(path, root, module, {part: shapes[key] for part, key in change.names.items()}, known)
    for module, change in changes.items():
        if "down" in change.names:
            change.scale = _scale(config, module, rank=shapes[change.names["down"]][0])
    return Lora(path, entry.weight, folders, changes)


def _find(path: Path) -> tuple[Path, Mapping[str, Any]]:
    """A file, or the one in a folder that peft wrote; and the adapter's config, if there is one."""
    if path.is_dir():
        file, beside = path / "adapter_model.safetensors", path / "adapter_config.json"
        config = _config(beside, beside.read_text()) if beside.exists() else {}
    else:
        file, config = path, {}
    if not file.is_file():
        raise InputError(f"model.lora: {file}: there is no such file")
    if file.suffix != ".safetensors":
        raise InputError(f"model.lora: {file}: is not a .safetensors file (pickles and other formats are never loaded)")
    inside = read_metadata(file).get(_METADATA)
    return file, _config(file, inside) if inside else config


def _config(path: Path, text: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
        return {key.removeprefix("transformer."): value for key, value in config.items()}
    except (ValueError, AttributeError) as error:
        raise InputError(f"model.lora: {path}: its adapter config is not JSON ({error})") from None


def _shapes_of(folder: Path) -> dict[str, list[int]]:
    return {name: shape for path in sorted(folder.glob("*.safetensors")) for name, shape in read_shapes(path).items()}


def _aliases(names: Iterable[str], original_names: Mapping[str, str]) -> dict[str, str]:
    """Each module's name in the transformer, by all the names that a file may have for it."""
    aliases = {}
    for module in {name.rpartition(".")[0] for name in names}:
        spellings = [module]
        for ours, theirs in original_names.items():
            if module == ours or module.endswith(f".{ours}"):
                spellings.append(module.removesuffix(ours) + theirs)
        for spelling in spellings:
            aliases[spelling] = aliases[spelling.replace(".", "_")] = module
    return aliases


def _changes(path: Path, keys: Iterable[str], aliases: Mapping[str, str], root: Path) -> dict[str, _Change]:
    """What a file changes, by module."""
    changes: dict[str, _Change] = {}
    for key in sorted(keys):
        module, part = _split(path, key)
        if part in ("difference", "bias") and ".diff" in key and "norm" in module:
            continue  # norms' differences are there for completeness, and zero; diffusers leaves them out, too
        if module not in aliases:
            raise InputError(f"model.lora: {path}: is for another model: {root} has no module {module!r} ({key})")
        changes.setdefault(aliases[module], _Change()).names[part] = key
    if not changes:
        raise InputError(f"model.lora: {path}: holds no LoRA")
    return changes


def _split(path: Path, key: str) -> tuple[str, str]:
    """A tensor's module, without what formats put in front, and which part of its change it is."""
    for part, endings in _ENDINGS.items():
        for ending in endings:
            if key.endswith(ending):
                module = key.removesuffix(ending)
                for prefix in _PREFIXES:
                    module = module.removeprefix(prefix)
                return module, part
    raise InputError(f"model.lora: {path}: {key} is of no LoRA (DoRA, LoKr and other adapters cannot be loaded)")


def _check(
    path: Path, root: Path, module: str, parts: Mapping[str, Sequence[int]], weights: Mapping[str, Sequence[int]]
) -> None:
    """Refuse parts of a change whose shapes do not make up the module's."""

    def refuse(what: str) -> InputError:
        return InputError(f"model.lora: {path}: is for another model than {root}: {module} {what}")

    weight, bias = weights.get(f"{module}.weight"), weights.get(f"{module}.bias")
    up, down, difference = parts.get("up"), parts.get("down"), parts.get("difference")
    if (up is None) != (down is None):
        raise refuse("has one of its two matrices alone")
    if "alpha" in parts and math.prod(parts["alpha"]) != 1:
        raise refuse(f"has an alpha of shape {list(parts['alpha'])}")
    if up is not None and down is not None:
        fits = weight and len(up) > 1 and [up[0], *down[1:]] == list(weight) and math.prod(up[1:]) == down[0]
        if not fits:
            raise refuse(f"is {weight} there, and the LoRA's matrices are {list(down)} and {list(up)}")
    if difference is not None and list(difference) != weight:
        raise refuse(f"is {weight} there, and the LoRA's difference is {list(difference)}")
    if "bias" in parts and list(parts["bias"]) != bias:
        raise refuse(f"has a bias of {bias} there, and of {list(parts['bias'])} in the LoRA")


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / rank by an adapter's config, as peft has it; 1 without one."""
    alpha = config.get("lora_alpha")
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            alpha = value
    if alpha is None:
        return 1.0
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
