"""Ulysses (Jacobs et al. 2023): from some tokens of all heads on each rank to all tokens of some heads, and back.

The exchanges that backends of `sequence.py` put around attention, and how heads are dealt to ranks.

Shapes: B batch, l tokens on this rank, n of its group, N of text, H heads of a layer, h of them here, D of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from longvid.parallel.around import Around
from longvid.parallel.attention import of_heads
from longvid.parallel.collectives import Group
from longvid.sparsity.policy import Heads


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
