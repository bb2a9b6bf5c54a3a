"""Merging attention to several sets of keys into attention to all of them.

Shapes: B batch, L queries, H heads, D of a head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def merge_partials(
    out_a_BLHD: Tensor, lse_a_BLH: Tensor, out_b_BLHD: Tensor, lse_b_BLH: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention to the keys of a and of b, from attention to each: output and LSE, both fp32.

    The LSE are natural: out = (e^lse_a · out_a + e^lse_b · out_b) / (e^lse_a + e^lse_b). A row whose LSE is -inf has
    seen no keys and weighs nothing; without keys on both sides it stays 0 and -inf.
    """
    lse_a_BLH, lse_b_BLH = lse_a_BLH.float(), lse_b_BLH.float()
    largest = torch.maximum(lse_a_BLH, lse_b_BLH)
    largest = largest.masked_fill(largest == -math.inf, 0.0)  # (-inf) - (-inf) would be NaN
    weight_a, weight_b = (lse_a_BLH - largest).exp(), (lse_b_BLH - largest).exp()
    total = weight_a + weight_b
    scale = total.clamp(min=1.0).reciprocal()  # one of the weights is 1, unless there are no keys at all
    weight_a, weight_b = ((weight * scale).unsqueeze(-1) for weight in (weight_a, weight_b))
    return weight_a * out_a_BLHD.float() + weight_b * out_b_BLHD.float(), largest + total.log()
