"""A ledger of hashes: what every unit gave on this rank, a line each, to find where two renders begin to differ."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from longvid.parallel.actions import Forward, Step
from longvid.parallel.rank_actions import RankAction


class Ledger:
    """Writes `round chunk step value hash`, in the order of work.

    The value is `latents` after a step, or `layer N`: the hidden states, or the velocity, after that many layers.
    Renders on other numbers of stages share the lines of latents and of the layers at which both are cut.
    """

    def __init__(self, path: Path, layers: range) -> None:
        self._file: TextIO = path.open("w")
        self._after = f"layer {layers.stop}"

    def on_value(self, action: RankAction, value: Tensor) -> None:
        """The executor's callback."""
        assert isinstance(action, Forward | Step)
        name = "latents" if isinstance(action, Step) else self._after
        data = value.detach().contiguous().cpu().view(torch.uint8).numpy()
        digest = hashlib.blake2b(data.tobytes(), digest_size=8).hexdigest()
        self._file.write(f"{action.round} c{action.chunk} k{action.step} {name} {digest}\n")

    def close(self) -> None:
        self._file.close()
