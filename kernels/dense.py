"""Dense attention: the one place that chooses which library kernel runs it."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def attend(q_BSHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, bias_BHST: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / sqrt(D) + bias) v, in the dtype of the inputs; [B, S, H, D].

    ``bias`` broadcasts to [B, H, S, T]; -inf hides a column, log n makes a column count n times.
    """
    q, k, v = (x.transpose(1, 2) for x in (q_BSHD, k_BTHD, v_BTHD))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias_BHST).transpose(1, 2)
