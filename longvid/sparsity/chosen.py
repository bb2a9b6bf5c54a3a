"""Fixed patterns whose one option may differ from head to head and from span to span of the steps, as a search found.

Options of a layout are its groups.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from os.path import expanduser
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor

from longvid.errors import InputError
from longvid.kernels.layout import BlockLayout, make_layout, own_groups
from longvid.sparsity.cuboids import Cut
from longvid.sparsity.policy import Call
from longvid.sparsity.profile import Choices
from longvid.sparsity.settings import Sta, TileFrames
from longvid.sparsity.static import Groups, StaticPolicy, trimmed, with_global
from longvid.sparsity.tokens import TokenMap

ChosenT = TypeVar("ChosenT", bound=Sta | TileFrames)
TileT = TypeVar("TileT")
ValueT = TypeVar("ValueT")


class ChosenPolicy(StaticPolicy[ChosenT], Generic[ChosenT, TileT, ValueT]):
    """One option for all heads, that of the settings; or with a profile each head's own.

    Raises InputError where the profile cannot be read or is another policy's, and at the first attention of a model
    that it is not of.
    """

    def __init__(self, settings: ChosenT, tile: TileT, value: ValueT) -> None:
        super().__init__(settings)
        self.tile, self.values = tile, [value]
        self.choices = Choices.read(Path(expanduser(settings.profile))) if settings.profile else None
        if self.choices:
            if self.choices.policy != settings.policy:
                raise InputError(f"{settings.profile}: is of policy {self.choices.policy}, not {settings.policy}")
            self.tile = self.choices.tile  # type: ignore[assignment]  # the profile's validation holds both to the policy
            self.values = [option.value for option in self.choices.options]  # type: ignore[misc]

    @staticmethod
    @abstractmethod
    def rule(tokens: TokenMap, tile: TileT, values: Sequence[ValueT]) -> BlockLayout:
        """A group, and a head, for each value, on the CPU."""

    def build(self, tokens: TokenMap) -> BlockLayout:
        return self.rule(tokens, self.tile, self.values)

    def require(self, *, num_layers: int, num_heads: int, model: str | None = None) -> None:
        """Raise InputError where the profile is of another model."""
        if self.choices:
            name = str(self.settings.profile)
            self.choices.require(name, num_layers=num_layers, num_heads=num_heads, model=model)

    def is_dense(self, call: Call) -> bool:
        self.require(num_layers=call.num_layers, num_heads=call.heads.total)
        return super().is_dense(call)

    def groups(self, call: Call) -> Groups:
        if self.choices is None:
            return super().groups(call)
        of_heads = self.choices.chosen[self.choices.span_of(call.step, call.num_steps)][call.layer]
        return tuple(of_heads[head] for head in call.heads.indices)

    def all_groups(self) -> Groups:
        if self.choices is None:
            return super().all_groups()
        return tuple(group for layers in self.choices.chosen for heads in layers for group in heads)

    def head_costs(self, layer: int) -> tuple[float, ...] | None:
        """By the density of each head's options, over all spans."""
        if self.choices is None:
            return None
        options = self.choices.options
        return tuple(
            sum(options[layers[layer][head]].density for layers in self.choices.chosen)
            for head in range(self.choices.num_heads)
        )


def grouped_layout(cut: Cut, seen: Sequence[Tensor]) -> BlockLayout:
    """A group, and a head, for each rule's tiles [R, C]: what all static layouts keep is kept in each."""
    mask = torch.stack([with_global(cut, tiles) for tiles in seen])
    return trimmed(make_layout(cut.queries.blocks, cut.keys.blocks, mask, own_groups(1, len(seen))))
