"""Weights of a diffusers directory: checked, and read a part at a time. Safetensors only, never pickles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoTokenizer

from longvid.errors import InputError
from longvid.models.configs import Configs, read_json
from longvid.models.lora import Lora
from longvid.models.offload import FillLayer, ZeroLayers, offload_layers
from longvid.models.parts import ModelPart, PartNames, read_shapes
from longvid.models.quantize import quantize_layer
from longvid.parallel.collectives import LONE, Group
from longvid.settings import MemorySettings


def take_layers(part: ModelPart, layers: nn.ModuleList, start: int = 0) -> nn.ModuleList:
    """A part's own of some layers, of which the first is layer ``start`` of the model."""
    return nn.ModuleList(layer for index, layer in enumerate(layers, start) if index in part.layers)


@dataclass(frozen=True)
class Loading:
    """What becomes of a transformer's weights: LoRAs are added, layers are quantized, and wait elsewhere.

    `peers` are the ranks that share a unit's tokens, of which each can keep a part.
    """

    loras: Sequence[Lora] = ()
    memory: MemorySettings = field(default_factory=MemorySettings)
    peers: Group = LONE


def load_part(
    kind: Any,
    folder: Path,
    part: ModelPart,
    names: PartNames,
    dtype: torch.dtype,
    device: torch.device,
    loading: Loading | None = None,
) -> Any:
    """A part of the transformer (class `kind`) in ``folder``: no tensor of other parts is read or allocated.

    With `memory.offload` its layers hold nothing until they are called (``longvid.models.offload``).
    """
    loading = loading or Loading()
    config = kind.load_config(folder)
    with init_empty_weights(include_buffers=False):  # rotary tables are not in the checkpoint
        dit = kind.from_config(config)
    names = names.of(config)
    wanted = {name: list(value.shape) for name, value in dit.state_dict().items() if part.owns(name, names)}
    files = _WeightFiles(folder, wanted, dtype, set(dit._keep_in_fp32_modules or ()), loading)
    num_layers = sum(len(getattr(dit, layers)) for layers in names.lists)
    prefixes = _take_part(dit, part, names)
    for name, value in files.read(lambda name: name.partition(".")[0] not in names.lists):
        set_module_tensor_to_device(dit, name, device, value, dtype=value.dtype)
    _move_buffers(dit, device)
    is_end = [layer in (0, num_layers - 1) for layer in part.layers]

    def fill(index: int, layer: nn.Module, to: torch.device) -> None:
        """Read a layer's weights into it: its own of `index` in the part, or another of its kind."""
        prefix = prefixes[index]
        for name, value in files.read(lambda name: name.startswith(prefix)):
            set_module_tensor_to_device(layer, name.removeprefix(prefix), to, value, dtype=value.dtype)
        if loading.memory.quantize != "none" and not is_end[index]:
            quantize_layer(layer, loading.memory.quantize)

    first, lists = 0, [getattr(dit.eval(), name) for name in names.lists]
    if loading.memory.offload == "zero":
        ZeroLayers([layer for layers in lists for layer in layers], fill, device, loading.memory.group, loading.peers)
        return dit
    for layers in lists:
        if loading.memory.offload == "none":
            for index, layer in enumerate(layers, first):
                fill(index, layer, device)
        elif len(layers):
            offload_layers(layers, _shifted(fill, first), device, loading.memory)
        first += len(layers)
    return dit


def _take_part(dit: Any, part: ModelPart, names: PartNames) -> list[str]:
    """Leave in a transformer the layers of a part. Returns what each one's weights begin with in the checkpoint."""
    prefixes: list[str] = []
    for name, start in names.lists.items():
        layers = getattr(dit, name)
        prefixes += [f"{name}.{index}." for index in range(len(layers)) if start + index in part.layers]
        setattr(dit, name, take_layers(part, layers, start))
    return prefixes


def _move_buffers(module: nn.Module, device: torch.device) -> None:
    """Tables that are computed, not read."""
    for inner in module.modules():
        for name, buffer in inner.named_buffers(recurse=False):
            inner.register_buffer(name, buffer.to(device), persistent=False)


def _shifted(fill: FillLayer, first: int) -> FillLayer:
    """For a list of layers of which the first is layer ``first`` of the part."""
    return lambda index, layer, to: fill(first + index, layer, to)


class _WeightFiles:
    """The weights of a part in the files of ``folder``, in the dtype in which they are used."""

    def __init__(
        self, folder: Path, wanted: Mapping[str, list[int]], dtype: torch.dtype, in_fp32: set[str], loading: Loading
    ) -> None:
        """``wanted`` gives names and shapes. Raises InputError where they are not what the files have."""
        self._dtype, self._in_fp32 = dtype, in_fp32
        self._loras = [lora for lora in loading.loras if folder.name in lora.folders]
        # What is of the file's dtype is a view of the mapped file. A single one that stays would keep all of a layer's
        # pages in memory, which were read to be quantized or to go again.
        self._copies = loading.memory.quantize != "none" or loading.memory.offload != "none"
        self._names: dict[Path, list[str]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            shapes = read_shapes(path)
            self._names[path] = sorted(wanted.keys() & shapes)
            for name in self._names[path]:
                if shapes[name] != wanted[name]:
                    raise InputError(f"{path}: {name} is {shapes[name]}, and its config asks for {wanted[name]}")
        missing = set(wanted).difference(*self._names.values())
        if missing:
            raise InputError(f"{folder}: lacks {len(missing)} tensors that its config asks for, first {min(missing)}")

    def read(self, is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
        """Names in the checkpoint, and values, on the CPU."""
        for path, known in self._names.items():
            wanted = [name for name in known if is_wanted(name)]
            if not wanted:
                continue
            with safe_open(path, framework="pt") as file:
                for name in wanted:
                    value = file.get_tensor(name)
                    for lora in self._loras:
                        value = lora.changed(name, value)
                    kept = torch.float32 if self._in_fp32 & set(name.split(".")) else self._dtype
                    yield name, value.to(kept, copy=self._copies)


def load_whole(kind: Any, folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """A whole part of a pipeline. Raises InputError where the files lack tensors."""
    model, info = kind.from_pretrained(folder, dtype=dtype, use_safetensors=True, output_loading_info=True)
    missing = info["missing_keys"]
    if missing:
        raise InputError(f"{folder}: lacks {len(missing)} tensors that its config asks for, first {sorted(missing)[0]}")
    return model.eval().to(device)


def load_vae(kind: Any, root: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """A directory's VAE; on a CPU without matrix units for 16 bits in fp32, which is faster there."""
    is_slow = device.type == "cpu" and not torch.cpu._is_amx_tile_supported()
    return load_whole(kind, root / "vae", torch.float32 if is_slow else dtype, device)


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
