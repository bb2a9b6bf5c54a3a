"""What self-attention reads around a unit's own tokens, and what it keeps for others: K/V of neighbours and of scenes.

Every backend of `sequence.py` is given an `Around` beside queries, keys and values. Here is also the attention of a
rank that has all tokens, of all heads or of some.

Shapes: B batch (1 in the engine), L tokens of a unit, l of them on this rank, H heads, D of a head. Text that goes
through the layers with the unit's tokens has N tokens, which are whole on every rank; it counts to neither L nor l.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from longvid.kernels import rows as kernels
from longvid.parallel.attention import Attention, DenseAttention, Text, attend_beside
from longvid.sparsity.policy import Heads

Rope = tuple[Tensor, Tensor]
"""Cosines and sines, [1, tokens, 1 or H, D]."""


@dataclass(frozen=True)
class KvPart:
    """K/V of a span of tokens in one layer, as far as this rank keeps them.

    Keys are normed but not rotated, because the neighbour reads them at another position (DualParal). `key` and
    `value` are [1, tokens, heads, D]; `offset` is where they begin in the span; `lengths` says how many tokens of the
    span each member of the ring keeps; empty: each keeps them all.
    """

    key: Tensor
    value: Tensor
    offset: int = 0
    lengths: tuple[int, ...] = ()


@dataclass(frozen=True)
class Around:
    """What self-attention reads besides the unit's own tokens, what it must keep, and how scores are chosen.

    `rope` covers all tokens in their order: those of `left`, the L of the unit, those of `right`; None: positions are
    in the tokens, or queries and keys come rotated. `store` are spans of the unit's L tokens whose K/V are to be kept.
    """

    rope: Rope | None
    left: KvPart | None = None
    right: KvPart | None = None
    num_left: int = 0
    """Tokens of the whole span that `left` is a part of."""
    store: tuple[slice, ...] = ()
    attention: Attention = field(default_factory=DenseAttention)
    queries: Tensor | None = None
    """Where not all of the unit's tokens ask: which do, int64 [l]. Their K/V come of all."""
    head_costs: Sequence[float] | None = None
    """What each head costs beside the others, where they are to be dealt to ranks by that."""
    shared: KvPart | None = None
    """How the scene before ended, in the place of left context: its last token stands before the chunk's first own."""
    shared_stop: int = 0
    """The place of the chunk's first own token."""
    num_tokens: int = 0
    """L, where no rotary rows say it."""
    text: Text | None = None
    """Text that sees the tokens and is seen by them."""

    @property
    def num_text(self) -> int:
        return self.text.num_tokens if self.text else 0

    @property
    def sides(self) -> list[tuple[KvPart, int]]:
        """All K/V of others, and the place in `rope` of each whole span's first token."""
        found = [(self.left, 0), (self.right, self.num_left + own_tokens(self)), (self.shared, self.shared_start)]
        return [(part, first) for part, first in found if part]

    @property
    def shared_start(self) -> int:
        return self.shared_stop - span_tokens(self.shared) if self.shared else 0


def attend_around(q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, around: Around, heads: Heads) -> Tensor:
    """Attention of a unit's tokens to themselves and to the K/V of its neighbours, which this rank has whole.

    With text [B, N + L, H, D], text first.
    """
    first, num_tokens = around.num_left, q_BLHD.shape[1]
    if around.left or around.right:
        left = [(around.left.key, around.left.value)] if around.left else []
        right = [(around.right.key, around.right.value)] if around.right else []
        parts = [*left, (k_BLHD, v_BLHD), *right]
        k_BLHD, v_BLHD = (torch.cat(tensors, 1) for tensors in zip(*parts, strict=True))
    if around.queries is None or around.rope is None:
        rope = rows(around.rope, first, first + num_tokens)
    else:
        rope = around.rope[0][:, first + around.queries], around.rope[1][:, first + around.queries]
    q_BLHD = rotate(q_BLHD, rope)
    k_BLHD = rotate(k_BLHD, around.rope)
    if around.shared:
        key = rotate(around.shared.key, rows(around.rope, around.shared_start, around.shared_stop))
        k_BLHD, v_BLHD = torch.cat([k_BLHD, key], 1), torch.cat([v_BLHD, around.shared.value], 1)
    if around.text:
        return attend_beside(around.text, q_BLHD, k_BLHD, v_BLHD, around.attention, heads)
    return around.attention.whole(q_BLHD, k_BLHD, v_BLHD, heads)


def store_whole(k_BLHD: Tensor, v_BLHD: Tensor, around: Around) -> list[KvPart]:
    """Copies of the K/V to be stored, so that the rest can be freed."""
    return [KvPart(k_BLHD[:, span].clone(), v_BLHD[:, span].clone()) for span in around.store]


def without_scene(store: tuple[slice, ...], stores_scene: bool) -> tuple[slice, ...]:
    """Spans to be stored in a layer that shares nothing: of a scene's end, which is the last one, no tokens."""
    if not stores_scene:
        return store
    *others, scene = store
    return (*others, slice(scene.start, scene.start))


def neighbours(around: Around) -> tuple[list[Tensor], list[Tensor]]:
    """Keys, rotated, and values of the neighbours' tokens that this rank keeps."""
    keys, values = [], []
    for side, first in around.sides:
        start = first + side.offset
        keys.append(rotate(side.key, rows(around.rope, start, start + side.key.shape[1])))
        values.append(side.value)
    return keys, values


def rows(rope: Rope | None, start: int, stop: int) -> Rope | None:
    """The rotary rows of some tokens."""
    return None if rope is None else (rope[0][:, start:stop], rope[1][:, start:stop])


def rotate(x_BLHD: Tensor, rope: Rope | None) -> Tensor:
    """Interleaved rotary embedding, in the arithmetic of the stock Wan processor; None: as it is."""
    return x_BLHD if rope is None else kernels.rotate(x_BLHD, *rope)


def own_tokens(around: Around) -> int:
    """L, from the rotary rows if there are any: what is left of them beside the neighbours'."""
    if around.rope is None:
        return around.num_tokens
    num_right = span_tokens(around.right) if around.right else 0
    return around.rope[0].shape[1] - around.num_left - num_right


def span_tokens(part: KvPart) -> int:
    """Tokens of the whole span that a part is of."""
    return sum(part.lengths) or part.key.shape[1]
