"""Sparse-vDiT: each head has the pattern that an offline search found for it (2506.03065).

Heads of a layer with one pattern share a group of its layout, and all groups run in one launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from os.path import expanduser
from pathlib import Path

import torch
from torch import Tensor

from longvid.kernels.layout import BlockLayout, Blocks, make_layout, own_groups
from longvid.sparsity.cuboids import Cut, cut_latents, cut_positions, is_near, spread
from longvid.sparsity.policy import Call
from longvid.sparsity.profile import FULL, SKIP, Pattern, Profile
from longvid.sparsity.settings import SparseVdit
from longvid.sparsity.static import Groups, StaticPolicy, trimmed, with_global
from longvid.sparsity.tokens import TokenMap


class SparseVditPolicy(StaticPolicy[SparseVdit]):
    """Raises InputError where the profile cannot be read, and at the first attention of a model that it is not of."""

    def __init__(self, settings: SparseVdit) -> None:
        super().__init__(settings)
        self.profile = Profile.read(Path(expanduser(settings.profile)))
        self._patterns = self.profile.patterns() or (FULL,)
        numbers = {SKIP: -1, **{pattern: number for number, pattern in enumerate(self._patterns)}}
        self._groups = [tuple(numbers[pattern] for pattern in heads) for heads in self.profile.layers]

    def require(self, *, num_layers: int, num_heads: int, model: str | None = None) -> None:
        """Raise InputError where the profile is of another model."""
        self.profile.require(self.settings.profile, num_layers=num_layers, num_heads=num_heads, model=model)

    def build(self, tokens: TokenMap) -> BlockLayout:
        return pattern_layout(self._patterns, tokens, self.profile.tile)

    def groups(self, call: Call) -> Groups:
        return tuple(self._groups[call.layer][head] for head in call.heads.indices)

    def head_costs(self, layer: int) -> tuple[float, ...] | None:
        """By the share of dense attention's time that the search expected of each pattern."""
        return tuple(self.profile.time_of(pattern) for pattern in self.profile.layers[layer])

    def all_groups(self) -> Groups:
        return tuple(group for layer in self._groups for group in layer)

    def is_dense(self, call: Call) -> bool:
        """Also where all heads of the rank are full."""
        self.require(num_layers=call.num_layers, num_heads=call.heads.total)
        return super().is_dense(call) or all(g >= 0 and self._patterns[g] == FULL for g in set(self.groups(call)))


def pattern_layout(patterns: Sequence[Pattern], tokens: TokenMap, tile: int) -> BlockLayout:
    """A group, and a head, for each pattern, on the CPU. Tiles have at most `tile` tokens."""
    by_pattern = [_tiles(pattern, tokens, tile) for pattern in patterns]
    cuts = [cut for cut, _ in by_pattern]
    queries = _stack([cut.queries.blocks for cut in cuts], tokens.num_queries)
    keys = _stack([cut.keys.blocks for cut in cuts], tokens.num_keys)
    mask = torch.zeros(len(patterns), queries.num_blocks, keys.num_blocks, dtype=torch.bool)
    for group, (cut, seen) in enumerate(by_pattern):
        mask[group, : seen.shape[0], : seen.shape[1]] = with_global(cut, seen)
    return trimmed(make_layout(queries, keys, mask, own_groups(1, len(patterns))))


def _tiles(pattern: Pattern, tokens: TokenMap, tile: int) -> tuple[Cut, Tensor]:
    """Blocks, and the tiles that the pattern lets see, bool [R, C]; distances are between the first tokens of tiles."""
    assert pattern != SKIP, "a skipped head has no layout"
    size = tokens.per_latent
    if pattern.mode == "multi_diagonal":
        cut = cut_positions(tokens, tile)
        width = cut.extent[2]
        return cut, is_near(cut.queries.w * width, cut.keys.w * width, pattern.window * size)
    cut = cut_latents(tokens, tile)
    queries, keys, width = cut.queries, cut.keys, cut.extent[2]
    if pattern.mode == "diagonal":
        return cut, is_near(queries.t * size + queries.w * width, keys.t * size + keys.w * width, pattern.window * size)
    if pattern.mode == "vertical":
        is_spread = torch.isin(keys.t, spread(tokens.own, int(pattern.window)))
        return cut, is_spread.expand(len(queries.t), -1)
    return cut, torch.ones(len(queries.t), len(keys.t), dtype=torch.bool)


def _stack(blocks: Sequence[Blocks], num_tokens: int) -> Blocks:
    """Each group's blocks; those of which there are fewer end in empty ones."""
    num_blocks = max(b.num_blocks for b in blocks)
    offsets = [torch.nn.functional.pad(b.offsets, (0, num_blocks - b.num_blocks), value=num_tokens) for b in blocks]
    if all(b.order is None for b in blocks):
        return Blocks(torch.cat(offsets))
    plain = torch.arange(num_tokens, dtype=torch.int32)[None]
    return Blocks(torch.cat(offsets), torch.cat([plain if b.order is None else b.order for b in blocks]))
