"""The searches for the options of fixed patterns: STA's window of each head, Efficient-vDiT's latents of each layer.

Both are offline, on a few samples of a model's attention, by the error that each option makes. STA (2502.04507) takes
the window of least error of each head and span of steps, Efficient-vDiT (2502.06155) the sparsest mask of each layer
within an error. Here all heads, or layers, share one budget: of density, or of error.

Shapes: B batch, L queries, T keys, H heads, D of a head, S spans of steps, N layers, O options.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import product
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longvid.kernels.dense import attend_lse
from longvid.kernels.dispatch import sparse_attention
from longvid.sparsity.cuboids import Extent
from longvid.sparsity.knapsack import choose_options
from longvid.sparsity.profile import Choices, Option
from longvid.sparsity.search import Sample
from longvid.sparsity.settings import Sta, TileFrames
from longvid.sparsity.sta import StaPolicy, places_of
from longvid.sparsity.static import with_groups
from longvid.sparsity.tile import TilePolicy
from longvid.sparsity.tokens import TokenMap

SIZES = (0, 1, 2, 3, 5, 9, 17, 33, 65)
"""Sides of windows in cuboids from 1 on, and numbers of global latents from 0 on; and all that there are."""


@dataclass(frozen=True)
class OptionSearch:
    """What is searched for, and within which budget.

    `settings` hold the tile, and the option that would serve all: its mean density is the budget, unless `tolerance`
    says which mean error may be made. `spans` are where spans of steps begin, as shares, for STA.
    """

    settings: Sta | TileFrames
    tolerance: float | None = None
    spans: tuple[float, ...] = (0.0, 0.5)

    @property
    def starts(self) -> tuple[float, ...]:
        return self.spans if isinstance(self.settings, Sta) else (0.0,)


class OptionJudge:
    """Judges samples one by one, so that none need be kept. The first says which options there are."""

    def __init__(self, how: OptionSearch) -> None:
        self._how = how
        self._values: list[Extent] | list[int] = []
        self._errors: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
        self._densities: list[list[float]] = []

    def add(self, sample: Sample) -> None:
        if not self._values:
            self._values = options_of(self._how.settings, sample.tokens)
        errors_OH, densities = judge_options(sample, self._how.settings, self._values)
        span = max(place for place, share in enumerate(self._how.starts) if sample.progress >= share)
        self._errors[span, sample.layer].append(errors_OH)
        self._densities.append(densities)

    def choices(self, model: str) -> Choices:
        """The choices for the model that the samples are of. Raises ValueError where a span of a layer has none."""
        num_spans, num_layers = len(self._how.starts), max((layer for _, layer in self._errors), default=-1) + 1
        places = list(product(range(num_spans), range(num_layers)))
        if not places or self._errors.keys() != set(places):
            raise ValueError(f"every span of steps of every layer needs a sample; {len(self._errors)} have one")
        errors = torch.stack([torch.stack(self._errors[place]).mean(0) for place in places]).mT.double().numpy()
        errors_SNHO = errors.reshape(num_spans, num_layers, *errors.shape[1:])
        densities = np.array(self._densities).mean(0)
        settings = self._how.settings
        value = settings.window if isinstance(settings, Sta) else settings.global_latents
        even = cast(list[object], self._values).index(value)
        chosen_SNH = choose_all(errors_SNHO, densities, even, self._how)
        picked = np.take_along_axis(errors_SNHO, chosen_SNH[..., None], -1)
        used, numbers = np.unique(chosen_SNH, return_inverse=True)
        placed = cast(list[list[list[int]]], numbers.reshape(chosen_SNH.shape).tolist())
        return Choices(
            model=model,
            num_layers=num_layers,
            num_heads=errors_SNHO.shape[2],
            policy=settings.policy,
            tile=settings.tile,
            density=float(densities[chosen_SNH].mean()),
            error=float(picked.mean()),
            even_density=float(densities[even]),
            even_error=float(errors_SNHO[..., even].mean()),
            options=tuple(Option(value=self._values[i], density=float(densities[i])) for i in used),
            spans=self._how.starts,
            chosen=tuple(tuple(tuple(heads) for heads in layers) for layers in placed),
        )


def options_of(settings: Sta | TileFrames, tokens: TokenMap) -> list[Extent] | list[int]:
    """The option of the settings, and others from the sparsest to one that leaves nothing out."""
    if isinstance(settings, Sta):
        t, h, w = (_sizes(len(places), 1) for places in places_of(tokens, settings.tile))
        return sorted({settings.window, *product(t, h, w)})
    return sorted({settings.global_latents, *_sizes(len(tokens.own), 0)})


def _sizes(whole: int, smallest: int) -> list[int]:
    return [size for size in SIZES if smallest <= size < whole] + [whole]


def judge_options(
    sample: Sample, settings: Sta | TileFrames, values: list[Extent] | list[int]
) -> tuple[Tensor, list[float]]:
    """Each option's error for each head, as a share of the layer's variance over tokens, fp32 [O, H]; densities."""
    dense = attend_lse(sample.q_BLHD, sample.k_BTHD, sample.v_BTHD)[0].float()
    variance = dense.var(1).mean()
    errors, densities = [], []
    for value in values:
        if isinstance(settings, Sta):
            layout = StaPolicy.rule(sample.tokens, settings.tile, [cast(Extent, value)])
        else:
            layout = TilePolicy.rule(sample.tokens, settings.tile, [cast(int, value)])
        of_heads = with_groups(layout.to(dense.device), (0,) * dense.shape[2])
        out = sparse_attention(sample.q_BLHD, sample.k_BTHD, sample.v_BTHD, of_heads)[0].float()
        errors.append((out - dense).square().mean((0, 1, 3)) / variance)
        densities.append(layout.density())
    return torch.stack(errors).cpu(), densities


def choose_all(
    errors_SNHO: NDArray[np.float64], densities: NDArray[np.float64], even: int, how: OptionSearch
) -> NDArray[np.int64]:
    """Each head's option, int64 [S, N, H]; heads of a layer have the same in Efficient-vDiT.

    Least error at the density of option `even` for all; or, with a tolerance, least density at that mean error. Raises
    ValueError where no choice keeps to it.
    """
    by_layer = not isinstance(how.settings, Sta)
    items = errors_SNHO.mean(2, keepdims=True) if by_layer else errors_SNHO
    errors = items.reshape(-1, items.shape[-1])
    costs = np.broadcast_to(densities, errors.shape)
    if how.tolerance is None:
        chosen = choose_options(errors, costs, float(densities[even]))
    else:
        chosen = choose_options(costs, errors, how.tolerance)
    return np.broadcast_to(chosen.reshape(items.shape[:-1]), errors_SNHO.shape[:-1])
