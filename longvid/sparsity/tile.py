"""Efficient-vDiT's attention tile: every latent sees itself and a few latents spread over the film (2502.06155)."""

from __future__ import annotations

import torch

from longvid.kernels.layout import BlockLayout
from longvid.sparsity.cuboids import cut_latents, spread
from longvid.sparsity.settings import TileFrames
from longvid.sparsity.static import StaticPolicy, one_layout, same
from longvid.sparsity.tokens import TokenMap


class TilePolicy(StaticPolicy[TileFrames]):
    """Linear in the number of latents. Global latents are evenly spread over those that the chunk owns."""

    def build(self, tokens: TokenMap) -> BlockLayout:
        cut = cut_latents(tokens, self.settings.tile)
        is_spread = torch.isin(cut.keys.t, spread(tokens.own, self.settings.global_latents))
        return one_layout(cut, same(cut.queries.t, cut.keys.t) | is_spread)
