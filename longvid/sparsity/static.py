"""What static policies share: layouts that depend on the tokens' places alone, built once and kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

import torch
from torch import Tensor

from longvid.kernels.dense import Partial
from longvid.kernels.layout import BlockLayout, make_layout, one_group
from longvid.sparsity.cuboids import Cut
from longvid.sparsity.policy import Call, is_left_dense
from longvid.sparsity.settings import Sparse
from longvid.sparsity.tokens import TokenMap

MAX_KEPT = 32
"""Layouts that are kept. A film has few shapes of chunks, but its shots may all differ in length."""

Groups = tuple[int, ...]
"""Each head's group in a layout; -1: skipped."""

SettingsT = TypeVar("SettingsT", bound=Sparse)


@dataclass
class _Built:
    layout: BlockLayout
    density: float
    of_heads: dict[Groups, BlockLayout] = field(default_factory=dict)


class StaticPolicy(ABC, Generic[SettingsT]):
    """A policy whose layout follows from the tokens' places: subclasses say how it is built."""

    data_dependent = False

    def __init__(self, settings: SettingsT) -> None:
        self.settings = settings
        self._built: dict[tuple[TokenMap, torch.device], _Built] = {}

    @property
    def period(self) -> int:
        """A layout stays the same when all positions move by so many latents: then chunks share it."""
        return 1

    @abstractmethod
    def build(self, tokens: TokenMap) -> BlockLayout:
        """The layout of one head or, with several groups, of each kind of heads; on the CPU."""

    def groups(self, call: Call) -> Groups:
        """The groups of this rank's heads."""
        return (0,) * call.heads.count

    def all_groups(self) -> Groups:
        """Groups that stand for all heads of the model."""
        return (0,)

    def layout(self, q_BLHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, call: Call) -> BlockLayout | None:
        """See `Policy`. The same object for the same tokens and groups."""
        if self.is_dense(call):
            return None
        built, groups = self._find(call.tokens, q_BLHD.device), self.groups(call)
        if groups not in built.of_heads:
            built.of_heads[groups] = with_groups(built.layout, groups)
        return built.of_heads[groups]

    def finish(
        self,
        q_BLHD: Tensor,
        k_BTHD: Tensor,
        v_BTHD: Tensor,
        partial: Partial,
        layout: BlockLayout | None,
        call: Call,
    ) -> Tensor:
        """See `Policy`: nothing is corrected."""
        return partial[0]

    def head_costs(self, layer: int) -> tuple[float, ...] | None:
        """All heads have the same tiles."""
        return None

    def density(self, tokens: TokenMap) -> float:
        """The share of scores that a sparse step computes, exactly."""
        return self._find(tokens, torch.device("cpu")).density

    def choosing(self, tokens: TokenMap) -> float:
        """The tiles are fixed."""
        return 0.0

    def is_dense(self, call: Call) -> bool:
        """Whether a step or layer is one that the settings leave dense."""
        return is_left_dense(call, self.settings)

    def _find(self, tokens: TokenMap, device: torch.device) -> _Built:
        tokens = tokens.moved(-(tokens.keys.start // self.period * self.period))
        key = (tokens, device)
        if key not in self._built:
            if len(self._built) >= MAX_KEPT:
                self._built.pop(next(iter(self._built)))
            layout = self.build(tokens)
            self._built[key] = _Built(layout.to(device), with_groups(layout, self.all_groups()).density())
        return self._built[key]


def one_layout(cut: Cut, seen: Tensor) -> BlockLayout:
    """The layout of one head from the tiles of places that its rule lets it see, bool [R, C]."""
    return trimmed(make_layout(cut.queries.blocks, cut.keys.blocks, with_global(cut, seen)[None], one_group(1)))


def with_global(cut: Cut, seen: Tensor) -> Tensor:
    """The tiles that a rule lets see, and those that every static layout keeps: bool [R, C].

    All queries see text, context and their own place; text sees everything.
    """
    queries, keys = cut.queries, cut.keys
    own = same(queries.t, keys.t) & same(queries.h, keys.h) & same(queries.w, keys.w)
    return seen | own | keys.is_global | queries.is_global[:, None]


def same(queries: Tensor, keys: Tensor) -> Tensor:
    """Which pairs are equal: bool [R, C]."""
    return queries[:, None] == keys


def trimmed(layout: BlockLayout) -> BlockLayout:
    """A layout on the CPU without the unused end of `col`."""
    return replace(layout, col=layout.col[: int(layout.row_ptr[-1, -1])].clone())


def with_groups(layout: BlockLayout, groups: Groups) -> BlockLayout:
    """The same tiles for heads of these groups."""
    return replace(layout, group=torch.tensor([groups], dtype=torch.int32, device=layout.device))
