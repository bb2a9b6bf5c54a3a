"""Ring attention (Liu et al. 2023): each member has some tokens, and everybody's K/V are passed around.

`usp.py` puts it around Ulysses: a member of the ring is then a Ulysses group, and each of its ranks is in a ring of its
own, with its share of the heads.

Shapes: B batch, n tokens of this member, N of text, h heads that are here, D of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from longvid.kernels.dense import Partial
from longvid.kernels.merge import merge_partials
from longvid.parallel.around import Around, KvPart, neighbours, rotate, rows
from longvid.parallel.attention import join_text, merge_parts
from longvid.parallel.collectives import Group
from longvid.parallel.spans import length, overlap
from longvid.sparsity.policy import Heads


class RingAttention:
    """Attention over the members of a ring, of which `spans` say the tokens. Partial attention is merged by its LSE.

    Stored K/V stay where they are made: each member keeps what it has of a span.
    """

    def __init__(self, ring: Group) -> None:
        self._ring = ring

    def attend(
        self, q_BnhD: Tensor, k_BnhD: Tensor, v_BnhD: Tensor, around: Around, heads: Heads, spans: Sequence[slice]
    ) -> Tensor:
        """Attention of this group's n tokens to all, with h of the heads; [B, N + n, h, D] where there is text."""
        ring, text = self._ring, around.text
        own, start = spans[ring.index], around.num_left + spans[ring.index].start
        own_rope = rows(around.rope, start, start + q_BnhD.shape[1])
        keys, values = neighbours(around)
        block = torch.stack([torch.cat([rotate(k_BnhD, own_rope), *keys], 1), torch.cat([v_BnhD, *values], 1)])
        queries = slice(around.num_text + own.start, around.num_text + own.stop)

        def partial(block: Tensor, keys: tuple[range, ...]) -> Partial | None:
            return around.attention.part(q_rotated, block[0], block[1], heads, queries, keys)

        q_rotated = rotate(q_BnhD, own_rope)
        places = [key_places(around, spans, i) for i in range(ring.size)]
        merged = self._pass_around(partial, block, places)
        if text is None:
            return merged[0].type_as(q_BnhD) if merged else torch.zeros_like(q_BnhD)
        asked = slice(0, text.num_tokens)
        here = around.attention.part(text.query, block[0], block[1], heads, asked, places[ring.index])
        of_text = self._merge_over_ring(here, text.query)
        return join_text(text, q_rotated, (of_text, merged), own.start, around.attention, heads).type_as(q_BnhD)

    def _merge_over_ring(self, here: Partial | None, like: Tensor) -> Partial | None:
        """Attention of text, [B, N, h, D] as `like`, to the keys of all members, from that to each one's own."""
        out, lse = here or (torch.zeros_like(like), like.new_full(like.shape[:3], -math.inf))
        packed = torch.cat([out.float(), lse.float()[..., None]], -1)
        parts = self._ring.all_gather(packed, [packed.shape] * self._ring.size)
        return merge_parts([(part[..., :-1], part[..., -1]) for part in parts])

    def _pass_around(
        self,
        partial: Callable[[Tensor, tuple[range, ...]], Partial | None],
        block: Tensor,
        places: Sequence[tuple[range, ...]],
    ) -> Partial | None:
        """Attention to the K/V of all members of the ring, of which `block` [2, B, n, h, D] is our own.

        `places` are those of every member's keys among all. While attention to a block runs, the next is on its way.
        """
        ring = self._ring
        merged: Partial | None = None
        for hop in range(ring.size):
            source = ring.index - hop  # places[-1] are those of the last member, so negative ones are right
            arrive = None
            if hop + 1 < ring.size:
                count = sum(map(len, places[source - 1]))
                arrive = ring.rotate(block, (*block.shape[:2], count, *block.shape[3:]))
            found = partial(block, places[source])
            if found:
                merged = merge_partials(*merged, *found) if merged else found
            if arrive:
                block = arrive()
        return merged

    def store(self, k_BnhD: Tensor, v_BnhD: Tensor, spans: Sequence[slice], around: Around) -> list[KvPart]:
        """What this group holds of each span to be stored."""
        own = spans[self._ring.index]
        stored = []
        for whole in around.store:
            held = [overlap(whole, span) for span in spans]
            mine = held[self._ring.index]
            here = slice(mine.start - own.start, mine.stop - own.start)
            key, value = k_BnhD[:, here].clone(), v_BnhD[:, here].clone()
            stored.append(KvPart(key, value, mine.start - whole.start, tuple(length(span) for span in held)))
        return stored


def key_places(around: Around, spans: Sequence[slice], member: int) -> tuple[range, ...]:
    """Where the keys of a member of the ring are among all, which begin with text's.

    First the unit's, then the neighbours', then the shared.
    """
    own, first_video = spans[member], around.num_text
    places = [range(around.num_left + own.start, around.num_left + own.stop)]
    for side, first in around.sides:
        start = first + sum(side.lengths[:member])
        places.append(range(start, start + side.lengths[member]))
    return tuple(range(first_video + place.start, first_video + place.stop) for place in places)
