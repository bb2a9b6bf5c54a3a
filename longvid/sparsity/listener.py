"""A policy that leaves attention dense, and lets somebody hear what goes into it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from longvid.kernels.dense import Partial
from longvid.kernels.layout import BlockLayout
from longvid.sparsity.policy import Call
from longvid.sparsity.tokens import TokenMap

Hear = Callable[[Tensor, Tensor, Tensor, Call], None]
"""Is given queries [B, L, H, D], keys and values [B, T, H, D], and what is known of the call."""


class Listener:
    """Calls ``hear`` once for each attention, when that is done."""

    data_dependent = True

    def __init__(self, hear: Hear) -> None:
        self._hear = hear

    def layout(self, q_BLHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, call: Call) -> BlockLayout | None:
        return None

    def finish(
        self,
        q_BLHD: Tensor,
        k_BTHD: Tensor,
        v_BTHD: Tensor,
        partial: Partial,
        layout: BlockLayout | None,
        call: Call,
    ) -> Tensor:
        self._hear(q_BLHD, k_BTHD, v_BTHD, call)
        return partial[0]

    def head_costs(self, layer: int) -> tuple[float, ...] | None:
        return None

    def density(self, tokens: TokenMap) -> float:
        return 1.0

    def choosing(self, tokens: TokenMap) -> float:
        return 0.0
