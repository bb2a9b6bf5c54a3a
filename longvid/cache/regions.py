"""Region-adaptive sampling (RAS, arXiv 2502.10389): at most steps only some tokens go through the layers.

The others keep the velocity that was predicted for them last, and their K/V of that step stand in every layer for those
that read them. Which tokens it is, the first stage chooses by how the latents changed in the step before, which is what
was predicted; it tells the later stages by a row of zeros and ones behind the hidden states.

Shapes: L tokens of a unit, left context first, of which the last O are the chunk's own; n of the L are active. Left
context always is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from longvid.cache.plan import RegionRules
from longvid.sparsity.policy import Memory

Place = tuple[int, int, int]


@dataclass(frozen=True)
class Active:
    """The tokens of a unit that go through the layers: `tokens` int64 [n], ascending, of `num_tokens`."""

    tokens: Tensor
    num_tokens: int
    num_own: int

    @property
    def own(self) -> Tensor:
        """Those of the chunk's own, counted from its first one."""
        before = self.num_tokens - self.num_own
        return self.tokens[before:] - before

    def of(self, x_1LE: Tensor) -> Tensor:
        """Their rows; of one row for all, that row."""
        return x_1LE[:, self.tokens] if x_1LE.shape[1] == self.num_tokens else x_1LE

    def as_rows(self, like: Tensor) -> Tensor:
        """Zeros and ones for all L tokens in rows [1, r, E] of hidden states."""
        width = like.shape[-1]
        rows = like.new_zeros(math.ceil(self.num_tokens / width) * width)
        rows[self.tokens] = 1
        return rows.view(1, -1, width)

    @classmethod
    def from_rows(cls, rows: Tensor, num_tokens: int, num_own: int) -> Active:
        """What `as_rows` wrote."""
        tokens = (rows.flatten()[:num_tokens] > 0.5).nonzero().flatten()
        return cls(tokens, num_tokens, num_own)


class RegionMemory:
    """What one rank remembers of each chunk in flight: K/V of its layers, velocities, latents. Freed with the chunk."""

    def __init__(self, rules: RegionRules) -> None:
        self._rules = rules
        self._kept: dict[Place, dict[str, Tensor]] = {}

    def choose(
        self, chunk: int, branches: tuple[int, ...], share: float, own_OP: Tensor, num_tokens: int
    ) -> Active | None:
        """On the first stage: who is active, by the own tokens' latents fp32 [O, P]; None: all are.

        The score of a token is the deviation among its values of what the last step changed. `focus` low takes those of
        the lowest; a token that was left out often comes in by `starvation`.
        """
        before = self._kept.get((chunk, branches[0], 0), {})
        dropped = before.get("dropped")
        if dropped is None:
            dropped = torch.zeros(len(own_OP), device=own_OP.device)
        active = None
        if share < 1 and "seen" in before:
            score = (own_OP - before["seen"]).std(dim=1)
            sign = 1 if self._rules.focus == "high" else -1
            ranked = torch.sort(sign * score.log() + self._rules.starvation * dropped, descending=True, stable=True)
            chosen = ranked.indices[: num_active(share, len(own_OP))].sort().values
            dropped = (dropped + 1).index_fill(0, chosen, 0.0)
            first = num_tokens - len(own_OP)
            left = torch.arange(first, device=chosen.device)
            active = Active(torch.cat([left, first + chosen]), num_tokens, len(own_OP))
        for branch in branches:
            self._at((chunk, branch, 0)).update(seen=own_OP, dropped=dropped)
        return active

    def kv(self, place: Place, key_BLHD: Tensor, value_BLHD: Tensor, active: Active | None) -> tuple[Tensor, Tensor]:
        """K/V of all tokens in a layer, by those of the active ones; remembered."""
        kept = self._at(place)
        if active is not None:
            key_BLHD = kept["key"].index_copy(1, active.tokens, key_BLHD)
            value_BLHD = kept["value"].index_copy(1, active.tokens, value_BLHD)
        kept.update(key=key_BLHD, value=value_BLHD)
        return key_BLHD, value_BLHD

    def velocity(self, place: Place, patches_1OP: Tensor, active: Active | None) -> Tensor:
        """What is predicted for all own tokens, by what is for the active ones; remembered."""
        kept = self._at(place)
        if active is not None:
            patches_1OP = kept["velocity"].index_copy(1, active.own, patches_1OP)
        kept["velocity"] = patches_1OP
        return patches_1OP

    def forget(self, chunk: int) -> None:
        for place in [place for place in self._kept if place[0] == chunk]:
            del self._kept[place]

    @property
    def num_bytes(self) -> int:
        return sum(x.nbytes for kept in self._kept.values() for x in kept.values())

    def state(self) -> dict[Place, Memory]:
        return {place: dict(kept) for place, kept in self._kept.items()}

    def load_state(self, state: Mapping[Place, Memory]) -> None:
        self._kept = {place: dict(kept) for place, kept in state.items()}

    def _at(self, place: Place) -> dict[str, Tensor]:
        return self._kept.setdefault(place, {})


def num_active(share: float, num_own: int) -> int:
    """How many own tokens are active."""
    return min(num_own, math.ceil(share * num_own))
