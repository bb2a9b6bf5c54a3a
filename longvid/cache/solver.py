"""Solvers that can do without the model: they forecast velocities, and remember what the negative's last one led to."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from longvid.cache.taylor import Series
from longvid.sampler import Sampler

TRAIN_TIMESTEPS = 1000
"""What a flow-matching model's timestep is a share of: its noise level."""


class CachingSampler:
    """A sampler whose solvers can forecast, by series of an `order`."""

    def __init__(self, sampler: Sampler, order: int) -> None:
        self._sampler, self._order = sampler, order

    @property
    def num_steps(self) -> int:
        return self._sampler.num_steps

    def timestep(self, step: int) -> float:
        return self._sampler.timestep(step)

    def new_solver(self) -> CachingSolver:
        return CachingSolver(self._sampler, self._order)


class CachingSolver:
    """A solver that learns from the velocities that it is given, guidance included, fp32 [C, latents, h, w]."""

    def __init__(self, sampler: Sampler, order: int) -> None:
        self._sampler, self._solver, self._series = sampler, sampler.new_solver(), Series(order)
        self._forecast = -1
        self._clean: Tensor | None = None

    def forecast(self, step: int) -> Tensor:
        """The velocity of a step, which `step` is to be given next."""
        self._forecast = step
        return self._series.forecast(step)

    def learn_negative(self, velocity: Tensor, step: int, sample: Tensor) -> None:
        """Take the negative's velocity of a step: it points from clean latents to the sample."""
        self._clean = sample - self._sigma(step) * velocity.float()

    def negative(self, step: int, sample: Tensor) -> Tensor:
        """The negative's velocity without a pass: from the clean latents of the last one to the sample."""
        assert self._clean is not None, "the first step has the negative's pass"
        return (sample - self._clean) / self._sigma(step)

    def step(self, velocity: Tensor, step: int, sample: Tensor) -> Tensor:
        """That of the solver. A computed velocity is learned from."""
        if step != self._forecast:
            self._series.learn(velocity.float(), step)
        return self._solver.step(velocity, step, sample)

    def state(self) -> dict[str, Tensor]:
        inner = {f"solver_{name}": value for name, value in self._solver.state().items()}
        clean = {} if self._clean is None else {"clean": self._clean}
        return self._series.state() | clean | inner

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        prefix = "solver_"
        self._clean = state.get("clean")
        self._series.load_state({name: x for name, x in state.items() if not name.startswith((prefix, "clean"))})
        self._solver.load_state({name[len(prefix) :]: x for name, x in state.items() if name.startswith(prefix)})

    def _sigma(self, step: int) -> float:
        return self._sampler.timestep(step) / TRAIN_TIMESTEPS
