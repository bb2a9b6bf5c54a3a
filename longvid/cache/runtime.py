"""A cache at work on one rank: what it remembers of each chunk, forecasts by it, and the gate.

Shapes: l tokens of a unit on this rank, E their width. What is remembered is [1, l, E], in the dtype of activations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from longvid.cache.plan import CachePlan, Module, StepPlan
from longvid.cache.regions import RegionMemory, num_active
from longvid.cache.taylor import Series
from longvid.sparsity.policy import Memory

Place = tuple[int, int, int]
"""What memory is kept by: chunk, branch, layer."""

SPAN, GATE, SKIPPED = "span", "gate", "skipped"


class CacheRuntime:
    """One policy in all layers of a stage. Memory of a chunk goes with its last step."""

    def __init__(self, plan: CachePlan) -> None:
        self.plan = plan
        self._series: dict[Place, dict[str, Series]] = {}
        self._skipped: dict[int, int] = {}
        self.regions = RegionMemory(plan.regions) if plan.regions else None
        """For a policy that leaves tokens out."""

    def num_rows(self, num_tokens: int, num_own: int, width: int, step: int) -> int:
        """Rows of hidden states between stages: active tokens, and who they are (`Active.as_rows`)."""
        share = self.at(step).active
        return num_tokens if share == 1 else num_tokens - num_own + num_active(share, num_own) - (-num_tokens // width)

    def at(self, step: int) -> StepPlan:
        return self.plan.steps[step]

    # ----------------------------------------------------------------------------------------------------------- spans

    def span(self, chunk: int, branch: int, step: int) -> Series:
        """What the layers of the step's span add; it lies where their last one does."""
        return self._of((chunk, branch, self.at(step).span.stop - 1), SPAN)

    def module(self, place: Place, module: Module, step: int, compute: Callable[[], Tensor]) -> Tensor:
        """What a module of a layer gives: computed and remembered, or forecast."""
        name = place[2], module
        if name not in self.plan.kept_modules:
            return compute()
        series = self._of(place, module)
        if name in self.at(step).modules and not series.is_empty:
            return series.forecast(step)
        value = compute()
        series.learn(value, step)
        return value

    # ------------------------------------------------------------------------------------------------------------ gate

    def probe(self, entering: Tensor, hidden: Tensor, start: int, num_tokens: int) -> Tensor:
        """What the gate looks at, [1, some, E]: of all `num_tokens` of the unit, [1, l, E] from `start` on are here."""
        assert self.plan.gate is not None
        stride = -(-num_tokens // self.plan.gate.max_tokens)
        some = slice(-start % stride, None, stride)
        return hidden[:, some] - entering[:, some] if self.plan.gate.of_residual else hidden[:, some].clone()

    def judge(self, chunk: int, step: int, probe: Tensor) -> Tensor:
        """Sums over this rank's tokens for the decision, fp64 [3]: |forecast - found|, |found| and |forecast|."""
        series = self._gate(chunk)
        if series.is_empty:
            return probe.new_full((3,), torch.inf, dtype=torch.float64)
        forecast = series.forecast(step)
        return torch.stack([x.abs().sum(dtype=torch.float64) for x in (forecast - probe, probe, forecast)])

    def decide(self, chunk: int, sums: Tensor) -> bool:
        """Whether the step is left out, by the sums over all ranks."""
        assert self.plan.gate is not None
        difference, found, forecast = sums.tolist()
        return not self.plan.gate.is_computed(difference, found, forecast, self._skipped.get(chunk, 0))

    def note(self, chunk: int, *, is_left_out: bool) -> None:
        """Take down what was decided of the chunk's step."""
        self._skipped[chunk] = self._skipped.get(chunk, 0) + 1 if is_left_out else 0

    def learn_gate(self, chunk: int, step: int, probe: Tensor) -> None:
        """Take what the gate looks at, at a step that is computed."""
        self._gate(chunk).learn(probe, step)

    def _gate(self, chunk: int) -> Series:
        assert self.plan.gate is not None
        return self._of((chunk, 0, self.plan.gate.layers - 1), GATE)

    # ---------------------------------------------------------------------------------------------------------- memory

    def end_step(self, chunk: int, step: int) -> None:
        """After a unit: forget what no later step reads."""
        steps = self.plan.steps
        is_last = step == len(steps) - 1
        if is_last:
            self._skipped.pop(chunk, None)
            if self.regions:
                self.regions.forget(chunk)
        elif steps[step].span == steps[step + 1].span:
            return
        for place in [place for place in self._series if place[0] == chunk]:
            if is_last:
                del self._series[place]
            else:
                self._series[place].pop(SPAN, None)

    @property
    def num_bytes(self) -> int:
        """Bytes that are remembered."""
        of_series = sum(series.num_bytes for kept in self._series.values() for series in kept.values())
        return of_series + (self.regions.num_bytes if self.regions else 0)

    def state(self) -> dict[Place, Memory]:
        """What is remembered, as tensors that nobody writes to."""
        if self.regions:
            return self.regions.state()
        found: dict[Place, Memory] = {
            place: {f"{name}.{key}": x for name, series in kept.items() for key, x in series.state().items()}
            for place, kept in self._series.items()
            if kept
        }
        if self.plan.gate:
            for chunk, count in self._skipped.items():
                found.setdefault((chunk, 0, self.plan.gate.layers - 1), {})[SKIPPED] = torch.tensor(count)
        return found

    def load_state(self, state: Mapping[Place, Memory]) -> None:
        """Go on from what `state` gave; without anything, a new film begins."""
        self._series, self._skipped = {}, {}
        if self.regions:
            self.regions.load_state(state)
            return
        for place, memory in state.items():
            for name in {key.partition(".")[0] for key in memory} - {SKIPPED}:
                prefix = f"{name}."
                own = {key.removeprefix(prefix): x for key, x in memory.items() if key.startswith(prefix)}
                self._of(place, name).load_state(own)
            if SKIPPED in memory:
                self._skipped[place[0]] = int(memory[SKIPPED])

    def _of(self, place: Place, name: str) -> Series:
        kept = self._series.setdefault(place, {})
        if name not in kept:
            gate = self.plan.gate if name == GATE else None
            kept[name] = Series(gate.order if gate else self.plan.order)
        return kept[name]
