"""Which steps, and which modules at which step, are worth computing: by what whole films showed. Pure, in numpy.

What a value (a velocity, a module's output) is at each of N steps comes as a Gram matrix [N, N] of inner products, in
which the error of every forecast that is a weighted sum of other steps' values can be read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from longvid.cache.plan import Module
from longvid.cache.table import Row

Matrix = NDArray[np.float64]


def forecast_errors(gram: Matrix, before: int, last: int, order: int) -> Matrix:
    """Relative errors of forecasts for all steps behind `last`, by it and, for order 1, the computed step `before` it.

    [N], 0 up to `last`. Without a step before (-1) the last value itself is the forecast.
    """
    num_steps = len(gram)
    errors = np.zeros(num_steps)
    k = np.arange(last + 1, num_steps)
    slope = (k - last) / (last - before) if order and before >= 0 else np.zeros(len(k))
    weights = np.zeros((len(k), num_steps))
    weights[:, last] += 1 + slope
    if before >= 0:
        weights[:, before] -= slope
    weights[np.arange(len(k)), k] -= 1
    squares = np.einsum("ki,ij,kj->k", weights, gram, weights)
    errors[last + 1 :] = np.sqrt(np.maximum(squares, 0) / np.maximum(np.diagonal(gram)[k], 1e-30))
    return errors


def choose_steps(gram: Matrix, sensitivity: Matrix, count: int, order: int) -> tuple[int, ...]:
    """The `count` steps to compute, first and last among them, with the least sum of sensitivity times error.

    `sensitivity` [N] says what a relative error of a step does to the film. Exact for order 0 and 1, by a dynamic
    programme over the last two computed steps. Raises ValueError for a count that cannot be had.
    """
    num_steps = len(gram)
    if not 2 <= count <= num_steps or order not in (0, 1):
        raise ValueError(f"{count} of {num_steps} steps cannot be chosen for order {order}")
    # until[a, b, c]: the cost of the steps between b and c, which are forecast by a and b; a = -1 lies at the end
    until = np.zeros((num_steps + 1, num_steps, num_steps))
    for last in range(num_steps):
        for before in (*range(last), -1):
            costs = sensitivity * forecast_errors(gram, before, last, order)
            until[before, last, 1:] = np.cumsum(costs)[:-1]
    best = np.full((num_steps + 1, num_steps), np.inf)
    best[-1, 0] = 0.0
    choices = []
    for _ in range(count - 1):
        totals = best[:, :, None] + until
        totals[:, np.arange(num_steps)[:, None] >= np.arange(num_steps)] = np.inf
        choices.append(totals.argmin(axis=0))
        found = totals.min(axis=0)
        best = np.vstack([found, np.full((1, num_steps), np.inf)])
    before, last = int(best[:num_steps, num_steps - 1].argmin()), num_steps - 1
    steps = [last]
    for choice in reversed(choices):
        steps.append(before)
        before, last = int(choice[before, last]), before
    return tuple(sorted(steps))


def choose_modules(grams: Mapping[tuple[int, Module], Matrix], updates: int, bubble: float) -> tuple[Row, ...]:
    """Block-wise adaptive caching (BAC): for each module its own `updates` steps, the others reuse the last value.

    Then the *bubbling union*: where a feed-forward is updated, so are those of the layers before it whose values change
    most, a share `bubble` of all; for their stale values would reach it. Returns what each step leaves out.
    """
    num_steps = len(next(iter(grams.values())))
    equal = np.ones(num_steps)
    computed = {name: set(choose_steps(gram, equal, updates, 0)) for name, gram in grams.items()}
    volatile = most_volatile({name: gram for name, gram in grams.items() if name[1] == "ffn"}, bubble)
    for layer, module in sorted(name for name in computed if name[1] == "ffn"):
        for upstream in volatile:
            if upstream < layer:
                computed[upstream, "ffn"] |= computed[layer, module]
    return tuple(frozenset(name for name in grams if step not in computed[name]) for step in range(num_steps))


def most_volatile(grams: Mapping[tuple[int, Module], Matrix], share: float) -> Sequence[int]:
    """The layers whose values change most from step to step, a share of all."""
    change = {
        layer: float(
            np.mean([forecast_errors(gram, -1, k, 0)[following] for k, following in pairwise(range(len(gram)))])
        )
        for (layer, _), gram in grams.items()
    }
    return sorted(change, key=lambda layer: -change[layer])[: round(share * len(change))]
