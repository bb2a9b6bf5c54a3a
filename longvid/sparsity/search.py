"""The search for each head's pattern (Sparse-vDiT): offline, on a few samples of a model's attention.

L_i = MSE(O_i, O_0) + penalty · (1 - S_i), with O_0 the dense output and S_i the share of its time that pattern i saves.

Shapes: B batch, L queries, T keys, H heads, D of a head, N layers, P patterns.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from longvid.kernels.dense import attend_lse
from longvid.kernels.dispatch import sparse_attention
from longvid.kernels.layout import BlockLayout, even_blocks, make_layout, one_group
from longvid.sparsity.profile import FULL, SKIP, Costs, Pattern, Profile
from longvid.sparsity.sparse_vdit import pattern_layout
from longvid.sparsity.static import with_groups
from longvid.sparsity.tokens import TokenMap

PATTERNS = (
    SKIP,
    *(Pattern(mode="diagonal", window=window) for window in (0.25, 0.5, 1.0, 2.0)),
    *(Pattern(mode="multi_diagonal", window=window) for window in (0.05, 0.1, 0.2)),
    *(Pattern(mode="vertical", window=window) for window in (1.0, 2.0, 4.0)),
)


@dataclass(frozen=True)
class Sample:
    """One attention of all heads of a layer: q [B, L, H, D], k and v [B, T, H, D]; after which share of the steps."""

    layer: int
    q_BLHD: Tensor
    k_BTHD: Tensor
    v_BTHD: Tensor
    tokens: TokenMap
    progress: float = 0.0


@dataclass(frozen=True)
class Search:
    """How heads are judged. Errors are shares of the variance of the layer's output over tokens, the mean of its heads.

    A pattern whose error exceeds `tolerance` is not taken; of the others, and `full`, the one of least loss. At most
    `max_skipped` of all heads are skipped: the paper's films collapse at 10 %.
    """

    patterns: tuple[Pattern, ...] = PATTERNS
    tile: int = 64
    penalty: float = 0.5
    tolerance: float = 0.05
    max_skipped: float = 0.06


class Judge:
    """Judges samples one by one, so that none need be kept."""

    def __init__(self, costs: Costs, how: Search) -> None:
        self._costs, self._how = costs, how
        self._judged: dict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)

    def add(self, sample: Sample) -> None:
        self._judged[sample.layer].append(judge(sample, self._costs, self._how))

    def profile(self, model: str) -> Profile:
        """The profile of the model that the samples are of. Raises ValueError where a layer has none."""
        if not self._judged or self._judged.keys() != set(range(len(self._judged))):
            raise ValueError(f"every layer from 0 on needs a sample; there are some of {sorted(self._judged)}")
        by_layer = [self._judged[layer] for layer in range(len(self._judged))]
        errors_NPH = torch.stack([torch.stack([errors for errors, _ in kept]).mean(0) for kept in by_layer])
        savings_NP = torch.stack([torch.stack([savings for _, savings in kept]).mean(0) for kept in by_layer])
        names = (FULL, *self._how.patterns)
        chosen, saved = choose(errors_NPH, savings_NP, self._how), savings_NP.mean(0).clamp(max=1.0)
        return Profile(
            model=model,
            num_layers=len(by_layer),
            num_heads=errors_NPH.shape[2],
            tile=self._how.tile,
            costs=self._costs,
            times={str(pattern): 1 - float(saving) for pattern, saving in zip(self._how.patterns, saved, strict=True)},
            layers=tuple(tuple(names[i] for i in heads) for heads in chosen.tolist()),
        )


def search(samples: Iterable[Sample], model: str, costs: Costs, how: Search) -> Profile:
    """The profile of a model from samples of every layer."""
    judge = Judge(costs, how)
    for sample in samples:
        judge.add(sample)
    return judge.profile(model)


def judge(sample: Sample, costs: Costs, how: Search) -> tuple[Tensor, Tensor]:
    """The error of each pattern for each head, fp32 [P, H], and the share of time that it saves, fp32 [P]."""
    dense = attend_lse(sample.q_BLHD, sample.k_BTHD, sample.v_BTHD)[0].float()
    variance = dense.var(1).mean()
    num_queries, num_keys = sample.q_BLHD.shape[1], sample.k_BTHD.shape[1]
    errors, savings = [], []
    for pattern in how.patterns:
        if pattern == SKIP:
            out, saving = torch.zeros_like(dense), 1.0
        else:
            layout = pattern_layout((pattern,), sample.tokens, how.tile)
            saving = costs.saving(num_queries, num_keys, layout.density(), len(layout.col))
            of_heads = with_groups(layout.to(dense.device), (0,) * dense.shape[2])
            out = sparse_attention(sample.q_BLHD, sample.k_BTHD, sample.v_BTHD, of_heads)[0].float()
        errors.append((out - dense).square().mean((0, 1, 3)) / variance)
        savings.append(saving)
    return torch.stack(errors).cpu(), torch.tensor(savings)


def choose(errors_NPH: Tensor, savings_NP: Tensor, how: Search) -> Tensor:
    """Each head's pattern as its place in `how.patterns`, from 1 on; 0: full. int64 [N, H]."""
    loss = errors_NPH + how.penalty * (1 - savings_NP[..., None])
    loss = loss.masked_fill(~(errors_NPH <= how.tolerance), math.inf)  # NaN too
    loss = torch.cat([torch.full_like(loss[:, :1], how.penalty), loss], dim=1)
    chosen = loss.argmin(1)
    if SKIP not in how.patterns:
        return chosen
    skip = 1 + how.patterns.index(SKIP)
    error_of_skipped = errors_NPH[:, skip - 1].masked_fill(chosen != skip, math.inf)
    rank = error_of_skipped.flatten().argsort(stable=True).argsort().view_as(chosen)
    loss[:, skip].masked_fill_(rank >= int(how.max_skipped * chosen.numel()), math.inf)
    return loss.argmin(1)


def measure_costs(device: torch.device | str = "cpu", head_dim: int = 64) -> Costs:
    """Times block-sparse attention at a few lengths, densities and tiles, and dense attention, on this machine. fp32.

    A head's seconds = scores · score_s + tiles · tile_s + tokens · token_s, fitted with equal relative errors.
    """
    num_heads = 4
    rows, dense = [], []
    for num_tokens in (1024, 2048):
        x = torch.randn(1, num_tokens, num_heads, head_dim, device=device)
        for tile in (32, 128):
            for density in (0.1, 0.3, 1.0):
                layout = with_groups(_random_layout(num_tokens, tile, density).to(device), (0,) * num_heads)
                seconds = _seconds(partial(sparse_attention, x, x, x, layout), x.device) / num_heads
                counts = (layout.density() * num_tokens**2, int(layout.row_ptr[0, -1]), 2 * num_tokens)
                rows.append([count / seconds for count in counts])
        dense.append(_seconds(partial(attend_lse, x, x, x), x.device) / num_heads / num_tokens**2)
    score_s, tile_s, token_s = _fit(np.array(rows))
    return Costs(score_s=score_s, tile_s=tile_s, token_s=token_s, dense_score_s=min(dense))


def _fit(rows: np.ndarray) -> list[float]:
    """Non-negative prices at which each row costs 1: those that noise makes negative are 0."""
    prices, free = np.zeros(rows.shape[1]), np.ones(rows.shape[1], dtype=bool)
    while free.any():
        prices[free] = np.linalg.lstsq(rows[:, free], np.ones(len(rows)), rcond=None)[0]
        if (prices >= 0).all():
            break
        free &= prices > 0
        prices[~free] = 0
    return [float(price) for price in prices]


def _random_layout(num_tokens: int, tile: int, density: float) -> BlockLayout:
    blocks = even_blocks(num_tokens, tile)
    drawn = torch.rand(blocks.num_blocks, blocks.num_blocks, generator=torch.Generator().manual_seed(0))
    mask = (drawn < density) | torch.eye(blocks.num_blocks, dtype=torch.bool)
    return make_layout(blocks, blocks, mask[None], one_group(1))


def _seconds(run: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """The shortest of a few runs, after one that warms up."""
    run()
    times = []
    for _ in range(repeats):
        _wait(device)
        began = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - began)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
