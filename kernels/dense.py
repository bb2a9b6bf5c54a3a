"""Dense attention: the one place that chooses which kernel runs it, a library's or, on a CPU with matrix units, ours.

Shapes: B batch, L queries, T keys, H heads, D of a head.
"""

from __future__ import annotations

import functools
import math
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from longvid.kernels import cpu, native

Partial = tuple[Tensor, Tensor]
"""Attention to some of the keys: output [B, L, H, D], and the logarithm of the softmax's sum [B, L, H]."""

MIN_KEYS = {torch.float32: 1, torch.bfloat16: 1}
"""Keys from which on our kernel for matrix units serves: those of a prompt, too, for then a whole layer is one call.
Queries do not count: which kernel computes a row, and so its bits, must not depend on how many others there are."""


def attend(q_BLHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, bias_BHLT: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / sqrt(D) + bias) v, in the dtype of the inputs; [B, L, H, D].

    ``bias`` broadcasts to [B, H, L, T]; -inf hides a column, log n makes a column count n times.
    """
    if suits_matrix_units(q_BLHD, k_BTHD, v_BTHD) and (bias_BHLT is None or _is_of_columns(bias_BHLT, k_BTHD.shape[1])):
        return cpu.dense(q_BLHD, k_BTHD, v_BTHD, None if bias_BHLT is None else bias_BHLT[:, :, 0])[0]
    q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BTHD, v_BTHD))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias_BHLT).transpose(1, 2)


def attend_lse(q_BLHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor) -> Partial:
    """softmax(q kᵀ / sqrt(D)) v in the dtype of the inputs, and log sum exp(q kᵀ / sqrt(D)), natural, fp32 [B, L, H].

    Without keys the output is 0 and the logarithm -inf, which `merge_partials` takes as nothing.
    """
    if q_BLHD.numel() == 0 or k_BTHD.numel() == 0:  # the CPU kernel ends the process on these
        return torch.zeros_like(q_BLHD), q_BLHD.new_full(q_BLHD.shape[:3], -math.inf, dtype=torch.float32)
    if suits_matrix_units(q_BLHD, k_BTHD, v_BTHD):
        return cpu.dense(q_BLHD, k_BTHD, v_BTHD)
    if q_BLHD.device.type == "cpu":
        return _torch_flash(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, q_BLHD, k_BTHD, v_BTHD)
    if _suits_cuda_flash(q_BLHD):
        if _has_flash_attn():
            return _flash_attn(q_BLHD, k_BTHD, v_BTHD)
        return _torch_flash(torch.ops.aten._scaled_dot_product_flash_attention, q_BLHD, k_BTHD, v_BTHD)
    if _suits_cuda_efficient(q_BLHD):
        return _torch_efficient(q_BLHD, k_BTHD, v_BTHD)
    return attend_lse_exact(q_BLHD, k_BTHD, v_BTHD)


def attend_lse_exact(q_BLHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor) -> Partial:
    """`attend_lse` as it reads: in fp32 or better, with all scores in memory."""
    wide = torch.promote_types(q_BLHD.dtype, torch.float32)
    q, k, v = (x.to(wide) for x in (q_BLHD, k_BTHD, v_BTHD))
    scores_BHLT = torch.einsum("blhd,bthd->bhlt", q, k) / math.sqrt(q.shape[-1])
    out = torch.einsum("bhlt,bthd->blhd", scores_BHLT.softmax(-1), v)
    return out.type_as(q_BLHD), scores_BHLT.logsumexp(-1).transpose(1, 2).float()


def suits_matrix_units(q_BLHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor) -> bool:
    """Whether our kernel computes it: on a CPU with AMX, many keys, no gradient."""
    all_three = (q_BLHD, k_BTHD, v_BTHD)
    return (
        q_BLHD.device.type == "cpu"
        and is_for_matrix_units(q_BLHD.dtype, k_BTHD.shape[1], q_BLHD.shape[-1])
        and q_BLHD.numel() > 0
        and q_BLHD.dtype == k_BTHD.dtype == v_BTHD.dtype
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in all_three))
        and not torch.compiler.is_compiling()
    )


def is_for_matrix_units(dtype: torch.dtype, num_keys: int, dim: int) -> bool:
    """Whether our kernel serves for attention to so many keys with heads of ``dim``, on this processor."""
    return native.isa() == "amx" and num_keys >= MIN_KEYS.get(dtype, math.inf) and dim <= cpu.MAX_HEAD_DIM


def _is_of_columns(bias_BHLT: Tensor, num_keys: int) -> bool:
    """Whether all queries of a head have the same bias: a float for every key."""
    is_one_row = bias_BHLT.dim() == 4 and bias_BHLT.shape[2] == 1 and bias_BHLT.shape[3] == num_keys
    return is_one_row and bias_BHLT.is_floating_point() and not bias_BHLT.requires_grad


def _torch_flash(kernel: torch._ops.OpOverloadPacket, q_BLHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor) -> Partial:
    q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BTHD, v_BTHD))
    out_BHLD, lse_BHL = kernel(q, k, v)[:2]
    return out_BHLD.transpose(1, 2), lse_BHL.transpose(1, 2).float()


def _torch_efficient(q_BLHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor) -> Partial:
    """By the kernel that takes fp32; its LSE is padded to a multiple of 32 queries."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BTHD, v_BTHD))
    out_BHLD, lse_BHL = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[:2]
    return out_BHLD.transpose(1, 2), lse_BHL[..., : q_BLHD.shape[1]].transpose(1, 2).float()


def _flash_attn(q_BLHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor) -> Partial:
    from flash_attn import flash_attn_func

    # Without dropout it returns the LSE under this flag, and no probabilities.
    out, lse_BHL, _ = flash_attn_func(q_BLHD, k_BTHD, v_BTHD, return_attn_probs=True)
    return out, lse_BHL.transpose(1, 2)


@functools.cache
def _has_flash_attn() -> bool:
    return find_spec("flash_attn") is not None


def _suits_cuda_flash(q: Tensor) -> bool:
    is_half = q.dtype in (torch.float16, torch.bfloat16)
    return q.device.type == "cuda" and is_half and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def _suits_cuda_efficient(q: Tensor) -> bool:
    """Without it fp32 scores of 32,000 tokens would take 100 GB."""
    is_fp32 = q.dtype == torch.float32
    return q.device.type == "cuda" and torch.version.hip is None and is_fp32 and q.shape[-1] % 4 == 0
