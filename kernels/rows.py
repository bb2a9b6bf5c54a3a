"""What a layer does to single tokens between its matrix products: norms, gates, GELU, rotary embedding.

Each is one pass over memory by the C++ of `csrc/` on a CPU, in fp32 inside; elsewhere, and where a gradient is wanted,
it is torch's operations.

Shapes: n tokens, E their width, K kinds of tokens (noise levels), H heads, D of a head. `kinds` int32 [n] says which
row of a table [K, E] is a token's; None: the table has one row.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longvid.kernels import native
from longvid.kernels.arguments import DTYPES
from longvid.kernels.native import Isa

_LAYER, _RMS, _UNIT = range(3)

_TILE_VALUES = 2**18
"""Values that torch's elementwise work takes at a time, so that they stay in the core's cache."""


class _Norm(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "out", "gain", "shift", "kinds")),
        *((name, ctypes.c_int64) for name in ("count", "x_stride", "out_stride")),
        *((name, ctypes.c_int32) for name in ("width", "dtype", "norm", "silu", "threads", "isa")),
        ("eps", ctypes.c_float),
    ]


class _Gate(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "y", "out", "gate", "kinds")),
        ("count", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("width", "dtype", "threads", "isa")),
    ]


class _Gelu(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "out")),
        ("count", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("dtype", "threads", "isa")),
    ]


class _Rope(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "out", "cosines", "sines")),
        *((name, ctypes.c_int64) for name in ("x_token", "x_head", "out_token", "out_head", "table_token", "tokens")),
        *((name, ctypes.c_int32) for name in ("heads", "dim", "dtype", "threads", "isa")),
    ]


def layer_norm(
    x: Tensor, gain_KE: Tensor, shift_KE: Tensor, kinds: Tensor | None, eps: float, isa: Isa | None = None
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) · gain + shift, the tables fp32, [..., n, E] in the dtype of x."""
    tables = gain_KE, shift_KE
    if _suits(x, *tables):
        return _norm(x, torch.empty_like(x), *tables, kinds, _LAYER, eps, isa=isa)
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    return (normed * _of(gain_KE, kinds) + _of(shift_KE, kinds)).type_as(x)


def rms_norm(x: Tensor, gain_E: Tensor, eps: float | None, isa: Isa | None = None) -> Tensor:
    """x / sqrt(mean of squares + eps) · gain, [..., E]. eps None: the least of the dtype's that is not lost."""
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    if _suits(x) and gain_E.dtype in DTYPES and not _wants_grad(gain_E):
        return _norm(x, torch.empty_like(x), gain_E.detach().float(), None, None, _RMS, eps, isa=isa)
    return F.rms_norm(x, x.shape[-1:], gain_E.to(x.dtype), eps)


def unit_norm(x: Tensor, gain_E: Tensor, out: Tensor, *, silu: bool, isa: Isa | None = None) -> None:
    """Write x / max(|x|, 1e-12) · gain, through SiLU if asked for, to ``out``, both [..., E] and contiguous."""
    if _suits(x) and out.is_contiguous() and gain_E.dtype in DTYPES:
        _norm(x, out, gain_E.float(), None, None, _UNIT, 1e-12, silu=silu, isa=isa)
        return
    width = x.shape[-1]
    tile = max(1, _TILE_VALUES // width)
    for values, result in zip(x.view(-1, width).split(tile), out.view(-1, width).split(tile), strict=True):
        norm = torch.linalg.vector_norm(values, dim=-1, keepdim=True, dtype=torch.float32)
        torch.mul(values, norm.clamp_min_(1e-12).reciprocal_().to(x.dtype), out=result).mul_(gain_E)
        if silu:
            F.silu(result, inplace=True)


def add_gated(x: Tensor, y: Tensor, gate_KE: Tensor, kinds: Tensor | None, isa: Isa | None = None) -> Tensor:
    """x + y · gate, the table fp32, [..., n, E] in the dtype of x."""
    if _suits(x, gate_KE) and _suits(y) and x.dtype == y.dtype and x.shape == y.shape:
        out = torch.empty_like(x)
        count, width = _rows(x)
        args = _Gate(*map(_address, (x, y, out, gate_KE, kinds)), count, width, DTYPES[x.dtype], *_machine(isa))
        _check(native.library().longvid_gate(ctypes.byref(args)))
        return out
    return (x.float() + y.float() * _of(gate_KE, kinds)).type_as(x)


def gelu(x: Tensor, isa: Isa | None = None) -> Tensor:
    """x · (1 + tanh(sqrt(2 / π) · (x + 0.044715 x³))) / 2."""
    if _suits(x):
        out = torch.empty_like(x)
        args = _Gelu(_address(x), _address(out), x.numel(), DTYPES[x.dtype], *_machine(isa))
        _check(native.library().longvid_gelu(ctypes.byref(args)))
        return out
    return F.gelu(x, approximate="tanh")


def rotate(
    x_BLHD: Tensor, cos_1L1D: Tensor, sin_1L1D: Tensor, out_BLHD: Tensor | None = None, isa: Isa | None = None
) -> Tensor:
    """Interleaved rotary embedding: neighbours 2i and 2i + 1 of a head are turned by their angle.

    The tables are fp32 and have each angle's value twice. Written to ``out_BLHD`` where that is given.
    """
    tables = cos_1L1D, sin_1L1D
    if _turns(x_BLHD, *tables) and (out_BLHD is None or _lies_well(out_BLHD)):
        out = torch.empty_like(x_BLHD, memory_format=torch.contiguous_format) if out_BLHD is None else out_BLHD
        strides = x_BLHD.stride(1), x_BLHD.stride(2), out.stride(1), out.stride(2), cos_1L1D.stride(1)
        sizes = x_BLHD.shape[1], x_BLHD.shape[2], x_BLHD.shape[3]
        args = _Rope(*map(_address, (x_BLHD, out, *tables)), *strides, *sizes, DTYPES[x_BLHD.dtype], *_machine(isa))
        _check(native.library().longvid_rope(ctypes.byref(args)))
        return out
    cos, sin = cos_1L1D[..., 0::2], sin_1L1D[..., 1::2]
    first, second = x_BLHD.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2).type_as(x_BLHD)
    return turned if out_BLHD is None else out_BLHD.copy_(turned)


def _norm(
    x: Tensor,
    out: Tensor,
    gain: Tensor,
    shift: Tensor | None,
    kinds: Tensor | None,
    norm: int,
    eps: float,
    *,
    silu: bool = False,
    isa: Isa | None = None,
) -> Tensor:
    count, width = _rows(x)
    addresses = map(_address, (x, out, gain, shift, kinds))
    args = _Norm(*addresses, count, width, width, width, DTYPES[x.dtype], norm, silu, *_machine(isa), eps)
    _check(native.library().longvid_norm(ctypes.byref(args)))
    return out


def _of(table_KE: Tensor, kinds: Tensor | None) -> Tensor:
    """Each token's row, or the one of all."""
    return table_KE[0] if kinds is None else table_KE[kinds]


def _suits(x: Tensor, *tables: Tensor) -> bool:
    """Whether the C++ takes rows as they are."""
    return _is_plain(x) and x.is_contiguous() and all(t.dtype == torch.float32 and t.is_contiguous() for t in tables)


def _turns(x: Tensor, *tables: Tensor) -> bool:
    """Whether the C++ takes heads as they are, with tables of one angle a token."""
    same = all(t.shape == (1, x.shape[1], 1, x.shape[3]) and t.dtype == torch.float32 for t in tables)
    strides = {(t.stride(1), t.stride(3)) for t in tables}
    return _is_plain(x) and same and len(x) == 1 and _lies_well(x) and len(strides) == 1 and tables[0].stride(3) == 1


def _lies_well(x_BLHD: Tensor) -> bool:
    return x_BLHD.stride(3) == 1 and x_BLHD.shape[3] % 2 == 0


def _is_plain(x: Tensor) -> bool:
    """Whether it has memory on the CPU that the C++ can work on, and no gradient is to come."""
    known = x.device.type == "cpu" and x.dtype in DTYPES and type(x) in (Tensor, nn.Parameter)
    return known and native.is_available() and not _wants_grad(x)


def _wants_grad(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


def _rows(x: Tensor) -> tuple[int, int]:
    width = x.shape[-1]
    return (x.numel() // width if width else 0), width


def _address(x: Tensor | None) -> Any:
    return None if x is None else x.data_ptr()


def _machine(isa: Isa | None) -> tuple[int, int]:
    return torch.get_num_threads(), native.isa_index(isa)


def _check(status: int) -> None:
    assert status == 0, "the instruction set passed the checks"
