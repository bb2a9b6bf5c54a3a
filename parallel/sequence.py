"""Self-attention of one layer when a unit's tokens are spread over the `seq` axis.

Shapes: B batch (1 in the engine), L tokens of a unit, l of them on this rank, H heads, D of a head. Text that goes
through the layers with the unit's tokens has N tokens, which are whole on every rank; it counts to neither L nor l.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from longvid.errors import InputError
from longvid.kernels import rows as kernels
from longvid.kernels.dense import Partial
from longvid.kernels.merge import merge_partials
from longvid.parallel.attention import Attention, DenseAttention, Text, attend_beside, join_text, merge_parts, of_heads
from longvid.parallel.comm import Group
from longvid.settings import SequenceBackend
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


class SequenceAttention(Protocol):
    """How the tokens of a unit are spread, and attention over all of them."""

    def part(self, num_tokens: int) -> slice:
        """The tokens of a unit that this rank holds."""
        ...

    def gather(self, x_BlE: Tensor, num_tokens: int) -> Tensor:
        """All tokens [1, L, E], on every rank, of each rank's [1, l, E]."""
        ...

    def attend(self, q_BlHD: Tensor, k_BlHD: Tensor, v_BlHD: Tensor, around: Around) -> tuple[Tensor, list[KvPart]]:
        """Softmax attention of this rank's tokens to all, [B, l, H, D]; and a part for each span of `around.store`.

        With text [B, N + l, H, D], what all of it gets first. Queries and keys come normed and not rotated.
        """
        ...


class WholeSequence:
    """All tokens on one rank."""

    def part(self, num_tokens: int) -> slice:
        return slice(0, num_tokens)

    def gather(self, x_BlE: Tensor, num_tokens: int) -> Tensor:
        assert x_BlE.shape[1] == num_tokens
        return x_BlE

    def attend(self, q_BlHD: Tensor, k_BlHD: Tensor, v_BlHD: Tensor, around: Around) -> tuple[Tensor, list[KvPart]]:
        heads = Heads.all(q_BlHD.shape[2])
        return attend_around(q_BlHD, k_BlHD, v_BlHD, around, heads), store_whole(k_BlHD, v_BlHD, around)


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
            out, stored = self._attend_ring(q, k, v, around, heads), self._store(k, v, spans, around)
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

    def _attend_ring(self, q_BnhD: Tensor, k_BnhD: Tensor, v_BnhD: Tensor, around: Around, heads: Heads) -> Tensor:
        """Attention of this group's n tokens to all, with h of the heads; [B, N + n, h, D] where there is text."""
        num_tokens, ring, text = own_tokens(around), self._ring, around.text
        spans = self._group_spans(num_tokens)
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

    def _store(self, k_BnhD: Tensor, v_BnhD: Tensor, spans: Sequence[slice], around: Around) -> list[KvPart]:
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


class DeepSpeedAttention:
    """DeepSpeed-Ulysses (Jacobs et al. 2023), the library's own. It splits tokens evenly or not at all."""

    def __init__(self, group: Group) -> None:
        with optional("deepspeed"):
            deepspeed, layer = import_module("deepspeed"), import_module("deepspeed.sequence.layer")
        deepspeed.init_distributed(dist_backend=deepspeed.get_accelerator().communication_backend_name())
        self._group = group
        self._exchange = layer.DistributedAttention(self._attend_heads, group.handle, scatter_idx=2, gather_idx=1)

    def part(self, num_tokens: int) -> slice:
        return even_part("deepspeed", num_tokens, self._group)

    def gather(self, x_BlE: Tensor, num_tokens: int) -> Tensor:
        return torch.cat(self._group.all_gather(x_BlE, [x_BlE.shape] * self._group.size), 1)

    def attend(self, q_BlHD: Tensor, k_BlHD: Tensor, v_BlHD: Tensor, around: Around) -> tuple[Tensor, list[KvPart]]:
        stored: list[KvPart] = []
        texts: list[Tensor] = []
        batch_dim, rotary = 0, None  # we rotate ourselves: the neighbours' keys too
        out: Tensor = self._exchange(q_BlHD, k_BlHD, v_BlHD, batch_dim, rotary, around, stored, texts)
        return beside(texts[0], out), stored

    def _attend_heads(
        self, q_BLhD: Tensor, k_BLhD: Tensor, v_BLhD: Tensor, around: Around, stored: list[KvPart], texts: list[Tensor]
    ) -> Tensor:
        """What DeepSpeed calls between its exchanges, with all tokens and a share of the heads."""
        stored += store_whole(k_BLhD, v_BLhD, around)
        heads = share_of_heads(self._group, range(q_BLhD.shape[2] * self._group.size))
        out, num_text = attend_around(q_BLhD, k_BLhD, v_BLhD, around_heads(around, heads), heads), around.num_text
        texts.append(gather_heads(out[:, :num_text], heads))
        return out[:, num_text:]


class XfuserAttention:
    """xfuser's USP, on CUDA in half precision. It splits tokens evenly or not at all.

    Neighbours' K/V enter as its joint tensors, which every member of the ring needs whole: so each rank keeps a share
    of the heads, but all tokens of a stored span.
    """

    def __init__(self, ulysses: Group, ring: Group, seq: Group) -> None:
        if not torch.cuda.is_available():
            raise InputError("sequence.backend: xfuser needs CUDA, and torch finds no such device here")
        kernel = "FA" if find_spec("flash_attn") else "TORCH_FLASH"
        with optional("xfuser"):
            library = import_module("xfuser.core.long_ctx_attention")
            # Its attention takes the groups from here when it is built.
            groups = import_module("yunchang.globals").PROCESS_GROUP
            groups.ULYSSES_PG, groups.RING_PG = ulysses.library_handle(), ring.library_handle()
            self._attention = library.xFuserLongContextAttention(attn_type=library.AttnType[kernel])
        self._ulysses, self._ring, self._seq = ulysses, ring, seq

    def part(self, num_tokens: int) -> slice:
        return even_part("xfuser", num_tokens, self._seq)

    def gather(self, x_BlE: Tensor, num_tokens: int) -> Tensor:
        return torch.cat(self._seq.all_gather(x_BlE, [x_BlE.shape] * self._seq.size), 1)

    def attend(self, q_BlHD: Tensor, k_BlHD: Tensor, v_BlHD: Tensor, around: Around) -> tuple[Tensor, list[KvPart]]:
        if q_BlHD.dtype == torch.float32:
            raise InputError("sequence.backend: xfuser's flash attention needs runtime.dtype bfloat16, not float32")
        assert around.text is None, "families.require refuses xfuser where text is among the tokens"
        part = self.part(own_tokens(around))
        rope = rows(around.rope, around.num_left + part.start, around.num_left + part.stop)
        joint = self._neighbours(around_heads(around, share_of_heads(self._ulysses, range(q_BlHD.shape[2]))))
        out: Tensor = self._attention(None, rotate(q_BlHD, rope), rotate(k_BlHD, rope), v_BlHD, **joint)
        return out, [self._store(k_BlHD, v_BlHD, part, span) for span in around.store]

    def _neighbours(self, around: Around) -> dict[str, Any]:
        """Its joint arguments: rotated K/V of both neighbours, and no queries."""
        keys, values = neighbours(around)
        if not keys:
            return {}
        key, value = torch.cat(keys, 1), torch.cat(values, 1)
        # It expects all heads and picks this rank's: so they stand in the place of the others, too.
        key, value = (x.repeat(1, 1, self._ulysses.size, 1) for x in (key, value))
        names = {"joint_tensor_query": key[:, :0], "joint_tensor_key": key, "joint_tensor_value": value}
        return {**names, "joint_strategy": "rear"}

    def _store(self, k_BlHD: Tensor, v_BlHD: Tensor, part: slice, span: slice) -> KvPart:
        """This rank's heads of all tokens of a span."""
        num_tokens = length(part) * self._seq.size
        held = [overlap(span, other) for other in split(num_tokens, self._seq.size)]
        mine = slice(held[self._seq.index].start - part.start, held[self._seq.index].stop - part.start)
        lengths, size = [length(other) for other in held], self._ulysses.size
        groups = [lengths[i : i + size] for i in range(0, len(lengths), size)]
        key, value = to_heads(self._ulysses, (k_BlHD[:, mine], v_BlHD[:, mine]), groups[self._ring.index])
        shapes = [(2, 1, sum(group), *key.shape[2:]) for group in groups]
        key, value = torch.cat(self._ring.all_gather(torch.stack([key, value]), shapes), 2)
        return KvPart(key, value)


def make_sequence(backend: SequenceBackend, ulysses: Group, ring: Group, seq: Group) -> SequenceAttention:
    """Attention over the ranks of `seq`, which are ulysses x ring; all of them call it together.

    Raises InputError where the backend cannot run on them.
    """
    if seq.size == 1:
        return WholeSequence()
    if backend == "xfuser":
        return XfuserAttention(ulysses, ring, seq)
    if backend == "deepspeed":
        if ring.size > 1:
            raise InputError(f"sequence.backend: deepspeed has no ring, so mesh.ring must be 1, not {ring.size}")
        return DeepSpeedAttention(seq)
    return UspAttention(ulysses, ring)


# ----------------------------------------------------------------------------------------------------------- exchanges


def to_heads(ulysses: Group, tensors: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
    """From [B, l, H, D] to [B, n, H / ulysses, D]: all tokens of the group, some heads. One exchange for all tensors.

    `lengths` are the members' l, and n their sum.
    """
    if ulysses.size == 1:
        return list(tensors)
    batch, _, num_heads, width = tensors[0].shape
    assert num_heads % ulysses.size == 0
    heads = num_heads // ulysses.size
    parts = torch.cat(list(tensors)).split(heads, 2)
    received = ulysses.all_to_all(parts, [(len(tensors) * batch, n, heads, width) for n in lengths])
    return list(torch.cat(received, 1).split(batch))


def share_of_heads(ulysses: Group, order: Sequence[int]) -> Heads:
    """Which of the layer's heads are here after `to_heads` of heads in that order."""
    count = len(order) // ulysses.size
    back = None if list(order) == sorted(order) else torch.tensor(order).argsort()

    def gather(x: Tensor) -> Tensor:
        dealt = torch.cat(ulysses.all_gather(x, [x.shape] * ulysses.size))
        return dealt if back is None else dealt[back.to(x.device)]

    return Heads(tuple(order[ulysses.index * count : (ulysses.index + 1) * count]), len(order), gather)


def deal_heads(costs: Sequence[float] | None, num_heads: int, num_ranks: int) -> list[int]:
    """An order of heads of which each rank takes an equal run, so that no rank's cost much more than another's.

    The costliest head goes to the rank of least cost that has room (longest processing time first). A layer's order
    must never change: the neighbours' K/V lie where it put their heads.
    """
    if costs is None:
        return list(range(num_heads))
    hands: list[list[int]] = [[] for _ in range(num_ranks)]
    for head in sorted(range(num_heads), key=lambda head: -costs[head]):
        with_room = [hand for hand in hands if len(hand) < num_heads // num_ranks]
        min(with_room, key=lambda hand: sum(costs[i] for i in hand)).append(head)
    return [head for hand in hands for head in sorted(hand)]


def to_tokens(ulysses: Group, x_BnhD: Tensor, lengths: Sequence[int]) -> Tensor:
    """Back from [B, n, H / ulysses, D] to this rank's [B, l, H, D]."""
    if ulysses.size == 1:
        return x_BnhD
    shape = (x_BnhD.shape[0], lengths[ulysses.index], *x_BnhD.shape[2:])
    return torch.cat(ulysses.all_to_all(x_BnhD.split(list(lengths), 1), [shape] * ulysses.size), 2)


def gather_heads(x_BNhD: Tensor, heads: Heads) -> Tensor:
    """All heads [B, N, H, D] of what each rank has some of; nothing is sent where there are no tokens."""
    if heads.count == heads.total or not x_BNhD.shape[1]:
        return x_BNhD
    return heads.gather(x_BNhD.movedim(2, 0).contiguous()).movedim(0, 2)


def around_heads(around: Around, heads: Heads) -> Around:
    """The same for some of the heads; K/V of others are of those already."""
    if heads.count == heads.total:
        return around
    rope = around.rope
    if rope is not None and rope[0].shape[2] > 1:
        rope = of_heads(rope[0], heads), of_heads(rope[1], heads)
    return replace(around, rope=rope, text=around.text.of(heads) if around.text else None)


def beside(text_BNHD: Tensor, video_BlHD: Tensor) -> Tensor:
    """Text, if there is any, then this rank's tokens."""
    return torch.cat([text_BNHD, video_BlHD], 1) if text_BNHD.shape[1] else video_BlHD


# ----------------------------------------------------------------------------------------------- attention and its K/V


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


# --------------------------------------------------------------------------------------------------------- arithmetic


def own_tokens(around: Around) -> int:
    """L, from the rotary rows if there are any: what is left of them beside the neighbours'."""
    if around.rope is None:
        return around.num_tokens
    num_right = span_tokens(around.right) if around.right else 0
    return around.rope[0].shape[1] - around.num_left - num_right


def span_tokens(part: KvPart) -> int:
    """Tokens of the whole span that a part is of."""
    return sum(part.lengths) or part.key.shape[1]


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


def split(num_tokens: int, num_parts: int) -> list[slice]:
    """Contiguous parts whose lengths differ by one at most; with few tokens some are empty."""
    edges = [num_tokens * i // num_parts for i in range(num_parts + 1)]
    return [slice(*pair) for pair in pairwise(edges)]


def even_part(backend: SequenceBackend, num_tokens: int, group: Group) -> slice:
    """This rank's part, for backends that have none of different lengths."""
    if num_tokens % group.size:
        equation = f"{num_tokens} tokens of a unit / {group.size} ranks of mesh.seq"
        raise InputError(f"sequence.backend: {backend} needs equal parts, but {equation} is not whole: use longvid")
    return split(num_tokens, group.size)[group.index]


def overlap(a: slice, b: slice) -> slice:
    """The tokens of b that are in a; where there are none, empty at the nearer end of a."""
    start, stop = (min(max(edge, a.start), a.stop) for edge in (b.start, b.stop))
    return slice(start, stop)


def length(span: slice) -> int:
    count: int = span.stop - span.start
    return count


@contextmanager
def optional(library: str) -> Iterator[None]:
    """Where an optional library is imported."""
    try:
        yield
    except ImportError as error:
        install = f"pip install longvid[{library}]"
        raise InputError(f"sequence.backend: {library} cannot be imported ({error}): {install}") from error
