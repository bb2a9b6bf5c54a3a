"""Block-sparse attention in Triton: one program computes one tile of queries of one head.

Shapes: B batch, L queries, T keys, H heads, D of a head, G groups, R query blocks, C key blocks, S tiles of queries.
Prefixes: p_ pointer, b_ tile of values, o_ offsets, m_ mask, i_ index.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from longvid.kernels.dense import Partial
from longvid.kernels.layout import BlockLayout, Blocks

LOG2_E = 1.4426950408889634
P = ParamSpec("P")
T = TypeVar("T")


def on_its_device(launcher: Callable[Concatenate[Tensor, P], T]) -> Callable[Concatenate[Tensor, P], T]:
    """Have kernels run where the first tensor is: Triton launches on the current device, whatever it is given."""

    @wraps(launcher)
    def launch(x: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with torch.cuda.device_of(x):
            return launcher(x, *args, **kwargs)

    return launch


@dataclass(frozen=True)
class Config:
    """How a kernel is cut: queries and keys of a tile, warps, loads in flight, and keys of a tile of ragged blocks.

    Blocks that are ragged or gathered hold more addresses and masks in registers.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    ragged_n: int


# Chip and padded head dim: tiles for query blocks of up to 64 tokens, and for longer ones. 16-bit inputs.
CONFIGS: dict[str, dict[int, tuple[Config, Config]]] = {
    "sm_80": {
        64: (Config(64, 64, 4, 3, 64), Config(128, 64, 4, 3, 32)),
        128: (Config(64, 64, 4, 3, 32), Config(128, 64, 8, 2, 32)),
        256: (Config(64, 32, 8, 2, 32), Config(64, 32, 8, 2, 32)),
    },
    "sm_86": {  # 99 KB of shared memory; also 8.9 and 12.x
        64: (Config(64, 64, 4, 2, 64), Config(128, 64, 4, 2, 32)),
        128: (Config(64, 32, 4, 2, 32), Config(128, 32, 8, 2, 32)),
        256: (Config(64, 16, 4, 2, 16), Config(64, 16, 4, 2, 16)),
    },
    "sm_90": {
        64: (Config(64, 64, 4, 3, 64), Config(128, 128, 8, 3, 64)),
        128: (Config(64, 64, 4, 3, 64), Config(128, 128, 8, 2, 64)),
        256: (Config(64, 32, 8, 2, 32), Config(64, 32, 8, 2, 32)),
    },
    "sm_100": {
        64: (Config(64, 64, 4, 3, 64), Config(128, 128, 8, 3, 64)),
        128: (Config(64, 64, 8, 3, 64), Config(128, 64, 8, 3, 32)),
        256: (Config(64, 32, 8, 2, 32), Config(64, 32, 8, 2, 32)),
    },
    "gfx942": {
        64: (Config(64, 64, 4, 1, 64), Config(128, 64, 4, 1, 32)),
        128: (Config(64, 64, 4, 1, 64), Config(128, 64, 4, 1, 64)),
        256: (Config(64, 32, 4, 1, 32), Config(64, 32, 4, 1, 32)),
    },
}
FP32_CONFIGS = {64: Config(32, 32, 4, 1, 32), 128: Config(32, 32, 8, 1, 32), 256: Config(16, 32, 8, 1, 32)}


Loads = Literal["pointers", "descriptors"]
"""How keys and values are read: each row by its address, or a tile at once by the chip's copy engine (TMA)."""
DESCRIPTOR_CHIPS = ("sm_90", "sm_100")


@on_its_device
def forward(
    q_BLHD: Tensor,
    k_BTHD: Tensor,
    v_BTHD: Tensor,
    layout: BlockLayout,
    scale: float,
    k_bias: Tensor | None,
    loads: Loads = "pointers",
) -> Partial:
    """See `dispatch.sparse_attention`. Waits for nothing on the device.

    `loads`: descriptors serve where `suits_descriptors` says so, elsewhere they are pointers.
    """
    batch, num_queries, num_heads, head_dim = q_BLHD.shape
    num_keys = k_BTHD.shape[1]
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q_BLHD, k_BTHD, v_BTHD))
    bias = None if k_bias is None else k_bias.float().expand(batch, num_heads, -1)
    config, block_n = choose_config(q, layout)
    size = layout.k.size if layout.k.size is not None and layout.k.size % block_n == 0 else 0
    steps = None if size else key_steps(layout, num_keys, block_n)
    is_described = loads == "descriptors" and size > 0 and suits_descriptors(k, v)
    tile_row, tile_first = query_tiles(layout, num_queries, config.block_m)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    forward_kernel[tile_row.shape[1], batch * num_heads](
        q,
        describe(k, block_n) if is_described else k,
        describe(v, block_n) if is_described else v,
        bias,
        out,
        lse,
        tile_row,
        tile_first,
        layout.row_ptr,
        layout.col,
        *(steps if steps is not None else (None, None, None)),
        layout.group,
        layout.q.offsets,
        layout.q.order,
        layout.k.order,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *(bias.stride() if bias is not None else (0, 0, 0)),
        group_stride(layout.group),
        group_stride(layout.q.offsets),
        group_stride(layout.q.order),
        group_stride(layout.k.order),
        num_queries,
        num_keys,
        num_heads,
        layout.q.num_blocks,
        0 if steps is None else steps[1].shape[2],
        scale * LOG2_E,
        D=head_dim,
        SIZE=size,
        WHOLE=size > 0 and num_keys % size == 0,
        BLOCK_M=config.block_m,
        BLOCK_N=block_n,
        BLOCK_D=padded(head_dim),
        DESCRIBED=is_described,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out, lse


def suits_descriptors(*tensors: Tensor) -> bool:
    """Whether the copy engine can read them: 16 bits, head dims of a tile's width, rows at multiples of 16 bytes."""
    return all(
        x.dtype != torch.float32
        and x.shape[3] == padded(x.shape[3])
        and x.data_ptr() % 16 == 0
        and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:3])
        and (x.device.type != "cuda" or chip_of(x.device) in DESCRIPTOR_CHIPS)
        for x in tensors
    )


def describe(x_BTHD: Tensor, block_n: int) -> Any:
    """Tiles of so many tokens of one head, as Triton's `TensorDescriptor`, which it has from 3.4 on."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(x_BTHD, [1, block_n, 1, x_BTHD.shape[3]])


def padded(head_dim: int) -> int:
    """The head dim as tiles hold it."""
    return max(16, 1 << (head_dim - 1).bit_length())


def group_stride(x: Tensor | None) -> int:
    """The step from one group (or batch entry) to the next: 0 where all share one."""
    return 0 if x is None or x.shape[0] == 1 else x.stride(0)


def chip_of(device: torch.device) -> str:
    """The row of the table of configurations that serves a device."""
    if device.type != "cuda":  # Triton's interpreter
        return "sm_86"
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major == 12 or (major == 8 and minor > 0):
        return "sm_86"
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def choose_config(q_BLHD: Tensor, layout: BlockLayout) -> tuple[Config, int]:
    """The configuration for these queries and keys, and the keys of a tile, without asking the device."""
    block_d = max(64, padded(q_BLHD.shape[3]))
    if q_BLHD.dtype == torch.float32:
        config = FP32_CONFIGS[block_d]
    else:
        short, long = CONFIGS[chip_of(q_BLHD.device)][block_d]
        typical = layout.q.size if layout.q.size is not None else q_BLHD.shape[1] / layout.q.num_blocks
        config = short if typical <= 64 else long
    size = layout.k.size
    if size is None or size % 16 or layout.k.order is not None:
        return config, config.ragged_n
    return config, min(config.block_n, size & -size)  # the largest power of two that divides the blocks' length


def query_tiles(layout: BlockLayout, num_queries: int, block_m: int) -> tuple[Tensor, Tensor]:
    """Each tile's query block (-1: none) and the place of its first query, int32 [G, S].

    Tiles of the rows with most key blocks come first, so that no long one is left for the end. S is a bound from
    shapes alone; the true number of tiles stays on the device.
    """
    num_tiles = _bound_tiles(layout.q, num_queries, block_m)
    tiles = (layout.q.lengths() + block_m - 1) // block_m
    order = layout.row_ptr.diff(dim=-1).argsort(dim=-1, descending=True, stable=True)
    ends = tiles.expand(len(order), -1).gather(1, order).cumsum(-1)
    number = torch.arange(num_tiles, device=layout.device).expand(len(order), -1).contiguous()
    place = torch.searchsorted(ends, number, right=True)
    row = order.gather(1, place.clamp(max=order.shape[1] - 1))
    before = torch.nn.functional.pad(ends, (1, 0)).gather(1, place)
    first = layout.q.offsets.expand(len(order), -1).gather(1, row) + (number - before) * block_m
    return row.masked_fill(place == order.shape[1], -1).int(), first.int()


def _bound_tiles(blocks: Blocks, num_tokens: int, block_m: int) -> int:
    if blocks.size is not None:
        return blocks.num_blocks * -(-blocks.size // block_m)
    return blocks.num_blocks + num_tokens // block_m


def key_steps(layout: BlockLayout, num_keys: int, block_n: int) -> tuple[Tensor, Tensor, Tensor]:
    """The key blocks of each row cut into steps of up to `block_n` keys.

    The number of steps, int32 [G, R], and the places where each begins and its block ends, int32 [G, R, most]. With the
    steps listed the kernel walks them in one loop, whose next loads can be in flight, whatever the blocks' lengths.
    """
    groups, rows = layout.num_groups, layout.q.num_blocks
    most = layout.k.num_blocks + num_keys // block_n
    count = torch.empty(groups, rows, dtype=torch.int32, device=layout.device)
    first = torch.empty(groups, rows, most, dtype=torch.int32, device=layout.device)
    stop = torch.empty_like(first)
    offsets = layout.k.offsets
    steps_kernel[rows, groups](
        layout.row_ptr, layout.col, offsets, count, first, stop, group_stride(offsets), rows, most, BLOCK_N=block_n
    )
    return count, first, stop


@triton.jit
def steps_kernel(
    p_row_ptr, p_col, p_offsets, p_count, p_first, p_stop, stride_offsets, num_rows, max_steps, BLOCK_N: tl.constexpr
):  # fmt: skip
    """The steps of one row of one group."""
    i_g, i_row = tl.program_id(1), tl.program_id(0)
    i_begin = tl.load(p_row_ptr + i_g * (num_rows + 1) + i_row)
    i_end = tl.load(p_row_ptr + i_g * (num_rows + 1) + i_row + 1)
    p_offsets += i_g * stride_offsets
    o_row = (i_g * num_rows + i_row).to(tl.int64) * max_steps
    num_steps = 0
    for i_tile in range(i_begin, i_end, 64):
        o_tile = i_tile + tl.arange(0, 64)
        m_tile = o_tile < i_end
        b_col = tl.load(p_col + o_tile, mask=m_tile, other=0)
        b_first = tl.load(p_offsets + b_col)
        b_stop = tl.load(p_offsets + b_col + 1)
        b_count = tl.where(m_tile, (b_stop - b_first + BLOCK_N - 1) // BLOCK_N, 0)
        o_step = o_row + num_steps + tl.cumsum(b_count, 0) - b_count
        for i_step in range(0, tl.max(b_count, 0)):
            tl.store(p_first + o_step + i_step, b_first + i_step * BLOCK_N, mask=i_step < b_count)
            tl.store(p_stop + o_step + i_step, b_stop, mask=i_step < b_count)
        num_steps += tl.sum(b_count, 0)
    tl.store(p_count + i_g * num_rows + i_row, num_steps)


@triton.jit
def load_tokens(p_order, o_place, m_place):
    """The tokens that stand at some places."""
    return o_place if p_order is None else tl.load(p_order + o_place, mask=m_place)


@triton.jit
def load_rows(p_x, o_token, m_token, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [tokens, BLOCK_D] of x; 0 where the mask (None: nothing is masked) or the head dim ends."""
    o_d = tl.arange(0, BLOCK_D)
    p_rows = p_x + o_token.to(tl.int64)[:, None] * stride + o_d[None, :]
    m_d = (o_d < D)[None, :]
    if m_token is None:
        b_x = tl.load(p_rows) if D == BLOCK_D else tl.load(p_rows, mask=m_d, other=0.0)
    else:
        b_x = tl.load(p_rows, mask=m_token[:, None] if D == BLOCK_D else m_token[:, None] & m_d, other=0.0)
    return b_x


@triton.jit
def load_keys(
    p_x, o_token, m_token, stride, i_b, i_h, i_place,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Rows [BLOCK_N, BLOCK_D] of x: by address, or from a place on by a descriptor, which reads 0 past the end."""
    if DESCRIBED:
        b_x = p_x.load([i_b, i_place, i_h, 0]).reshape([BLOCK_N, BLOCK_D])
    else:
        b_x = load_rows(p_x, o_token, m_token, stride, D, BLOCK_D)
    return b_x


@triton.jit
def attend_step(
    b_q, b_acc, b_max, b_sum,
    p_k, p_v, p_bias, p_order, i_b, i_h, i_place, o_place, m_place,
    stride_kt, stride_vt, stride_bias, scale_log2,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Take in one tile of keys: the new accumulator, maximum and sum (online softmax, base 2)."""
    o_token = load_tokens(p_order, o_place, m_place)
    b_k = load_keys(p_k, o_token, m_place, stride_kt, i_b, i_h, i_place, D, BLOCK_N, BLOCK_D, DESCRIBED)
    b_scores = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2
    if p_bias is not None:
        b_bias = tl.load(p_bias + o_token * stride_bias, mask=m_place)
        b_scores += b_bias[None, :] * 1.4426950408889634
    if m_place is not None:
        b_scores = tl.where(m_place[None, :], b_scores, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_scores, 1))
    b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)  # (-inf) - (-inf) would be NaN
    b_weights = tl.exp2(b_scores - b_shift[:, None])
    b_decay = tl.exp2(b_max - b_shift)
    b_v = load_keys(p_v, o_token, m_place, stride_vt, i_b, i_h, i_place, D, BLOCK_N, BLOCK_D, DESCRIBED)
    b_acc = tl.dot(b_weights.to(b_v.dtype), b_v, b_acc * b_decay[:, None], input_precision="ieee")
    return b_acc, b_new, b_sum * b_decay + tl.sum(b_weights, 1)


@triton.jit
def forward_kernel(
    p_q, p_k, p_v, p_bias, p_out, p_lse,
    p_tile_row, p_tile_first, p_row_ptr, p_col, p_num_steps, p_step_first, p_step_stop,
    p_group, p_q_offsets, p_q_order, p_k_order,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_bias_b, stride_bias_h, stride_bias_t,
    stride_group, stride_q_offsets, stride_q_order, stride_k_order,
    num_queries, num_keys, num_heads, num_rows, max_steps, scale_log2,
    D: tl.constexpr, SIZE: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head against all key blocks of its row.

    SIZE: the length of every key block but the last, a multiple of BLOCK_N; 0: ragged, the steps are listed. WHOLE: nor
    is the last one shorter. DESCRIBED: p_k and p_v are descriptors; not for ragged blocks.
    """
    i_tile, i_b, i_h = tl.program_id(0), tl.program_id(1) // num_heads, tl.program_id(1) % num_heads
    i_group = tl.load(p_group + i_b * stride_group + i_h)
    i_g = tl.maximum(i_group, 0)  # a skipped head writes its zeros in the order of group 0
    i_row = tl.load(p_tile_row + i_g * tl.num_programs(0) + i_tile)
    if i_row < 0:
        return
    p_q_offsets += i_g * stride_q_offsets
    if p_q_order is not None:
        p_q_order += i_g * stride_q_order
    if p_k_order is not None:
        p_k_order += i_g * stride_k_order
    if p_bias is not None:
        p_bias += i_b * stride_bias_b + i_h * stride_bias_h
    if not DESCRIBED:
        p_k += i_b.to(tl.int64) * stride_kb + i_h * stride_kh
        p_v += i_b.to(tl.int64) * stride_vb + i_h * stride_vh

    o_place = tl.load(p_tile_first + i_g * tl.num_programs(0) + i_tile) + tl.arange(0, BLOCK_M)
    m_query = o_place < tl.load(p_q_offsets + i_row + 1)
    o_query = load_tokens(p_q_order, o_place, m_query).to(tl.int64)
    b_q = load_rows(p_q + i_b.to(tl.int64) * stride_qb + i_h * stride_qh, o_query, m_query, stride_ql, D, BLOCK_D)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)

    if SIZE > 0:
        STEPS: tl.constexpr = SIZE // BLOCK_N
        p_row_ptr += i_g * (num_rows + 1) + i_row
        i_begin = tl.load(p_row_ptr)
        num_steps = tl.where(i_group < 0, 0, (tl.load(p_row_ptr + 1) - i_begin) * STEPS)
        for i_step in range(0, num_steps):
            i_col = tl.load(p_col + i_begin + i_step // STEPS)
            i_key = i_col * SIZE + (i_step % STEPS) * BLOCK_N
            o_key = i_key + tl.arange(0, BLOCK_N)
            m_key = None if WHOLE else o_key < num_keys
            b_acc, b_max, b_sum = attend_step(
                b_q, b_acc, b_max, b_sum, p_k, p_v, p_bias, p_k_order, i_b, i_h, i_key, o_key, m_key,
                stride_kt, stride_vt, stride_bias_t, scale_log2, D, BLOCK_N, BLOCK_D, DESCRIBED,
            )  # fmt: skip
    else:
        i_row += i_g * num_rows
        num_steps = tl.where(i_group < 0, 0, tl.load(p_num_steps + i_row))
        p_step_first += i_row.to(tl.int64) * max_steps
        p_step_stop += i_row.to(tl.int64) * max_steps
        for i_step in range(0, num_steps):
            i_key = tl.load(p_step_first + i_step)
            o_key = i_key + tl.arange(0, BLOCK_N)
            m_key = o_key < tl.load(p_step_stop + i_step)
            b_acc, b_max, b_sum = attend_step(
                b_q, b_acc, b_max, b_sum, p_k, p_v, p_bias, p_k_order, i_b, i_h, i_key, o_key, m_key,
                stride_kt, stride_vt, stride_bias_t, scale_log2, D, BLOCK_N, BLOCK_D, DESCRIBED,
            )  # fmt: skip

    b_any = tl.where(b_sum == 0.0, 1.0, b_sum)  # no visible key: out 0, LSE -inf
    b_out = b_acc / b_any[:, None]
    b_lse = tl.where(b_sum == 0.0, float("-inf"), (b_max + tl.log2(b_any)) / 1.4426950408889634)
    o_row = (i_b.to(tl.int64) * num_queries + o_query) * num_heads + i_h
    o_d = tl.arange(0, BLOCK_D)
    m_out = m_query[:, None] & (o_d < D)[None, :]
    tl.store(p_out + o_row[:, None] * D + o_d[None, :], b_out.to(p_out.dtype.element_ty), mask=m_out)
    tl.store(p_lse + o_row, b_lse, mask=m_query)
