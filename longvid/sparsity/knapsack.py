"""The knapsack of a search: one option for each item, of the least values within a limit of the mean weight. Pure."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

GRAINS = 2000
"""Parts of the whole weight, at least; each weight is rounded up to one. An item has 32 at least."""


def choose_options(values_IO: NDArray[np.float64], weights_IO: NDArray[np.float64], limit: float) -> NDArray[np.int64]:
    """The option of each item, int64 [items]: the least sum of values whose mean weight is at most `limit`.

    Values and weights are not negative; NaN and infinite ones are never taken. The limit holds exactly; the sum may
    miss the least one by what rounding a weight up to a 32nd of the limit costs, and less where items are few. Of equal
    sums the first options. Raises ValueError where not even the lightest options keep within the limit.
    """
    num_items = len(values_IO)
    a_item = max(32, math.ceil(GRAINS / num_items))
    can_be = np.isfinite(values_IO) & np.isfinite(weights_IO)
    # A weight of the limit itself is `a_item` grains, whatever rounding does.
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        shares = np.where(weights_IO == 0, 0.0, weights_IO / limit)
        grains = np.ceil(shares * a_item - 1e-9)
    total = num_items * a_item
    best = np.zeros(total + 1)  # the least sum within each weight
    taken = np.zeros((num_items, total + 1), dtype=np.int64)
    for item in range(num_items):
        sums = np.full((grains.shape[1], total + 1), np.inf)
        for option in np.flatnonzero(can_be[item] & (grains[item] <= total)):
            weight = int(grains[item, option])
            sums[option, weight:] = best[: total + 1 - weight] + values_IO[item, option]
        taken[item] = sums.argmin(0)
        best = sums.min(0)
    if not np.isfinite(best[total]):
        raise ValueError(f"no choice of options keeps to a mean weight of {limit:g}")
    chosen = np.zeros(num_items, dtype=np.int64)
    for item, left in zip(reversed(range(num_items)), _left(taken, grains, total), strict=True):
        chosen[item] = taken[item, left]
    return chosen


def _left(taken: NDArray[np.int64], grains: NDArray[np.float64], total: int) -> list[int]:
    """What is left of the weight before each item, from the last on."""
    left = [total]
    for item in range(len(taken) - 1, 0, -1):
        left.append(left[-1] - int(grains[item, taken[item, left[-1]]]))
    return left
