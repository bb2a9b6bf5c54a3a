"""Top-k and top-p in Triton: one program finds one row's threshold, by bisection over the bits of its values.

A threshold decides exactly: what is above it is in, and of the values equal to it the first columns are, up to the
count.
Shapes: X heads or groups, R rows, C columns. Prefixes: p_ pointer, b_ tile of values, o_ offsets, m_ mask, i_ index.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longvid.kernels.block_sparse import on_its_device


@on_its_device
def top_k(scores_XRC: Tensor, count_XR: Tensor) -> Tensor:
    """See `select.top_k`; fp32 scores."""
    mask = torch.empty(scores_XRC.shape, dtype=torch.bool, device=scores_XRC.device)
    columns = scores_XRC.shape[2]
    block = triton.next_power_of_2(columns)
    top_k_kernel[count_XR.numel(),](
        scores_XRC.contiguous(), count_XR.contiguous(), mask, columns, BLOCK=block, num_warps=num_warps(block)
    )
    return mask


@on_its_device
def top_p(weights_XRC: Tensor, p: float, min_keep: int, max_keep: int) -> Tensor:
    """See `select.top_p`; fp32 weights."""
    mask = torch.empty(weights_XRC.shape, dtype=torch.bool, device=weights_XRC.device)
    num_heads, num_rows, columns = weights_XRC.shape
    block = triton.next_power_of_2(columns)
    top_p_kernel[num_heads * num_rows,](
        weights_XRC.contiguous(), mask, p, min_keep, max_keep, columns, BLOCK=block, num_warps=num_warps(block)
    )
    return mask


def num_warps(block: int) -> int:
    """Warps for a row of so many columns."""
    return 4 if block <= 1024 else 8


@triton.jit
def sortable(b_x, m_x):
    """fp32 as int32 of the same order; the least where masked."""
    b_bits = tl.where(b_x == 0.0, 0.0, b_x).to(tl.int32, bitcast=True)  # -0 equals 0
    return tl.where(m_x, tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits), -0x80000000)


@triton.jit
def first_equal(b_keys, i_threshold):
    """How many keys equal to the threshold stand before each column."""
    b_equal = (b_keys == i_threshold).to(tl.int32)
    return tl.cumsum(b_equal, 0) - b_equal


@triton.jit
def choose_count(b_keys, i_count):
    """The `i_count` largest keys; of equal ones the first."""
    i_threshold = tl.where(tl.sum((b_keys >= 0).to(tl.int32), 0) >= i_count, 0, -0x80000000)
    for i_bit in range(31):
        i_higher = i_threshold | (1 << (30 - i_bit))
        is_enough = tl.sum((b_keys >= i_higher).to(tl.int32), 0) >= i_count
        i_threshold = tl.where(is_enough, i_higher, i_threshold)
    b_above = b_keys > i_threshold
    i_left = i_count - tl.sum(b_above.to(tl.int32), 0)
    return b_above | ((b_keys == i_threshold) & (first_equal(b_keys, i_threshold) < i_left))


@triton.jit
def top_k_kernel(p_scores, p_count, p_mask, num_columns, BLOCK: tl.constexpr):
    """The largest of one row."""
    o_column = tl.arange(0, BLOCK)
    m_column = o_column < num_columns
    o_row = tl.program_id(0).to(tl.int64) * num_columns + o_column
    b_keys = sortable(tl.load(p_scores + o_row, mask=m_column, other=0.0), m_column)
    i_count = tl.minimum(tl.maximum(tl.load(p_count + tl.program_id(0)).to(tl.int32), 1), num_columns)
    tl.store(p_mask + o_row, choose_count(b_keys, i_count), mask=m_column)


@triton.jit
def top_p_kernel(p_weights, p_mask, share, min_keep, max_keep, num_columns, BLOCK: tl.constexpr):
    """The fewest columns of one row that hold a share of its weight."""
    o_column = tl.arange(0, BLOCK)
    m_column = o_column < num_columns
    o_row = tl.program_id(0).to(tl.int64) * num_columns + o_column
    b_weights = tl.load(p_weights + o_row, mask=m_column, other=0.0)
    b_keys = sortable(b_weights, m_column)  # not negative, so no bit of the sign
    wanted = tl.sum(b_weights, 0) * share
    i_threshold = 0
    for i_bit in range(31):
        i_higher = i_threshold | (1 << (30 - i_bit))
        is_enough = tl.sum(tl.where(b_keys >= i_higher, b_weights, 0.0), 0) >= wanted
        i_threshold = tl.where(is_enough, i_higher, i_threshold)
    b_above = b_keys > i_threshold
    above = tl.sum(tl.where(b_above, b_weights, 0.0), 0)
    b_missing = above + first_equal(b_keys, i_threshold).to(tl.float32) * b_weights < wanted
    b_chosen = m_column & (b_above | ((b_keys == i_threshold) & b_missing))
    i_count = tl.minimum(tl.maximum(tl.sum(b_chosen.to(tl.int32), 0), min_keep), max_keep)
    i_count = tl.minimum(tl.maximum(i_count, 1), num_columns)
    tl.store(p_mask + o_row, choose_count(b_keys, i_count), mask=m_column)
