"""Parts of a transformer: which tensors a stage owns, and how many bytes they are, by the files' headers. No torch."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from longvid.errors import InputError


@dataclass(frozen=True)
class PartNames:
    """Which tensors of a transformer are of its layers, and which are needed at its ends alone; all need the others.

    `layers` is the list of layers in the module; `first` and `last` are names before the first dot. `original` is what
    the model's first code calls modules that diffusers calls otherwise, which LoRA files may follow.
    `layers` is the list of layers in the module; `first` and `last` are names before the first dot. Where layers are of
    two kinds, the list `behind` goes on with layer `num_front`, as the transformer's config says (`of`).
    """

    layers: str
    first: frozenset[str]
    last: frozenset[str]
    original: Mapping[str, str] = field(default_factory=dict)
    behind: str | None = None
    num_front: int = 0

    def of(self, config: Mapping[str, Any]) -> PartNames:
        """The names in a transformer with this config."""
        return replace(self, num_front=int(config["num_layers"])) if self.behind else self

    @property
    def lists(self) -> dict[str, int]:
        """The lists of layers, and the first layer of each."""
        return {self.layers: 0} | ({self.behind: self.num_front} if self.behind else {})


@dataclass(frozen=True)
class ModelPart:
    """What one stage owns of a transformer: some layers, and at the ends what is needed there alone."""

    layers: range
    is_first: bool = True
    is_last: bool = True

    def owns(self, name: str, names: PartNames) -> bool:
        """Whether it needs a tensor, by its name in the checkpoint."""
        kind, _, rest = name.partition(".")
        if kind in names.lists:
            return names.lists[kind] + int(rest.partition(".")[0]) in self.layers
        return not (kind in names.first and not self.is_first) and not (kind in names.last and not self.is_last)

    def local_name(self, name: str, names: PartNames) -> str:
        """The tensor's name in a model that holds this part's layers alone."""
        kind, _, inner = name.partition(".")
        if kind not in names.lists:
            return name
        index, _, rest = inner.partition(".")
        begin = names.lists[kind]
        return f"{kind}.{begin + int(index) - max(begin, self.layers.start)}.{rest}"


def part_bytes(folder: Path, part: ModelPart, names: PartNames, itemsize: int) -> int:
    """Bytes of a part's weights with so many bytes a number, by the headers of the safetensors files in ``folder``."""
    shapes = {name: shape for path in sorted(folder.glob("*.safetensors")) for name, shape in read_shapes(path).items()}
    return itemsize * sum(math.prod(shape) for name, shape in shapes.items() if part.owns(name, names))


def read_shapes(path: Path) -> dict[str, list[int]]:
    """The shape of every tensor of a safetensors file; nothing but its header is read. Raises InputError."""
    header = _read_header(path)
    try:
        return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: is corrupt or truncated ({error})") from None


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file's header says besides its tensors. Raises InputError."""
    metadata = _read_header(path).get("__metadata__")
    return metadata if isinstance(metadata, dict) else {}


def _read_header(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            if size > path.stat().st_size:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(size))
        if not isinstance(header, dict):
            raise ValueError("its header is no mapping")
        return header
    except (OSError, ValueError, struct.error) as error:
        raise InputError(f"{path}: is corrupt or truncated ({error})") from None
