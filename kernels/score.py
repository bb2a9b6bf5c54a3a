"""How much attention each block of queries pays each block of keys: what a search for a layout reads.

Shapes: B batch, L queries, T keys, H heads, D of a head, R query blocks, C key blocks.
"""

from __future__ import annotations

import math
from importlib.util import find_spec

import torch
from torch import Tensor

from longvid.kernels import cpu, native
from longvid.kernels.layout import Blocks

SLAB_SCORES = 1 << 24
"""Scores that the torch fallback holds at once, over all heads; a single row of queries may have more."""


def block_mass(
    q_BLHD: Tensor,
    k_BTHD: Tensor,
    lse_BLH: Tensor,
    q_blocks: Blocks,
    k_blocks: Blocks,
    *,
    scale: float | None = None,
    sample_every: int = 1,
    exact: bool = True,
) -> Tensor:
    """W[p, q] = sum over i in p, j in q of exp(q_i · k_j · scale - LSE_i), fp32 [B, H, R, C] (AdaSpa).

    `lse_BLH` is the natural LSE of dense attention, maybe that of an earlier step; where it is -inf, a query saw no key
    and pays nothing. Blocks are the same for all heads:
    offsets and orders of one row. With `sample_every` = n, the queries at the places offset, offset + n, ... of each
    block stand for it, and their sums are multiplied by the block's length over their number. `scale` is 1 / sqrt(D)
    unless given. Without `exact` products may be of bf16, where that is faster. Raises ValueError where blocks or
    shapes do not fit.
    """
    _check(q_BLHD, k_BTHD, lse_BLH, q_blocks, k_blocks, sample_every)
    scale = scale if scale is not None else 1 / math.sqrt(q_BLHD.shape[-1])
    if q_BLHD.numel() == 0 or k_BTHD.numel() == 0:
        return q_BLHD.new_zeros(
            q_BLHD.shape[0], q_BLHD.shape[2], q_blocks.num_blocks, k_blocks.num_blocks, dtype=torch.float32
        )
    args = q_BLHD, k_BTHD, lse_BLH, q_blocks, k_blocks
    if q_BLHD.device.type == "cpu" and native.is_available():
        return cpu.block_mass(*args, scale=scale, sample_every=sample_every, exact=exact)
    if q_BLHD.device.type == "cuda" and find_spec("triton") is not None:
        from longvid.kernels import mass

        return mass.block_mass(*args, scale=scale, sample_every=sample_every)
    return block_mass_torch(*args, scale=scale, sample_every=sample_every)


def block_mass_torch(
    q_BLHD: Tensor,
    k_BTHD: Tensor,
    lse_BLH: Tensor,
    q_blocks: Blocks,
    k_blocks: Blocks,
    *,
    scale: float,
    sample_every: int = 1,
) -> Tensor:
    """`block_mass` in plain torch, some rows of queries at a time, so that memory does not grow with L x T."""
    batch, num_queries, num_heads, _ = q_BLHD.shape
    tokens, row, weight = sampled(q_blocks, num_queries, sample_every)
    col = k_blocks.block_of(k_BTHD.shape[1])[0]
    k_BHTD = k_BTHD.transpose(1, 2).float()
    mass = k_BHTD.new_zeros(batch, num_heads, q_blocks.num_blocks, k_blocks.num_blocks)
    rows_at_once = max(1, SLAB_SCORES // (batch * num_heads * k_BTHD.shape[1]))
    for some, in_row, counts in zip(*(x.split(rows_at_once) for x in (tokens, row, weight)), strict=True):
        q_BHLD = q_BLHD[:, some].transpose(1, 2).float()
        lse_BHL = lse_BLH[:, some].transpose(1, 2).float()
        lse_BHL = lse_BHL.masked_fill(lse_BHL == -math.inf, math.inf)
        paid = (q_BHLD @ k_BHTD.transpose(-1, -2) * scale - lse_BHL[..., None]).exp()
        by_col = paid.new_zeros(*paid.shape[:3], k_blocks.num_blocks).index_add_(3, col, paid)
        mass.index_add_(2, in_row, by_col * counts[:, None])
    return mass


def sampled(blocks: Blocks, num_tokens: int, every: int) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens that stand for their blocks: their indices, their blocks, and how many each stands for."""
    places = torch.arange(num_tokens, device=blocks.offsets.device)
    block = Blocks(blocks.offsets).block_of(num_tokens)[0]
    sampled = (places - blocks.offsets[0].long()[block]) % every == 0
    places, block = places[sampled], block[sampled]
    lengths = blocks.lengths()[0].long()
    weight = lengths / ((lengths + every - 1) // every).clamp(min=1)
    return places if blocks.order is None else blocks.order[0].long()[places], block, weight[block]


def _check(q: Tensor, k: Tensor, lse: Tensor, q_blocks: Blocks, k_blocks: Blocks, sample_every: int) -> None:
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, lse {list(lse.shape)}"
    if not (q.dim() == k.dim() == 4 and q.shape[0] == k.shape[0] and q.shape[2:] == k.shape[2:]):
        raise ValueError(f"q must be [B, L, H, D] and k [B, T, H, D]: {shapes}")
    if lse.shape != q.shape[:3]:
        raise ValueError(f"lse must be [B, L, H]: {shapes}")
    if sample_every < 1:
        raise ValueError(f"sample_every must be at least 1, not {sample_every}")
    for name, blocks, count in (("q", q_blocks, q.shape[1]), ("k", k_blocks, k.shape[1])):
        orders = 1 if blocks.order is None else len(blocks.order)
        if len(blocks.offsets) != 1 or orders != 1:
            raise ValueError(f"{name}_blocks must be the same for all heads, not of {len(blocks.offsets)} groups")
        if blocks.order is not None and blocks.order.shape[1] != count:
            raise ValueError(f"{name}_blocks order {blocks.order.shape[1]} tokens, but there are {count}")
        if blocks.offsets.device.type == "cpu" and int(blocks.offsets[0, -1]) != count:
            raise ValueError(f"{name}_blocks end at {int(blocks.offsets[0, -1])}, but there are {count} tokens")
