"""Wan 2.2 A14B: two transformers, one for high noise and one for low; which one runs is decided by the noise level.

A chunk's context never mixes their K/V. The left neighbour's latents are recomputed by the chunk's own expert, or its
cached K/V are of the very step at which the chunk stands, so of the same expert. The right neighbour is `gap` steps
behind: during the `gap` steps after the change its K/V are the other expert's, and the chunk does without them, as it
does before its right neighbour has entered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from longvid.models.checkpoint import FilmInputs
from longvid.models.wan import WanStage
from longvid.parallel.around import KvPart
from longvid.parallel.stage import Output, Unit


class ExpertKv(list[list[KvPart]]):
    """K/V [branch][layer] of a span, and which expert made them."""

    expert: WanStage


class WanExpertsStage:
    """The same layers of both experts; `high` runs where the timestep is `boundary` or more, as in stock diffusers."""

    def __init__(self, high: WanStage, low: WanStage, boundary: float) -> None:
        self._high, self._low, self._boundary = high, low, boundary
        self.branches = high.branches

    @property
    def num_branches(self) -> int:
        return self._high.num_branches

    def prepare(self, inputs: FilmInputs) -> None:
        for expert in (self._high, self._low):
            expert.prepare(inputs)

    def hidden_shape(self, num_latents: int, latent_size: Sequence[int]) -> tuple[tuple[int, ...], torch.dtype]:
        return self._high.hidden_shape(num_latents, latent_size)

    def forward(self, unit: Unit) -> Output:
        expert = self.expert_at(float(unit.timesteps[-1]))
        if isinstance(unit.right, ExpertKv) and unit.right.expert is not expert:
            unit = replace(unit, right=None)
        output = expert.forward(unit)
        return replace(output, kv=tuple(_made_by(expert, kv) for kv in output.kv))

    def expert_at(self, timestep: float) -> WanStage:
        """The expert of a noise level."""
        return self._high if timestep >= self._boundary else self._low


def _made_by(expert: WanStage, kv: object) -> ExpertKv:
    assert isinstance(kv, list)
    marked = ExpertKv(kv)
    marked.expert = expert
    return marked
