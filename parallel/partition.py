"""Layers to stages: contiguous spans whose slowest stage is as fast as it can be. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise


@dataclass(frozen=True)
class Costs:
    """Measured times, in any one unit, per unit of work: each layer's, and what else the end stages do.

    `first` is what the first stage does besides layers (patches in), `last` the output layer. `decode` is a step's
    share of decoding the chunk, which the first stage does too. `measured_at` is the size in pixels that they were
    measured at and scaled from, if it was not the film's.
    """

    layers: tuple[float, ...]
    first: float = 0.0
    last: float = 0.0
    decode: float = 0.0
    measured_at: tuple[int, int] | None = None

    @property
    def total(self) -> float:
        return sum(self.layers) + self.first + self.last + self.decode

    def of_stages(self, bounds: Sequence[range]) -> list[float]:
        """The time of each stage for one unit, decoding included."""
        times = [sum(self.layers[layer] for layer in span) for span in bounds]
        times[0] += self.first + self.decode
        times[-1] += self.last
        return times


def split_layers(costs: Costs, num_stages: int) -> tuple[range, ...]:
    """Contiguous spans, one layer each at least, with the smallest possible maximum of `Costs.of_stages`.

    Among equals, the earlier spans are the shorter ones. Needs 1 <= num_stages <= the number of layers.
    """
    num_layers = len(costs.layers)
    assert 1 <= num_stages <= num_layers
    until = [0.0, *accumulate(costs.layers)]

    def cost(stage: int, start: int, stop: int) -> float:
        extra = (costs.first + costs.decode if stage == 0 else 0.0) + (costs.last if stage == num_stages - 1 else 0.0)
        return until[stop] - until[start] + extra

    @cache
    def best(stage: int, start: int) -> tuple[float, tuple[int, ...]]:
        """The slowest of the stages from this one on, when it begins at `start`, and where each begins."""
        if stage == num_stages - 1:
            return cost(stage, start, num_layers), (start,)
        options = []
        for stop in range(start + 1, num_layers - (num_stages - stage - 1) + 1):
            rest, starts = best(stage + 1, stop)
            options.append((max(cost(stage, start, stop), rest), (start, *starts)))
        return min(options)

    starts = best(0, 0)[1]
    return tuple(range(a, b) for a, b in pairwise((*starts, num_layers)))
