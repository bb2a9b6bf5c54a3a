"""Block-sparse attention: checks its arguments, and chooses who computes it. Backends differ in speed alone.

Shapes: B batch, L queries, T keys, H heads, D of a head, G groups, R query blocks, C key blocks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from longvid.kernels import cpu, gather, native
from longvid.kernels.dense import Partial
from longvid.kernels.layout import BlockLayout

Backend = Literal["triton", "cpu", "gather"]

MAX_HEAD_DIM = 256


def sparse_attention(
    q_BLHD: Tensor,
    k_BTHD: Tensor,
    v_BTHD: Tensor,
    layout: BlockLayout,
    *,
    scale: float | None = None,
    k_bias: Tensor | None = None,
    row_scale: Tensor | None = None,
    backend: Backend | None = None,
) -> Partial:
    """softmax(q kᵀ · scale + k_bias) v over the tiles of a layout: output [B, L, H, D] like q, LSE fp32 [B, L, H].

    fp32, bf16 or fp16, head dims up to 256. `scale` is 1 / sqrt(D) unless given. `k_bias` fp32 [B or 1, H or 1, T] is
    added to every score of a column: log n makes it count n times, -inf hides it. `row_scale` fp32, of a shape that
    broadcasts to [B, L, H], multiplies the output; its logarithm is taken from the LSE (Re-ttention's share of the
    whole softmax).
    The LSE is natural. A row without tiles, and a skipped head, have output 0 and LSE -inf. NaN in q, k or v shows in
    the rows that read it. Raises ValueError where shapes, dtypes or devices do not fit.
    """
    check(q_BLHD, k_BTHD, v_BTHD, layout, k_bias)
    scale = scale if scale is not None else 1 / math.sqrt(q_BLHD.shape[-1])
    if q_BLHD.numel() == 0 or k_BTHD.numel() == 0:
        out = torch.zeros_like(q_BLHD)
        lse = q_BLHD.new_full(q_BLHD.shape[:3], -math.inf, dtype=torch.float32)
    else:
        out, lse = _forward(backend or backend_for(q_BLHD.device))(q_BLHD, k_BTHD, v_BTHD, layout, scale, k_bias)
    if row_scale is not None:
        return (out * row_scale[..., None]).type_as(out), lse - row_scale.log()
    return out, lse


Forward = Callable[[Tensor, Tensor, Tensor, BlockLayout, float, Tensor | None], Partial]


def _forward(backend: Backend) -> Forward:
    if backend == "cpu":
        return cpu.forward
    if backend == "triton":
        from longvid.kernels import block_sparse

        return block_sparse.forward
    return gather.forward


@functools.cache
def backend_for(device: torch.device) -> Backend:
    """Who computes block-sparse attention on a device: Triton on CUDA, our C++ on the CPU, else torch."""
    if device.type == "cuda" and find_spec("triton") is not None:
        return "triton"
    if device.type == "cpu" and native.is_available():
        return "cpu"
    return "gather"


def check(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, k_bias: Tensor | None) -> None:
    """Raise ValueError where the arguments of an attention do not fit together."""
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not (q.dim() == k.dim() == v.dim() == 4 and k.shape == v.shape):
        raise ValueError(f"q must be [B, L, H, D], k and v [B, T, H, D]: {shapes}")
    if q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(f"q, k and v must agree in batch, heads and head dim: {shapes}")
    if q.shape[3] > MAX_HEAD_DIM:
        raise ValueError(f"a head dim of at most {MAX_HEAD_DIM} is supported: {shapes}")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"q, k and v must all be fp32, bf16 or fp16, not {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device == layout.device:
        raise ValueError(f"q, k, v on {q.device}, {k.device}, {v.device} and a layout on {layout.device}")
    check_layout(layout, q.shape, k.shape[1])
    wanted = (q.shape[0], q.shape[2], k.shape[1])
    if k_bias is not None and not (k_bias.dim() == 3 and _broadcasts(k_bias.shape, wanted)):
        raise ValueError(f"k_bias must be [B or 1, H or 1, T], not {list(k_bias.shape)}, for {shapes}")


def check_layout(layout: BlockLayout, q_shape: torch.Size, num_keys: int) -> None:
    """Raise ValueError where a layout is not one of these queries [B, L, H, D] and keys. Reads shapes, not values."""
    batch, num_queries, num_heads, _ = q_shape
    groups, rows = layout.num_groups, layout.q.num_blocks
    if layout.row_ptr.shape[1] != rows + 1:
        raise ValueError(f"row_ptr {list(layout.row_ptr.shape)} must be [G, R + 1] with R = {rows} query blocks")
    if layout.group.shape not in ((batch, num_heads), (1, num_heads)):
        raise ValueError(f"group {list(layout.group.shape)} must be [{batch} or 1, {num_heads}]")
    for name, blocks, count in (("q", layout.q, num_queries), ("k", layout.k, num_keys)):
        if blocks.order is not None and not (blocks.order.shape[0] in (1, groups) and blocks.order.shape[1] == count):
            raise ValueError(f"{name}.order {list(blocks.order.shape)} must be [{groups} or 1, {count}]")
        if blocks.offsets.shape[0] not in (1, groups):
            raise ValueError(f"{name}.offsets {list(blocks.offsets.shape)} must be [{groups} or 1, N + 1]")
        if layout.device.type == "cpu" and not bool((blocks.offsets[:, -1] == count).all()):
            raise ValueError(f"{name}.offsets end at {blocks.offsets[:, -1].tolist()}, but there are {count} tokens")


def _broadcasts(shape: torch.Size, to: tuple[int, int, int]) -> bool:
    return shape[0] in (1, to[0]) and shape[1] in (1, to[1]) and shape[2] == to[2]
