"""Taylor series over computed steps (TaylorSeer, arXiv 2503.06923), and velocities forecast by them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from longvid.sampler import Sampler, Solver


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


class TaylorSampler:
    """A sampler whose solvers can forecast."""

    def __init__(self, sampler: Sampler, order: int) -> None:
        self._sampler, self._order = sampler, order

    @property
    def num_steps(self) -> int:
        return self._sampler.num_steps

    def timestep(self, step: int) -> float:
        return self._sampler.timestep(step)

    def new_solver(self) -> TaylorSolver:
        return TaylorSolver(self._sampler.new_solver(), self._order)


class TaylorSolver:
    """A solver that learns from the velocities that it is given, guidance included, fp32 [C, latents, h, w]."""

    def __init__(self, solver: Solver, order: int) -> None:
        self._solver, self._series = solver, Series(order)
        self._forecast = -1

    def forecast(self, step: int) -> Tensor:
        """The velocity of a step, which `step` is to be given next."""
        self._forecast = step
        return self._series.forecast(step)

    def step(self, velocity: Tensor, step: int, sample: Tensor) -> Tensor:
        """That of the solver. A computed velocity is learned from."""
        if step != self._forecast:
            self._series.learn(velocity.float(), step)
        return self._solver.step(velocity, step, sample)

    def state(self) -> dict[str, Tensor]:
        inner = {f"solver_{name}": value for name, value in self._solver.state().items()}
        return self._series.state() | inner

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        prefix = "solver_"
        self._series.load_state({name: x for name, x in state.items() if not name.startswith(prefix)})
        self._solver.load_state({name[len(prefix) :]: x for name, x in state.items() if name.startswith(prefix)})
