"""Which key blocks each row of queries computes, chosen by score on the device, without waiting for it.

Shapes: X heads or groups, R rows (query blocks), C columns (key blocks). Rows choose on their own; each keeps at least
one column. Of equal scores the smaller column counts as the larger.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from longvid.kernels import native, select_cpu

MAX_FUSED_COLUMNS = 4096
"""Of a row that one Triton program holds."""


def top_k(scores_XRC: Tensor, k: int | Tensor) -> Tensor:
    """The `k` largest of each row, no fewer than one; bool [X, R, C]. `k` is an int, or int [X] or [X, R]."""
    if isinstance(k, Tensor):
        count_XR = (k[:, None] if k.dim() == 1 else k).expand(scores_XRC.shape[:2])
    else:
        count_XR = torch.full(scores_XRC.shape[:2], k, device=scores_XRC.device)
    if _is_fused(scores_XRC):
        from longvid.kernels import select_triton

        return select_triton.top_k(scores_XRC, count_XR)
    if _is_native(scores_XRC):
        return select_cpu.top_k(scores_XRC, count_XR)
    return _first(_falling(scores_XRC), count_XR)


def top_p(weights_XRC: Tensor, p: float, min_keep: int = 1, max_keep: int | None = None) -> Tensor:
    """The fewest columns of each row that hold a share `p` of its weight, bool [X, R, C].

    Weights are not negative. No fewer than `min_keep` columns, no more than `max_keep` (None: any number).
    """
    most = weights_XRC.shape[2] if max_keep is None else max_keep
    if _is_fused(weights_XRC):
        from longvid.kernels import select_triton

        return select_triton.top_p(weights_XRC, p, min_keep, most)
    if _is_native(weights_XRC):
        return select_cpu.top_p(weights_XRC, p, min_keep, most)
    order = _falling(weights_XRC)
    held = weights_XRC.float().gather(2, order).cumsum(-1)
    before = torch.nn.functional.pad(held[..., :-1], (1, 0))
    count = (before < p * held[..., -1:]).sum(-1)
    return _first(order, count.clamp(min_keep, most))


def greedy_area(scores_XRC: Tensor, area_XRC: Tensor, budget_XR: Tensor) -> Tensor:
    """Columns by falling score, up to the first that would exceed the row's budget of area; bool [X, R, C].

    No fewer than one. Areas are not negative, in any unit that the budget has too.
    """
    if _is_native(scores_XRC):
        return select_cpu.greedy_area(scores_XRC, area_XRC, budget_XR)
    order = _falling(scores_XRC)
    used = area_XRC.double().gather(2, order).cumsum(-1)
    return _first(order, (used <= budget_XR[..., None]).sum(-1))


def _falling(scores: Tensor) -> Tensor:
    return scores.sort(dim=-1, descending=True, stable=True).indices


def _first(order_XRC: Tensor, count_XR: Tensor) -> Tensor:
    """The first columns of each row in an order, at least one."""
    places = torch.arange(order_XRC.shape[2], device=order_XRC.device)
    chosen = places < count_XR.clamp(min=1)[..., None]
    return torch.empty_like(chosen).scatter_(2, order_XRC, chosen)


def _is_native(scores: Tensor) -> bool:
    return scores.device.type == "cpu" and scores.dtype == torch.float32 and native.is_available()


def _is_fused(scores: Tensor) -> bool:
    suits = scores.device.type == "cuda" and scores.dtype == torch.float32 and scores.shape[2] <= MAX_FUSED_COLUMNS
    return suits and find_spec("triton") is not None
