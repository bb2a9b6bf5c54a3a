"""Velocities forecast by a Taylor series over a chunk's computed steps (TaylorSeer, arXiv 2503.06923).

The series is of what the solver is given, guidance included: one velocity of a chunk, fp32 [C, latents, h, w].
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from longvid.sampler import Sampler, Solver


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
    """A solver that learns from computed velocities: after step k, f_0 = v and f_(j+1) = (f_j - old f_j) / (k - old k).

    forecast(n) = sum of f_j (n - k)^j / j!, over as many terms as steps were computed, but `order` + 1 at the most.
    """

    def __init__(self, solver: Solver, order: int) -> None:
        self._solver, self._order = solver, order
        self._terms: list[Tensor] = []
        self._last = -1
        self._forecast = -1

    def forecast(self, step: int) -> Tensor:
        """The velocity of a step, which `step` is to be given next."""
        assert self._terms, "the first step is computed"
        self._forecast = step
        distance = step - self._last
        terms = [term * (distance**j / math.factorial(j)) for j, term in enumerate(self._terms)]
        return torch.stack(terms).sum(0)

    def step(self, velocity: Tensor, step: int, sample: Tensor) -> Tensor:
        """That of the solver. A computed velocity is learned from."""
        if step != self._forecast:
            self._learn(velocity.float(), step)
        return self._solver.step(velocity, step, sample)

    def _learn(self, velocity: Tensor, step: int) -> None:
        terms = [velocity]
        for old in self._terms[: self._order]:
            terms.append((terms[-1] - old) / (step - self._last))
        self._terms, self._last = terms, step

    def state(self) -> dict[str, Tensor]:
        own = {f"term_{j}": term for j, term in enumerate(self._terms)}
        inner = {f"solver_{name}": value for name, value in self._solver.state().items()}
        return own | inner | {"last": torch.tensor(self._last)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._terms = [state[f"term_{j}"] for j in range(sum(name.startswith("term_") for name in state))]
        self._last = int(state["last"])
        prefix = "solver_"
        self._solver.load_state({name[len(prefix) :]: x for name, x in state.items() if name.startswith(prefix)})
