"""What opening a checkpoint of one transformer gives, whatever its family: the head of each `X_checkpoint.py`.

`X_checkpoint.py` adds what is the family's own: its prompts, decoder, stage and sampler (`checkpoint.Checkpoint`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from longvid.models.checkpoint import StreamDecoder
from longvid.models.configs import Configs
from longvid.models.weights import check_weights, errors_name, load_scheduler
from longvid.plan import ModelFacts

Layers = TypeVar("Layers")
"""The lists of a transformer's layers: of one kind, or of several."""


@dataclass(frozen=True)
class OpenedCheckpoint(Generic[Layers]):
    """The parts of one checkpoint that every rank can share: what opening it costs little. It takes no images."""

    configs: Configs
    facts: ModelFacts
    scheduler: Any
    pipeline: Any = None
    """Where the parts come from instead of ``root``, for a pipeline that is already loaded."""
    layers: Layers | None = None
    """All layers of its transformer."""

    @property
    def root(self) -> Path | None:
        return self.configs.root

    @property
    def boundary(self) -> float:
        return 0.0

    def load_images(self, decoder: StreamDecoder, dtype: torch.dtype, device: torch.device) -> None:
        return None


def open_scheduler(configs: Configs, family: str, folders: Sequence[str]) -> Any:
    """A directory's scheduler, when weights are in all of these folders. Raises InputError, which names the family."""
    assert configs.root is not None
    check_weights(configs.root, folders)
    with errors_name(configs.root, family):
        return load_scheduler(configs)
