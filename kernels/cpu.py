"""Attention, block-sparse and dense, and block mass on the CPU, by the C++ of `csrc/`, where it was built.

Shapes: B batch, L queries, T keys, H heads, D of a head, R query blocks, C key blocks.
"""

from __future__ import annotations

import ctypes
import functools
import math

import torch
from torch import Tensor

from longvid.kernels.arguments import BlocksArgument, TensorArgument, as_int32, dense_heads, stride
from longvid.kernels.layout import BlockLayout, Blocks, even_blocks, one_group
from longvid.kernels.native import ISAS, Isa, isa_index, library

MAX_HEAD_DIM = 256
AMX = ISAS.index("amx")
PACKED_TOGETHER = 512
"""Keys of dense attention that one thread packs at a time."""


class _Attention(ctypes.Structure):
    _fields_ = [
        *((name, TensorArgument) for name in ("q", "k", "v", "out", "lse")),
        ("bias", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("bias_batch", "bias_head")),
        *((name, BlocksArgument) for name in ("q_blocks", "k_blocks")),
        *((name, ctypes.c_void_p) for name in ("row_ptr", "col", "group")),
        *((name, ctypes.c_int64) for name in ("group_batch", "num_col")),
        *((name, ctypes.c_int32) for name in ("num_groups", "batch", "heads", "dim", "threads", "isa", "is_bf16")),
        ("scale", ctypes.c_float),
    ]


class _Mass(ctypes.Structure):
    _fields_ = [
        *((name, TensorArgument) for name in ("q", "k", "lse")),
        ("mass", ctypes.c_void_p),
        *((name, BlocksArgument) for name in ("q_blocks", "k_blocks")),
        *((name, ctypes.c_int32) for name in ("batch", "heads", "dim", "sample_every", "threads", "isa", "is_bf16")),
        ("scale", ctypes.c_float),
    ]


def forward(
    q_BLHD: Tensor,
    k_BTHD: Tensor,
    v_BTHD: Tensor,
    layout: BlockLayout,
    scale: float,
    k_bias: Tensor | None,
    isa: Isa | None = None,
) -> tuple[Tensor, Tensor]:
    """See `dispatch.sparse_attention`. `isa`: a variant that this processor has; None: the fastest.

    Computes in fp32; with `amx` bf16 are multiplied as they are, weights rounded to bf16 with them, and summed in fp32.
    With `amx` infinities among q and k may show as NaN. Raises ValueError where a layout's indices point outside of
    what they index.
    """
    isa_number = isa_index(isa)
    q, k, v = (dense_heads(x, takes_bf16=isa_number == AMX) for x in (q_BLHD, k_BTHD, v_BTHD))
    batch, num_queries, num_heads, dim = q.shape
    out = torch.empty(batch, num_queries, num_heads, dim, dtype=q.dtype)
    lse = torch.empty(batch, num_queries, num_heads)
    bias = None if k_bias is None else k_bias.float().contiguous()
    q_blocks, k_blocks = as_int32(layout.q), as_int32(layout.k)
    row_ptr, col, group = (x.int().contiguous() for x in (layout.row_ptr, layout.col, layout.group))
    args = _Attention(
        *(TensorArgument.of(x) for x in (q, k, v, out, lse)),
        bias=None if bias is None else bias.data_ptr(),
        bias_batch=stride(bias, 0),
        bias_head=stride(bias, 1),
        q_blocks=BlocksArgument.of(q_blocks, num_queries),
        k_blocks=BlocksArgument.of(k_blocks, k.shape[1]),
        row_ptr=row_ptr.data_ptr(),
        col=col.data_ptr(),
        group=group.data_ptr(),
        group_batch=stride(group, 0),
        num_col=len(col),
        num_groups=layout.num_groups,
        batch=batch,
        heads=num_heads,
        dim=dim,
        threads=torch.get_num_threads(),
        isa=isa_number,
        is_bf16=q.dtype == torch.bfloat16,
        scale=scale,
    )
    _check(library().longvid_attention(ctypes.byref(args)))
    return out.type_as(q_BLHD), lse


def dense(
    q_BLHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, k_bias: Tensor | None = None, isa: Isa | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(q kᵀ / sqrt(D) + k_bias) v and its LSE, as `forward` gives them of a layout of all tiles.

    The bits of a query's row depend on the query, keys and values alone, not on the other queries or on threads.
    """
    layout = _all_tiles(q_BLHD.shape[1], k_BTHD.shape[1], q_BLHD.shape[2])
    return forward(q_BLHD, k_BTHD, v_BTHD, layout, 1 / math.sqrt(q_BLHD.shape[-1]), k_bias, isa)


@functools.lru_cache(maxsize=64)
def _all_tiles(num_queries: int, num_keys: int, num_heads: int) -> BlockLayout:
    q, k = even_blocks(num_queries, num_queries), even_blocks(num_keys, PACKED_TOGETHER)
    row_ptr = torch.tensor([[0, k.num_blocks]], dtype=torch.int32)
    return BlockLayout(q, k, row_ptr, torch.arange(k.num_blocks, dtype=torch.int32), one_group(num_heads))


def block_mass(
    q_BLHD: Tensor,
    k_BTHD: Tensor,
    lse_BLH: Tensor,
    q_blocks: Blocks,
    k_blocks: Blocks,
    *,
    scale: float,
    sample_every: int = 1,
    exact: bool = True,
    isa: Isa | None = None,
) -> Tensor:
    """See `score.block_mass`. `isa`: a variant that this processor has; None: the fastest."""
    isa_number = isa_index(isa)
    if isa_number == AMX and not exact:
        q_BLHD, k_BTHD = q_BLHD.bfloat16(), k_BTHD.bfloat16()
    q, k = (dense_heads(x, takes_bf16=isa_number == AMX) for x in (q_BLHD, k_BTHD))
    lse = lse_BLH.float()
    batch, num_queries, num_heads, dim = q.shape
    q_blocks, k_blocks = as_int32(q_blocks), as_int32(k_blocks)
    mass = torch.empty(batch, num_heads, q_blocks.num_blocks, k_blocks.num_blocks)
    args = _Mass(
        *(TensorArgument.of(x) for x in (q, k, lse)),
        mass=mass.data_ptr(),
        q_blocks=BlocksArgument.of(q_blocks, num_queries),
        k_blocks=BlocksArgument.of(k_blocks, k.shape[1]),
        batch=batch,
        heads=num_heads,
        dim=dim,
        sample_every=sample_every,
        threads=torch.get_num_threads(),
        isa=isa_number,
        is_bf16=q.dtype == torch.bfloat16,
        scale=scale,
    )
    _check(library().longvid_block_mass(ctypes.byref(args)))
    return mass


def _check(status: int) -> None:
    """Raise what a status of the C++ says."""
    if status == 3:
        raise MemoryError("no memory for the packed keys of block-sparse attention")
    assert status != 1, "neither the instruction set nor the head dim passed the checks"
    if status:
        raise ValueError("the layout's offsets, orders, columns or groups point outside of what they index")
