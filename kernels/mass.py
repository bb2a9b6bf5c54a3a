"""Attention mass of blocks in Triton, from a cached LSE: one program sums one row of blocks of one head.

Shapes: B batch, L queries, T keys, H heads, D of a head, R query blocks, C key blocks.
Prefixes: p_ pointer, b_ tile of values, o_ offsets, m_ mask, i_ index.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longvid.kernels.block_sparse import LOG2_E, load_rows, load_tokens, on_its_device, padded
from longvid.kernels.layout import Blocks


@on_its_device
def block_mass(
    q_BLHD: Tensor,
    k_BTHD: Tensor,
    lse_BLH: Tensor,
    q_blocks: Blocks,
    k_blocks: Blocks,
    *,
    scale: float,
    sample_every: int = 1,
) -> Tensor:
    """The attention that each block of queries pays each block of keys, fp32 [B, H, R, C]: see `reference.block_mass`.

    Blocks are the same for all heads. `lse_BLH` is natural; a query whose LSE is -inf pays nothing. Of every block the
    first query and each `sample_every`-th after it stand for all of them.
    """
    batch, _, num_heads, head_dim = q_BLHD.shape
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q_BLHD, k_BTHD))
    rows, columns = q_blocks.num_blocks, k_blocks.num_blocks
    mass = torch.empty(batch, num_heads, rows, columns, dtype=torch.float32, device=q.device)
    lse = lse_BLH.float()
    block_m, block_n, num_warps = mass_config(q.dtype, padded(head_dim))
    mass_kernel[rows, batch * num_heads](
        q,
        k,
        lse,
        mass,
        q_blocks.offsets,
        q_blocks.order,
        k_blocks.offsets,
        k_blocks.order,
        *q.stride()[:3],
        *k.stride()[:3],
        *lse.stride(),
        num_heads,
        columns,
        sample_every,
        scale * LOG2_E,
        D=head_dim,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_D=padded(head_dim),
        num_warps=num_warps,
        num_stages=1,
    )
    return mass


def mass_config(dtype: torch.dtype, block_d: int) -> tuple[int, int, int]:
    """Queries and keys of a tile, and warps. Small tiles: many programs at once hide the loads."""
    if dtype == torch.float32:
        return 32, 32, 4
    return (64, 64, 4) if block_d <= 128 else (64, 32, 8)


@triton.jit
def load_queries(
    p_q, p_lse, p_order, o_place, m_query, stride_ql, stride_ll, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Queries and their LSE in base 2; +inf, which leaves no weight, where there is none."""
    o_query = load_tokens(p_order, o_place, m_query)
    b_q = load_rows(p_q, o_query, m_query, stride_ql, D, BLOCK_D)
    b_lse = tl.load(p_lse + o_query.to(tl.int64) * stride_ll, mask=m_query, other=float("-inf"))
    return b_q, tl.where(b_lse == float("-inf"), float("inf"), b_lse * 1.4426950408889634)


@triton.jit
def tile_mass(
    b_q, b_lse, p_k, p_order, i_first, i_stop, stride_kt, scale_log2,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What some queries pay the keys of one block, a sum for each query."""
    b_mass = tl.zeros_like(b_lse)
    for i_place in range(i_first, i_stop, BLOCK_N):
        o_place = i_place + tl.arange(0, BLOCK_N)
        m_key = o_place < i_stop
        b_k = load_rows(p_k, load_tokens(p_order, o_place, m_key), m_key, stride_kt, D, BLOCK_D)
        b_scores = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2
        b_scores = tl.where(m_key[None, :], b_scores, float("-inf"))
        b_mass += tl.sum(tl.exp2(b_scores - b_lse[:, None]), 1)
    return b_mass


@triton.jit
def mass_kernel(
    p_q, p_k, p_lse, p_mass, p_q_offsets, p_q_order, p_k_offsets, p_k_order,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kt, stride_kh, stride_lb, stride_ll, stride_lh,
    num_heads, num_columns, sample_every, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head against every block of keys."""
    i_row, i_b, i_h = tl.program_id(0), tl.program_id(1) // num_heads, tl.program_id(1) % num_heads
    p_q += i_b.to(tl.int64) * stride_qb + i_h * stride_qh
    p_k += i_b.to(tl.int64) * stride_kb + i_h * stride_kh
    p_lse += i_b.to(tl.int64) * stride_lb + i_h * stride_lh
    p_mass += (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + i_row) * num_columns
    i_first = tl.load(p_q_offsets + i_row)
    length = tl.load(p_q_offsets + i_row + 1) - i_first
    num_sampled = (length + sample_every - 1) // sample_every
    weight = length.to(tl.float32) / tl.maximum(num_sampled, 1).to(tl.float32)
    o_sample = tl.arange(0, BLOCK_M)
    b_q, b_lse = load_queries(
        p_q, p_lse, p_q_order, i_first + o_sample * sample_every, o_sample < num_sampled,
        stride_ql, stride_ll, D, BLOCK_D,
    )  # fmt: skip
    for i_column in range(0, num_columns):
        i_begin, i_end = tl.load(p_k_offsets + i_column), tl.load(p_k_offsets + i_column + 1)
        b_mass = tile_mass(b_q, b_lse, p_k, p_k_order, i_begin, i_end, stride_kt, scale_log2, D, BLOCK_N, BLOCK_D)
        # Blocks with more samples than a tile holds read their others again for every column.
        for i_sample in range(BLOCK_M, num_sampled, BLOCK_M):
            o_more = i_sample + o_sample
            b_q_more, b_lse_more = load_queries(
                p_q, p_lse, p_q_order, i_first + o_more * sample_every, o_more < num_sampled,
                stride_ql, stride_ll, D, BLOCK_D,
            )  # fmt: skip
            b_mass += tile_mass(
                b_q_more, b_lse_more, p_k, p_k_order, i_begin, i_end, stride_kt, scale_log2, D, BLOCK_N, BLOCK_D
            )  # fmt: skip
        tl.store(p_mass + i_column, tl.sum(b_mass, 0) * weight)
