"""Sliding tile attention: each cuboid sees a window of cuboids around it (2502.04507)."""

from __future__ import annotations

from torch import Tensor

from longvid.kernels.layout import BlockLayout
from longvid.sparsity.cuboids import cut_cuboids
from longvid.sparsity.settings import Sta
from longvid.sparsity.static import StaticPolicy, one_layout
from longvid.sparsity.tokens import TokenMap


class StaPolicy(StaticPolicy[Sta]):
    """At the borders the window's centre is moved inwards, so that all cuboids see as many."""

    @property
    def period(self) -> int:
        return self.settings.tile[0]

    def build(self, tokens: TokenMap) -> BlockLayout:
        cut = cut_cuboids(tokens, self.settings.tile)
        extent, window = self.settings.tile, self.settings.window
        queries, keys = cut.queries, cut.keys
        latents = range(tokens.keys.start // extent[0], (tokens.keys.stop - 1) // extent[0] + 1)
        rows, columns = range(-(-tokens.height // extent[1])), range(-(-tokens.width // extent[2]))
        in_t = _in_window(queries.t, keys.t, latents, window[0])
        in_h = _in_window(queries.h, keys.h, rows, window[1])
        return one_layout(cut, in_t & in_h & _in_window(queries.w, keys.w, columns, window[2]))


def _in_window(queries: Tensor, keys: Tensor, places: range, window: int) -> Tensor:
    """Which places lie in a query's window of so many of `places`, bool [R, C]."""
    first = (queries - (window - 1) // 2).clamp(max=places.stop - window).clamp(min=places.start)[:, None]
    return (keys >= first) & (keys < first + window)
