"""Tensors and blocks as the C++ of `csrc/` takes them.

Shapes: B batch, T tokens, H heads, D of a head.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from longvid.kernels.layout import Blocks

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""As the C++ counts them."""


class TensorArgument(ctypes.Structure):
    """A [B, T, H, D] tensor of fp32, or [B, T, H], with its strides."""

    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "token", "head"))]

    @classmethod
    def of(cls, x: Tensor) -> TensorArgument:
        return cls(x.data_ptr(), x.stride(0), x.stride(1), x.stride(2))


class BlocksArgument(ctypes.Structure):
    """Blocks of one group or of each; a stride of 0 says that one serves for all."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("offsets", "order")),
        *((name, ctypes.c_int64) for name in ("offsets_stride", "order_stride")),
        *((name, ctypes.c_int32) for name in ("num_blocks", "num_tokens")),
    ]

    @classmethod
    def of(cls, blocks: Blocks, num_tokens: int) -> BlocksArgument:
        """`blocks` must be as `as_int32` gives them."""
        order = blocks.order
        data = None if order is None else order.data_ptr()
        strides = stride(blocks.offsets, 0), stride(order, 0)
        return cls(blocks.offsets.data_ptr(), data, *strides, blocks.num_blocks, num_tokens)


def dense_heads(x: Tensor, *, takes_bf16: bool = False) -> Tensor:
    """fp32, or bf16 where that is taken, with the elements of a head side by side."""
    x = x.detach()
    if x.dtype != torch.bfloat16 or not takes_bf16:
        x = x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


def as_int32(blocks: Blocks) -> Blocks:
    """The same blocks, contiguous."""
    order = blocks.order
    return Blocks(blocks.offsets.int().contiguous(), None if order is None else order.int().contiguous())


def stride(x: Tensor | None, dim: int) -> int:
    """The stride of a dim that is walked along; 0 where one serves for all."""
    return 0 if x is None or x.shape[dim] == 1 else x.stride(dim)


def threads() -> int:
    return torch.get_num_threads()
