"""GRAT: groups of tokens see groups in a cross, or their neighbours (2505.14687)."""

from __future__ import annotations

from longvid.kernels.layout import BlockLayout
from longvid.sparsity.cuboids import cut_cuboids, is_near
from longvid.sparsity.settings import Grat
from longvid.sparsity.static import StaticPolicy, one_layout, same
from longvid.sparsity.tokens import TokenMap


class GratPolicy(StaticPolicy[Grat]):
    """`cross` (GRAT-X): groups that share their index along t, h or w. `neighbours` (GRAT-B): 3 x 3 x 3 groups."""

    @property
    def period(self) -> int:
        return self.settings.group[0]

    def build(self, tokens: TokenMap) -> BlockLayout:
        cut = cut_cuboids(tokens, self.settings.group)
        queries, keys = cut.queries, cut.keys
        axes = ((queries.t, keys.t), (queries.h, keys.h), (queries.w, keys.w))
        if self.settings.pattern == "cross":
            in_t, in_h, in_w = (same(q, k) for q, k in axes)
            return one_layout(cut, in_t | in_h | in_w)
        in_t, in_h, in_w = (is_near(q, k, 2) for q, k in axes)
        return one_layout(cut, in_t & in_h & in_w)
