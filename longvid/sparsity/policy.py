"""What a sparse attention policy is: it gives layouts, and may change what comes out.

Shapes: B batch, L queries, T keys, H heads of this rank, D of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from longvid.kernels.dense import Partial
from longvid.kernels.layout import BlockLayout
from longvid.sparsity.settings import Sparse
from longvid.sparsity.tokens import TokenMap

Memory = dict[str, Tensor]
"""What a policy keeps of one (chunk, branch, layer) between steps. Tensors alone, so that checkpoints can hold it."""


def _alone(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Heads:
    """The heads that this rank has, of all heads of the layer. Under Ulysses a rank has some of them.

    `gather` gives every rank all heads' values, [H] to [total], in the order of the layer. All ranks of the group must
    call it together.
    """

    indices: tuple[int, ...]
    total: int
    gather: Callable[[Tensor], Tensor] = _alone

    @classmethod
    def all(cls, count: int) -> Heads:
        """All heads of a layer."""
        return cls(tuple(range(count)), count)

    @property
    def count(self) -> int:
        return len(self.indices)


@dataclass(frozen=True)
class Call:
    """One attention: where in the model, where in the film, and how far its chunk is.

    `step` counts the chunk's own steps, of `num_steps`. `memory` is the policy's of this (chunk, branch, layer); it is
    emptied when the tokens change, and freed after the last step.
    """

    layer: int
    num_layers: int
    step: int
    num_steps: int
    tokens: TokenMap
    heads: Heads
    memory: Memory = field(default_factory=dict)

    def has_reached(self, share: float) -> bool:
        """Whether this step is at or behind a share of the chunk's steps: 0.2 of 50 is step 10."""
        return self.step >= round(share * self.num_steps)


class Policy(Protocol):
    """A policy of sparse attention. Its settings are in `settings.attention`; it keeps state in `Call.memory` alone.

    Everything that it decides is a function of its inputs, so that no two ranks and no two runs differ.
    """

    @property
    def data_dependent(self) -> bool:
        """Whether layouts need q, k and v: then all keys must be on the rank, which a ring does not give."""
        ...

    def layout(self, q_BLHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, call: Call) -> BlockLayout | None:
        """The tiles to compute; None: dense. Static policies look at `call` and the device alone."""
        ...

    def finish(
        self,
        q_BLHD: Tensor,
        k_BTHD: Tensor,
        v_BTHD: Tensor,
        partial: Partial,
        layout: BlockLayout | None,
        call: Call,
    ) -> Tensor:
        """The attention's output, from the output and LSE that the layout gave; here a policy learns and corrects."""
        ...

    def head_costs(self, layer: int) -> tuple[float, ...] | None:
        """What each head of a layer costs beside the others, so that ranks get equal shares; None: all the same."""
        ...

    def density(self, tokens: TokenMap) -> float:
        """The expected share of scores that a sparse step computes: by it the choice falls between sparse and dense."""
        ...

    def choosing(self, tokens: TokenMap) -> float:
        """What choosing tiles at a step takes, and what corrects the output, as a share of dense attention's time."""
        ...


def is_layer_dense(call: Call, share: float) -> bool:
    """Whether a layer is among the first `share` of layers, which stay dense; at least one where share is not 0."""
    return call.layer < max(1, round(share * call.num_layers)) if share else False


def is_left_dense(call: Call, settings: Sparse) -> bool:
    """Whether a step or layer is one that the settings leave dense."""
    return not call.has_reached(settings.dense_steps) or is_layer_dense(call, settings.dense_layers)


def last_step(call: Call) -> bool:
    return call.step == call.num_steps - 1
