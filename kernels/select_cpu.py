"""Selection by score on the CPU, by the C++ of `csrc/`, where it was built at installation: see `select`.

Shapes: X heads or groups, R rows (query blocks), C columns (key blocks).
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from longvid.kernels.arguments import threads
from longvid.kernels.native import library


class _TopK(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("scores", "counts", "mask")),
        ("rows", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("columns", "threads")),
    ]


class _TopP(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weights", "mask")),
        ("rows", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("columns", "min_keep", "max_keep", "threads")),
        ("p", ctypes.c_float),
    ]


class _Greedy(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("scores", "area", "budget", "mask")),
        ("rows", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("columns", "threads")),
    ]


def top_k(scores_XRC: Tensor, count_XR: Tensor) -> Tensor:
    """See `select.top_k`."""
    scores, mask, sizes = _prepare(scores_XRC)
    counts = count_XR.long().contiguous()
    args = _TopK(*(x.data_ptr() for x in (scores, counts, mask)), **sizes)
    _check(library().longvid_top_k(ctypes.byref(args)))
    return mask


def top_p(weights_XRC: Tensor, p: float, min_keep: int, max_keep: int) -> Tensor:
    """See `select.top_p`."""
    weights, mask, sizes = _prepare(weights_XRC)
    args = _TopP(*(x.data_ptr() for x in (weights, mask)), min_keep=min_keep, max_keep=max_keep, p=p, **sizes)
    _check(library().longvid_top_p(ctypes.byref(args)))
    return mask


def greedy_area(scores_XRC: Tensor, area_XRC: Tensor, budget_XR: Tensor) -> Tensor:
    """See `select.greedy_area`."""
    scores, mask, sizes = _prepare(scores_XRC)
    area, budget = area_XRC.double().contiguous(), budget_XR.double().contiguous()
    args = _Greedy(*(x.data_ptr() for x in (scores, area, budget, mask)), **sizes)
    _check(library().longvid_greedy_area(ctypes.byref(args)))
    return mask


def _prepare(scores_XRC: Tensor) -> tuple[Tensor, Tensor, dict[str, int]]:
    scores = scores_XRC.detach().float().contiguous()
    mask = torch.empty(scores.shape, dtype=torch.bool)
    return scores, mask, {"rows": scores.shape[0] * scores.shape[1], "columns": scores.shape[2], "threads": threads()}


def _check(status: int) -> None:
    if status:
        raise MemoryError("no memory to choose columns by their scores")
