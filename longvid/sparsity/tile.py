"""Efficient-vDiT's attention tile: every latent sees itself and a few latents spread over the film (2502.06155)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from longvid.kernels.layout import BlockLayout
from longvid.sparsity.chosen import ChosenPolicy, grouped_layout
from longvid.sparsity.cuboids import cut_latents, spread
from longvid.sparsity.settings import TileFrames
from longvid.sparsity.static import same
from longvid.sparsity.tokens import TokenMap


class TilePolicy(ChosenPolicy[TileFrames, int, int]):
    """Linear in the number of latents. Global latents are evenly spread over those that the chunk owns."""

    def __init__(self, settings: TileFrames) -> None:
        super().__init__(settings, settings.tile, settings.global_latents)

    @staticmethod
    def rule(tokens: TokenMap, tile: int, values: Sequence[int]) -> BlockLayout:
        """A group for each number of global latents, in tiles of at most `tile` tokens."""
        cut = cut_latents(tokens, tile)
        own = same(cut.queries.t, cut.keys.t)
        return grouped_layout(cut, [own | torch.isin(cut.keys.t, spread(tokens.own, count)) for count in values])
