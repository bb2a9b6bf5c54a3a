"""Blocks pooled in Triton: one program pools one block of one head.

Shapes: B batch, T tokens, H heads, D of a head, N blocks. Prefixes: p_ pointer, b_ tile of values, o_ offsets, m_ mask,
i_ index.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longvid.kernels.block_sparse import group_stride, load_rows, load_tokens, on_its_device, padded
from longvid.kernels.layout import Blocks


@on_its_device
def pool(x_BTHD: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor, Tensor]:
    """See `pool.pool`."""
    batch, _, num_heads, head_dim = x_BTHD.shape
    x = x_BTHD if x_BTHD.stride(3) == 1 else x_BTHD.contiguous()
    similarity = torch.empty(batch, num_heads, blocks.num_blocks, dtype=torch.float32, device=x.device)
    mean = similarity.new_empty(*similarity.shape, head_dim)
    largest = torch.empty_like(mean)
    block_d = padded(head_dim)
    pool_kernel[blocks.num_blocks, batch * num_heads](
        x,
        mean,
        largest,
        similarity,
        blocks.offsets,
        blocks.order,
        *x.stride()[:3],
        group_stride(blocks.offsets),
        group_stride(blocks.order),
        num_heads,
        D=head_dim,
        BLOCK_N=max(16, 4096 // block_d),
        BLOCK_D=block_d,
    )
    return mean, largest, similarity


@triton.jit
def pool_kernel(
    p_x, p_mean, p_largest, p_similarity, p_offsets, p_order,
    stride_xb, stride_xt, stride_xh, stride_offsets, stride_order, num_heads,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block of one head. The mean of the cosines of all pairs is the square of the mean of the unit vectors."""
    i_block, i_g = tl.program_id(0), tl.program_id(1)
    p_x += (i_g // num_heads).to(tl.int64) * stride_xb + (i_g % num_heads) * stride_xh
    if p_order is not None:
        p_order += i_g.to(tl.int64) * stride_order
    i_first = tl.load(p_offsets + i_g * stride_offsets + i_block)
    i_stop = tl.load(p_offsets + i_g * stride_offsets + i_block + 1)
    b_sum = tl.zeros([BLOCK_D], tl.float32)
    b_units = tl.zeros([BLOCK_D], tl.float32)
    b_largest = tl.full([BLOCK_D], float("-inf"), tl.float32)
    for i_place in range(i_first, i_stop, BLOCK_N):
        o_place = i_place + tl.arange(0, BLOCK_N)
        m_token = o_place < i_stop
        o_token = load_tokens(p_order, o_place, m_token)
        b_x = load_rows(p_x, o_token, m_token, stride_xt, D, BLOCK_D).to(tl.float32)
        b_norm = tl.maximum(tl.sqrt(tl.sum(b_x * b_x, 1)), 1e-12)
        b_sum += tl.sum(b_x, 0)
        b_units += tl.sum(b_x / b_norm[:, None], 0)
        b_largest = tl.maximum(b_largest, tl.max(tl.where(m_token[:, None], b_x, float("-inf")), 0))
    length = tl.maximum(i_stop - i_first, 1).to(tl.float32)
    is_empty = i_first == i_stop
    b_units = b_units / length
    similarity = tl.where(is_empty, 1.0, tl.sum(b_units * b_units, 0))
    o_block = i_g.to(tl.int64) * tl.num_programs(0) + i_block
    o_d = tl.arange(0, BLOCK_D)
    tl.store(p_mean + o_block * D + o_d, b_sum / length, mask=o_d < D)
    tl.store(p_largest + o_block * D + o_d, tl.where(is_empty, 0.0, b_largest), mask=o_d < D)
    tl.store(p_similarity + o_block, similarity)
