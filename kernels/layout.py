"""Layouts of block-sparse attention: how tokens form blocks, and which tiles of (query block, key block) are computed.

Shapes: B batch, H heads, L queries, T keys, G groups of heads that share a layout, R query blocks, C key blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """Tokens in an order, cut into blocks of any lengths, 0 too.

    `offsets` int32 [G or 1, N + 1] rise from 0 to the number of tokens: block n begins at place offsets[n].
    `order` int32 [G or 1, tokens] says which token stands at each place; None: every token at its own. `size`, where it
    is known, is the length of every block but the last: kernels cannot ask the device for it.
    """

    offsets: Tensor
    order: Tensor | None = None
    size: int | None = None

    @property
    def num_blocks(self) -> int:
        return self.offsets.shape[-1] - 1

    def lengths(self) -> Tensor:
        """Tokens of each block, int32 [G or 1, N]."""
        return self.offsets.diff(dim=-1)

    def block_of(self, num_tokens: int) -> Tensor:
        """The block of each token, int64 [G or 1, tokens], in the order of the tokens."""
        places = torch.arange(num_tokens, dtype=self.offsets.dtype, device=self.offsets.device)
        inner = self.offsets[:, 1:-1].contiguous()
        block = torch.searchsorted(inner, places.expand(len(inner), -1).contiguous(), right=True)
        if self.order is None:
            return block
        rows = max(len(block), len(self.order))
        order = self.order.long().expand(rows, -1)
        return torch.empty_like(order).scatter_(1, order, block.expand(rows, -1))

    def of_group(self, group: int) -> Blocks:
        """The blocks of one group."""
        offsets, order = (x if x is None or len(x) == 1 else x[group : group + 1] for x in (self.offsets, self.order))
        assert offsets is not None
        return Blocks(offsets, order, self.size)

    def to(self, device: torch.device | str) -> Blocks:
        return Blocks(self.offsets.to(device), None if self.order is None else self.order.to(device), self.size)

    def keep(self, tokens: Tensor, num_tokens: int) -> Blocks:
        """The same blocks of some of the tokens alone: `tokens` int64 [n] are those that stay, in their new order.

        A block that loses all its tokens stays, with length 0.
        """
        rank = torch.full((num_tokens,), -1, dtype=torch.int64, device=tokens.device)
        rank[tokens] = torch.arange(len(tokens), device=tokens.device)
        order = self.order.long() if self.order is not None else torch.arange(num_tokens, device=tokens.device)[None]
        kept = rank[order] >= 0  # [G or 1, places]
        before = torch.nn.functional.pad(kept.cumsum(-1), (1, 0))
        rows = max(len(before), len(self.offsets))
        offsets = before.expand(rows, -1).gather(1, self.offsets.long().expand(rows, -1)).int()
        return Blocks(offsets, rank[order][kept].view(len(order), -1).int())


@dataclass(frozen=True)
class BlockLayout:
    """The tiles that are computed, as compressed rows.

    `row_ptr` int32 [G, R + 1] indexes `col`, across all groups: row r of group g has the key blocks
    col[row_ptr[g, r] : row_ptr[g, r + 1]], rising. `col` int32 may be longer than what is used. `group` int32
    [B or 1, H] is each head's group; -1: the head is skipped. All on one device.
    """

    q: Blocks
    k: Blocks
    row_ptr: Tensor
    col: Tensor
    group: Tensor

    @property
    def num_groups(self) -> int:
        return self.row_ptr.shape[0]

    @property
    def device(self) -> torch.device:
        return self.row_ptr.device

    def to(self, device: torch.device | str) -> BlockLayout:
        rest = (x.to(device) for x in (self.row_ptr, self.col, self.group))
        return BlockLayout(self.q.to(device), self.k.to(device), *rest)

    def mask(self) -> Tensor:
        """The tiles as bool [G, R, C]."""
        num_groups, num_rows, num_cols = self.num_groups, self.q.num_blocks, self.k.num_blocks
        counts = self.row_ptr.diff(dim=-1).flatten().long()
        row = torch.repeat_interleave(torch.arange(len(counts), device=self.device), counts)
        mask = torch.zeros(num_groups * num_rows, num_cols, dtype=torch.bool, device=self.device)
        mask[row, self.col[: len(row)].long()] = True
        return mask.view(num_groups, num_rows, num_cols)

    def density(self) -> float:
        """Computed scores as a share of all B x H x L x T."""
        tiles = self.mask() * self.q.lengths().long()[:, :, None] * self.k.lengths().long()[:, None, :]
        in_group = tiles.sum((1, 2)).double()
        heads = self.group.flatten().long()
        num_scores = int(self.q.offsets[0, -1]) * int(self.k.offsets[0, -1]) * len(heads)
        return float(in_group[heads[heads >= 0]].sum()) / num_scores if num_scores else 0.0

    def heads(self, first: int, stop: int) -> BlockLayout:
        """The layout of some of the heads."""
        return replace(self, group=self.group[:, first:stop])

    def keep(self, q_tokens: Tensor | None, k_tokens: Tensor | None) -> BlockLayout:
        """The layout of some of the queries and keys, int64 indices in their new order (None: all as they are).

        What sequence parallelism needs: attention to each part of the keys gives partials that merge by their LSE.
        Tiles that lose all their queries or keys are dropped.
        """
        num_queries, num_keys = int(self.q.offsets[0, -1]), int(self.k.offsets[0, -1])
        q = self.q if q_tokens is None else self.q.keep(q_tokens, num_queries)
        k = self.k if k_tokens is None else self.k.keep(k_tokens, num_keys)
        mask = self.mask() & (q.lengths() > 0)[:, :, None] & (k.lengths() > 0)[:, None, :]
        return make_layout(q, k, mask, self.group)


def make_layout(q: Blocks, k: Blocks, mask: Tensor, group: Tensor) -> BlockLayout:
    """A layout from its tiles, bool [G, R, C], without waiting for the device. `group` int32 [B or 1, H]."""
    num_groups, num_rows, num_cols = mask.shape
    counts = mask.sum(-1, dtype=torch.int64)
    ends = counts.flatten().cumsum(0)
    starts = ends - counts.flatten()
    row_ptr = torch.cat([starts.view(num_groups, num_rows), ends.view(num_groups, num_rows)[:, -1:]], dim=1)
    if mask.device.type == "cpu":
        return BlockLayout(q, k, row_ptr.int(), mask.flatten(0, 1).nonzero()[:, 1].int(), group.int())
    # Each computed tile goes to its row's start plus the number of tiles before it; the others to a place at the end.
    place = starts.view(num_groups, num_rows, 1) + mask.cumsum(-1) - 1
    place = place.masked_fill(~mask, mask.numel())
    col = torch.zeros(mask.numel() + 1, dtype=torch.int32, device=mask.device)
    columns = torch.arange(num_cols, dtype=torch.int32, device=mask.device).expand_as(mask)
    col.scatter_(0, place.flatten(), columns.flatten())
    return BlockLayout(q, k, row_ptr.int(), col[:-1], group.int())


def even_blocks(num_tokens: int, size: int, device: torch.device | str = "cpu") -> Blocks:
    """Tokens in their own order in blocks of `size`, the last one shorter where it must be."""
    edges = torch.arange(0, num_tokens + size, size, dtype=torch.int32, device=device).clamp(max=num_tokens)
    return Blocks(edges[None] if num_tokens else torch.zeros(1, 1, dtype=torch.int32, device=device), size=size)


def one_group(num_heads: int, device: torch.device | str = "cpu") -> Tensor:
    """All heads share one layout: int32 [1, H] of zeros."""
    return torch.zeros(1, num_heads, dtype=torch.int32, device=device)


def own_groups(batch: int, num_heads: int, device: torch.device | str = "cpu") -> Tensor:
    """Every head of every batch entry has a layout of its own, group b · H + h: int32 [B, H]."""
    return torch.arange(batch * num_heads, dtype=torch.int32, device=device).view(batch, num_heads)
