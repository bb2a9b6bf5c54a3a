"""Skipped blocks of keys seen as one key each: their mean, which counts as often as they have tokens.

Shapes: B batch, L queries, T keys, H heads, D of a head, G groups, R query blocks, C key blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from longvid.kernels import cluster_cpu, native
from longvid.kernels.dense import Partial
from longvid.kernels.layout import BlockLayout, Blocks
from longvid.kernels.merge import merge_partials
from longvid.kernels.permute import cluster_sums
from longvid.kernels.pool import pool

CPU_SLAB, GPU_SLAB = 1 << 21, 1 << 28
"""Scores that are in memory at once."""

LOWEST = torch.finfo(torch.float32).min


def with_skipped(
    q_BLHD: Tensor,
    k_BTHD: Tensor,
    v_BTHD: Tensor,
    partial: Partial,
    layout: BlockLayout,
    means: Sequence[Tensor] | None = None,
) -> Tensor:
    """Attention to a layout's tiles, and in the same softmax to the means of those that each row skips: [B, L, H, D].

    `partial` is attention to the tiles; its output may be written to. `means` are of each block's keys and values, fp32
    [B, H, C, D] (None: they are computed); of blocks that no row skips they may be anything finite. A mean of n keys
    has the bias log n (SVG-EAR, ASA_G). Layouts with heads that are skipped altogether have no rows to correct and are
    not supported.
    """
    k_mean, v_mean = means or (block_means(k_BTHD, layout.k), block_means(v_BTHD, layout.k))
    if _is_native(q_BLHD):
        scale = 1 / math.sqrt(q_BLHD.shape[3])
        return cluster_cpu.attend_skipped(q_BLHD, k_mean, v_mean, partial, layout, scale).type_as(q_BLHD)
    out, _ = merge_partials(*partial, *attend_skipped(q_BLHD, k_mean, v_mean, layout))
    return out.type_as(q_BLHD)


def block_means(x_BTHD: Tensor, blocks: Blocks) -> Tensor:
    """The mean of each block's tokens, fp32 [B, H, N, D]; 0 where a block is empty. Blocks of all heads, or of each."""
    if x_BTHD.device.type == "cuda":
        return pool(x_BTHD, blocks)[0]
    if _is_native(x_BTHD):
        return cluster_cpu.block_means(x_BTHD, blocks)
    batch, num_tokens, num_heads, _ = x_BTHD.shape  # on a CPU, sums alone take a tenth of the time
    labels = blocks.block_of(num_tokens).expand(batch * num_heads, -1).view(batch, num_heads, num_tokens)
    sums = cluster_sums(x_BTHD, labels, blocks.num_blocks).flatten(0, 1)
    return (sums / blocks.lengths().clamp(min=1)[..., None]).view(batch, num_heads, blocks.num_blocks, -1)


def _is_native(x: Tensor) -> bool:
    return x.device.type == "cpu" and native.is_available()


def attend_skipped(q_BLHD: Tensor, k_mean_BHCD: Tensor, v_mean_BHCD: Tensor, layout: BlockLayout) -> Partial:
    """Attention to the means of the key blocks that each query's row skips: fp32 [B, L, H, D], LSE fp32 [B, L, H].

    A query that skips nothing has LSE -inf, and any finite output.
    """
    batch, num_queries, num_heads, head_dim = q_BLHD.shape
    group = layout.group.long().expand(batch, -1)
    lengths = layout.k.lengths().float()[:, None, :]
    bias_GRC = lengths.log().masked_fill(layout.mask(), -math.inf)
    bias_BHRC = bias_GRC[group]
    block = layout.q.block_of(num_queries)
    row_BHL = block.expand(layout.num_groups, -1)[group]
    keys, values = k_mean_BHCD.float() / math.sqrt(head_dim), v_mean_BHCD.float()
    limit = CPU_SLAB if q_BLHD.device.type == "cpu" else GPU_SLAB
    outs, lses = [], []
    slab = max(1, limit // (batch * num_heads * bias_GRC.shape[2]))
    for q_BlHD, row_BHl in zip(q_BLHD.split(slab, 1), row_BHL.split(slab, 2), strict=True):
        scores = q_BlHD.transpose(1, 2).float() @ keys.mT
        scores += bias_BHRC.gather(2, row_BHl[..., None].expand_as(scores))
        highest = scores.amax(-1, keepdim=True)
        # Where nothing is skipped: (-inf) - (-inf) would be NaN. Others get no weight under e^-80, where exp is slow.
        weights = scores.sub_(highest.clamp(min=LOWEST)).clamp_(min=-80.0).exp_()
        total = weights.sum(-1, keepdim=True)
        outs.append((weights @ values) / total)
        lses.append((highest + total.log()).squeeze(-1))
    return torch.cat(outs, 2).transpose(1, 2), torch.cat(lses, 2).transpose(1, 2)
