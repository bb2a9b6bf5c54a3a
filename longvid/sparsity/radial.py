"""Radial attention: the band that a latent sees of another halves with every octave of their distance (2506.19852)."""

from __future__ import annotations

import torch

from longvid.kernels.layout import BlockLayout
from longvid.sparsity.cuboids import cut_latents
from longvid.sparsity.settings import Radial
from longvid.sparsity.static import StaticPolicy, one_layout
from longvid.sparsity.tokens import TokenMap


class RadialPolicy(StaticPolicy[Radial]):
    """O(n log n) scores. Latents up to 1 apart see each other whole, and all see the first.

    Further apart by d, positions see each other that are nearer than decay · positions / 2^floor(log2 d) (the paper's
    equation 6, at decay 1), counted between the first tokens of tiles. Where that is less than a tile, pairs at every
    (tile / band)-th distance see the tile at their own place, and the others nothing.
    """

    def build(self, tokens: TokenMap) -> BlockLayout:
        cut = cut_latents(tokens, self.settings.tile)
        tile, (queries, keys) = cut.extent[2], (cut.queries, cut.keys)
        distance = (queries.t[:, None] - keys.t).abs()
        bands = [self._band(d, tokens.per_latent) for d in range(int(distance.max()) + 1)]
        band = torch.tensor(bands, dtype=torch.float64)[distance]
        is_inside = (queries.w[:, None] - keys.w).abs() * tile < band
        is_kept = distance % (tile / band).ceil().long() == 0
        return one_layout(cut, (distance <= 1) | (is_inside & is_kept) | (keys.t == tokens.keys.start))

    def _band(self, distance: int, per_latent: int) -> float:
        """Half the width of the band at a distance of latents, in tokens."""
        octave = max(distance, 1).bit_length() - 1
        return self.settings.decay * per_latent / (1 << octave)
