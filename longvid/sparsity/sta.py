"""Sliding tile attention: each cuboid sees a window of cuboids around it (2502.04507)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from longvid.kernels.layout import BlockLayout
from longvid.sparsity.chosen import ChosenPolicy, grouped_layout
from longvid.sparsity.cuboids import Cut, Extent, cut_cuboids
from longvid.sparsity.settings import Sta
from longvid.sparsity.tokens import TokenMap


class StaPolicy(ChosenPolicy[Sta, Extent, Extent]):
    """At the borders the window's centre is moved inwards, so that all cuboids see as many."""

    def __init__(self, settings: Sta) -> None:
        super().__init__(settings, settings.tile, settings.window)

    @property
    def period(self) -> int:
        return self.tile[0]

    @staticmethod
    def rule(tokens: TokenMap, tile: Extent, values: Sequence[Extent]) -> BlockLayout:
        """A group for each window, in cuboids of `tile`."""
        cut = cut_cuboids(tokens, tile)
        return grouped_layout(cut, [_seen(cut, places_of(tokens, tile), window) for window in values])


def places_of(tokens: TokenMap, tile: Extent) -> tuple[range, range, range]:
    """The places of cuboids along latents, rows and columns."""
    latents = range(tokens.keys.start // tile[0], (tokens.keys.stop - 1) // tile[0] + 1)
    return latents, range(-(-tokens.height // tile[1])), range(-(-tokens.width // tile[2]))


def _seen(cut: Cut, places: tuple[range, range, range], window: Extent) -> Tensor:
    """Which cuboids lie in each other's window, bool [R, C]."""
    queries, keys = cut.queries, cut.keys
    in_t = _in_window(queries.t, keys.t, places[0], window[0])
    in_h = _in_window(queries.h, keys.h, places[1], window[1])
    return in_t & in_h & _in_window(queries.w, keys.w, places[2], window[2])


def _in_window(queries: Tensor, keys: Tensor, places: range, window: int) -> Tensor:
    """Which places lie in a query's window of so many of `places`, bool [R, C]."""
    first = (queries - (window - 1) // 2).clamp(max=places.stop - window).clamp(min=places.start)[:, None]
    return (keys >= first) & (keys < first + window)
