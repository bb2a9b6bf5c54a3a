"""Taylor series over computed steps (TaylorSeer, arXiv 2503.06923)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


class Series:
    """After step k: f_0 = value and f_(j+1) = (f_j - old f_j) / (k - old k), `order` + 1 terms at the most.

    forecast(n) = sum of f_j (n - k)^j / j!. Tensors are never written to.
    """

    def __init__(self, order: int) -> None:
        self._order = order
        self._terms: list[Tensor] = []
        self._last = -1

    @property
    def is_empty(self) -> bool:
        """Whether nothing was learned yet."""
        return not self._terms

    @property
    def num_bytes(self) -> int:
        return sum(term.nbytes for term in self._terms)

    def learn(self, value: Tensor, step: int) -> None:
        """Take the value of a step, which comes after those learned before."""
        terms = [value]
        for old in self._terms[: self._order]:
            terms.append((terms[-1] - old) / (step - self._last))
        self._terms, self._last = terms, step

    def forecast(self, step: int) -> Tensor:
        """The value of a later step."""
        assert self._terms, "the first step is computed"
        distance = step - self._last
        value = self._terms[0]
        for j, term in enumerate(self._terms[1:], start=1):
            value = value + term * (distance**j / math.factorial(j))
        return value

    def state(self) -> dict[str, Tensor]:
        return {f"term_{j}": term for j, term in enumerate(self._terms)} | {"last": torch.tensor(self._last)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._terms = [state[f"term_{j}"] for j in range(sum(name.startswith("term_") for name in state))]
        self._last = int(state["last"])
