"""Unified sequence parallelism: Ulysses (`ulysses.py`) inside, a ring (`ring.py`) around it. Our own backend.

Shapes: B batch (1 in the engine), L tokens of a unit, l of them on this rank, H heads, D of a head. Text that goes
through the layers with the unit's tokens has N tokens, which are whole on every rank; it counts to neither L nor l.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longvid.parallel.around import Around, KvPart, attend_around, own_tokens, store_whole
from longvid.parallel.collectives import Group
from longvid.parallel.ring import RingAttention
from longvid.parallel.spans import length, split
from longvid.parallel.ulysses import around_heads, beside, deal_heads, gather_heads, share_of_heads, to_heads, to_tokens


class UspAttention:
    """Unified sequence parallelism (Fang and Zhao 2024): Ulysses in groups of neighbours, a ring over the groups.

    The tokens are split in ulysses x ring parts, in order and as evenly as they go; rank (ring r, ulysses u) holds
    part r * ulysses + u. Inside a Ulysses group attention runs on all tokens of the group and a share of the heads. The
    ring passes those K/V around, and partial attention is merged by its LSE. Stored K/V stay where they are made:
    each rank keeps its heads of its group's tokens.

    Text needs no exchange before attention. Each rank computes its heads for it. In a ring text asks each group's own
    K/V on that group's ranks, and all of them merge the answers in the same order: its bits are equal everywhere.
    """

    def __init__(self, ulysses: Group, ring: Group) -> None:
        self._ulysses, self._ring = ulysses, ring
        self._over_ring = RingAttention(ring)
        self._num_parts = ulysses.size * ring.size

    def part(self, num_tokens: int) -> slice:
        index = self._ring.index * self._ulysses.size + self._ulysses.index
        return split(num_tokens, self._num_parts)[index]

    def gather(self, x_BlE: Tensor, num_tokens: int) -> Tensor:
        batch, _, width = x_BlE.shape
        group = torch.cat(self._ulysses.all_gather(x_BlE, [(batch, n, width) for n in self._lengths(num_tokens)]), 1)
        shapes = [(batch, length(span), width) for span in self._group_spans(num_tokens)]
        return torch.cat(self._ring.all_gather(group, shapes), 1)

    def attend(self, q_BlHD: Tensor, k_BlHD: Tensor, v_BlHD: Tensor, around: Around) -> tuple[Tensor, list[KvPart]]:
        num_tokens = own_tokens(around)
        lengths = self._lengths(num_tokens)
        assert q_BlHD.shape[1] == lengths[self._ulysses.index]
        order = deal_heads(around.head_costs, q_BlHD.shape[2], self._ulysses.size)
        is_dealt = around.head_costs is not None and self._ulysses.size > 1
        tensors = [x[:, :, order] if is_dealt else x for x in (q_BlHD, k_BlHD, v_BlHD)]
        q, k, v = to_heads(self._ulysses, tensors, lengths)
        heads, num_text = share_of_heads(self._ulysses, order), around.num_text
        around = around_heads(around, heads)
        if self._ring.size == 1:
            out, stored = attend_around(q, k, v, around, heads), store_whole(k, v, around)
        else:
            spans = self._group_spans(num_tokens)
            out = self._over_ring.attend(q, k, v, around, heads, spans)
            stored = self._over_ring.store(k, v, spans, around)
        out_BlHD = to_tokens(self._ulysses, out[:, num_text:], lengths)
        if is_dealt:
            out_BlHD = out_BlHD[:, :, torch.tensor(order).argsort()]
        return beside(gather_heads(out[:, :num_text], heads), out_BlHD), stored

    def _group_spans(self, num_tokens: int) -> list[slice]:
        """The tokens of each Ulysses group, in the order of the ring."""
        parts, size = split(num_tokens, self._num_parts), self._ulysses.size
        return [slice(parts[i].start, parts[i + size - 1].stop) for i in range(0, self._num_parts, size)]

    def _lengths(self, num_tokens: int) -> list[int]:
        """Tokens of each member of this Ulysses group."""
        first = self._ring.index * self._ulysses.size
        return [length(part) for part in split(num_tokens, self._num_parts)[first : first + self._ulysses.size]]
