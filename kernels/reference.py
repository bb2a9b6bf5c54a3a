"""Oracles: every operation of this package as it reads, in fp64 where it matters, with everything in memory.

Shapes: B batch, L queries, T keys, H heads, D of a head, G groups, R query blocks, C key blocks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longvid.kernels.layout import BlockLayout, Blocks


def token_mask(layout: BlockLayout, num_queries: int, num_keys: int) -> Tensor:
    """Which scores a layout computes: bool [B or 1, H, L, T]."""
    mask = layout.mask()
    rows = layout.q.block_of(num_queries).expand(len(mask), -1)
    cols = layout.k.block_of(num_keys).expand(len(mask), -1)
    group = torch.arange(len(mask), device=mask.device)[:, None, None]
    in_group = mask[group, rows[:, :, None], cols[:, None, :]]
    skipped = torch.zeros_like(in_group[:1])
    return torch.cat([in_group, skipped])[layout.group.long()]  # -1 is the last


def sparse_attention(
    q_BLHD: Tensor,
    k_BTHD: Tensor,
    v_BTHD: Tensor,
    layout: BlockLayout,
    *,
    scale: float | None = None,
    k_bias: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `dispatch.sparse_attention`; fp64."""
    q, k, v = (x.double().transpose(1, 2) for x in (q_BLHD, k_BTHD, v_BTHD))
    scores = q @ k.transpose(-1, -2) * (scale if scale is not None else 1 / math.sqrt(q.shape[-1]))
    if k_bias is not None:
        scores = scores + k_bias.double()[:, :, None, :]
    scores = scores.masked_fill(~token_mask(layout, q.shape[2], k.shape[2]), -math.inf)
    lse = scores.logsumexp(-1) if k.shape[2] else scores.new_full(scores.shape[:3], -math.inf)
    weights = (scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None]).exp()
    out_BLHD, lse_BLH = (weights @ v).transpose(1, 2), lse.transpose(1, 2)
    if row_scale is not None:
        out_BLHD, lse_BLH = out_BLHD * row_scale.double()[..., None], lse_BLH - row_scale.double().log()
    return out_BLHD, lse_BLH


def block_mass(
    q_BLHD: Tensor, k_BTHD: Tensor, lse_BLH: Tensor, q: Blocks, k: Blocks, *, scale: float | None = None
) -> Tensor:
    """The attention that each block of queries pays each block of keys, fp64 [B, H, R, C].

    W[p, q] = sum over i in p, j in q of exp(q_i · k_j · scale - LSE_i) (AdaSpa). Blocks are the same for all heads.
    """
    scores = torch.einsum("blhd,bthd->bhlt", q_BLHD.double(), k_BTHD.double())
    scores = scores * (scale if scale is not None else 1 / math.sqrt(q_BLHD.shape[-1]))
    weights = (scores - lse_BLH.double().transpose(1, 2)[..., None]).exp()
    in_row = torch.nn.functional.one_hot(q.block_of(q_BLHD.shape[1])[0], q.num_blocks).double()
    in_col = torch.nn.functional.one_hot(k.block_of(k_BTHD.shape[1])[0], k.num_blocks).double()
    return in_row.T @ weights @ in_col


def pool(x_BTHD: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor, Tensor]:
    """Of each block: mean and maximum [B, H, N, D], and mean cosine similarity of its tokens to each other [B, H, N].

    fp64. An empty block has mean and maximum 0 and similarity 1. Blocks are the same for all heads.
    """
    x = x_BTHD.double().transpose(1, 2)
    block = blocks.block_of(x.shape[2])[0]
    means, maxima, similarity = [], [], []
    for n in range(blocks.num_blocks):
        tokens = x[:, :, block == n]
        if tokens.shape[2] == 0:
            zero = x.new_zeros(*x.shape[:2], x.shape[3])
            means.append(zero)
            maxima.append(zero)
            similarity.append(x.new_ones(x.shape[:2]))
            continue
        unit = torch.nn.functional.normalize(tokens, dim=-1)
        means.append(tokens.mean(2))
        maxima.append(tokens.amax(2))
        similarity.append((unit @ unit.transpose(-1, -2)).mean((-1, -2)))
    return torch.stack(means, 2), torch.stack(maxima, 2), torch.stack(similarity, 2)


def nearest_centroid(x_BTHD: Tensor, centroids_BHND: Tensor) -> Tensor:
    """The centroid at the smallest Euclidean distance of each token, the first of equals: int64 [B, H, T]."""
    return torch.cdist(x_BTHD.double().transpose(1, 2), centroids_BHND.double()).argmin(-1)
