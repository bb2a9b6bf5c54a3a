"""Linear layers by the matrix units of x86 (AMX), in C++ (`csrc/matmul.cpp`).

A float is split into three bf16, and six of their nine products are taken: as near as fp32 arithmetic, and the units
are so much faster than AVX-512 that six take less time than one. bf16 has one product, with sums in fp32 that are
rounded once. What a row gives does not depend on the other rows, on the number of threads, or on whether the weight was
packed before.

Shapes: R rows, K numbers of each, N of what becomes of it.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longvid.kernels import native, rows
from longvid.kernels.arguments import DTYPES


class _Linear(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "packed", "bias", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "depth", "x_stride", "weight_stride", "out_stride")),
        *((name, ctypes.c_int32) for name in ("dtype", "gelu", "threads")),
    ]


def has_matrix_units() -> bool:
    """Whether linear layers on the CPU are multiplied here."""
    return native.isa() == "amx"


def linear(
    x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None, packed: Tensor | None = None, *, gelu: bool = False
) -> Tensor:
    """x · weightᵀ + bias, [..., K] to [..., N], and GELU (tanh) of that if asked for.

    ``packed`` is the weight as `pack` made it. Infinities in fp32 become NaN. What the matrix units do not take
    (another device or dtype, a gradient, a quantized weight) is torch's.
    """
    if not _suits(x, weight_NK, bias_N):
        out = F.linear(x, weight_NK, bias_N)
        return rows.gelu(out) if gelu else out
    columns, depth = weight_NK.shape
    x, stride = _with_rows(x)
    out = torch.empty((*x.shape[:-1], columns), dtype=x.dtype)
    weight = weight_NK if packed is None else None
    addresses = map(_address, (x, weight, packed, bias_N, out))
    sizes = x.numel() // depth, columns, depth, stride, weight_NK.stride(0), columns
    args = _Linear(*addresses, *sizes, DTYPES[x.dtype], gelu, torch.get_num_threads())
    _check(native.library().longvid_linear(ctypes.byref(args)))
    return out


def pack(weight_NK: Tensor) -> Tensor:
    """A weight as the matrix units take it: 1.5 times as much memory in fp32, as much in bf16. Copies it."""
    columns, depth = weight_NK.shape
    packed = torch.empty(packed_bytes(columns, depth, weight_NK.dtype), dtype=torch.uint8)
    weight = weight_NK.detach().contiguous()
    sizes = {"columns": columns, "depth": depth, "weight_stride": depth}
    args = _Linear(weight=weight.data_ptr(), dtype=DTYPES[weight.dtype], **sizes)
    _check(native.library().longvid_pack(ctypes.byref(args), ctypes.c_void_p(packed.data_ptr())))
    return packed


def packed_bytes(columns: int, depth: int, dtype: torch.dtype) -> int:
    """What `pack` takes for a weight [columns, depth]."""
    found = native.library().longvid_packed_bytes
    found.argtypes, found.restype = [ctypes.c_int64, ctypes.c_int64, ctypes.c_int32], ctypes.c_int64
    return int(found(columns, depth, DTYPES[dtype]))


def takes(weight_NK: Tensor) -> bool:
    """Whether the matrix units take such a weight as it is."""
    is_plain = type(weight_NK) in (Tensor, nn.Parameter) and weight_NK.device.type == "cpu"
    return is_plain and weight_NK.dtype in DTYPES and weight_NK.dim() == 2 and has_matrix_units()


def _suits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    is_one = x.dtype == weight.dtype and x.device.type == "cpu" and type(x) in (Tensor, nn.Parameter)
    is_one = is_one and (bias is None or (bias.dtype == x.dtype and bias.is_contiguous()))
    if not (is_one and takes(weight)) or 0 in x.shape or 0 in weight.shape or weight.stride(1) != 1:
        return False
    wants_grad = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    return x.shape[-1] == weight.shape[1] and not (wants_grad and torch.is_grad_enabled())


def _with_rows(x: Tensor) -> tuple[Tensor, int]:
    """x, its rows at one distance in memory, and that distance."""
    if x.is_contiguous():
        return x, x.shape[-1]
    if x.dim() > 1 and x.stride(-1) == 1 and x.numel() == x.shape[-2] * x.shape[-1]:
        return x, x.stride(-2)
    return x.contiguous(), x.shape[-1]


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _check(status: int) -> None:
    if status == 2:
        raise MemoryError("no memory to pack the weights of a linear layer")
    assert status == 0, "the processor's matrix units passed the checks"
