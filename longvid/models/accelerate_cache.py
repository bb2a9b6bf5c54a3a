"""A cache in one transformer of somebody else's diffusers pipeline: what is left out, and what stands in for it.

Shapes: B batch, L tokens, E their width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from longvid.cache.plan import CachePlan, Module, StepPlan
from longvid.cache.runtime import CacheRuntime
from longvid.cache.settings import Policy, plan_cache
from longvid.cache.taylor import Series
from longvid.models.accelerate_sequence import PipelineSequence
from longvid.models.accelerate_subjects import Subject
from longvid.models.clock import PipelineClock

Forward = Callable[..., Any]
States = tuple[Tensor, ...]
"""What a layer changes: video tokens [B, L, E], and text where it goes through the layers beside them."""


class CacheAcceleration:
    """Stands in for the ``forward`` of the transformer, of its layers, and where modules are cached of those.

    ``forward`` is set on the instances and taken away again: no module, parameter or hook of the model changes. With
    guidance the decision of the prompt's pass holds for the negative's. With `sequence` each rank remembers what its
    tokens are given, and all decide by the sums over all of them.
    """

    def __init__(
        self, subject: Subject, pipeline: Any, settings: Policy, sequence: PipelineSequence | None = None
    ) -> None:
        self._subject, self._settings, self._clock = subject, settings, PipelineClock(pipeline)
        self._sequence = sequence
        self._num_layers = len(subject.layers)
        self._runtime = CacheRuntime(CachePlan(()))
        self._first_step = 0
        self._outputs: dict[int, Series] = {}
        self._num_branches = 0
        self._anchor: States | None = None
        self._entering: Tensor | None = None
        self._is_left_out = False
        self._replaced: list[nn.Module] = []
        self._replace(subject.model, self._whole)
        for layer, block in enumerate(subject.layers):
            self._replace(block, partial(self._layer, layer))
            for module, name in subject.modules.items():
                self._replace(getattr(block, name), partial(self._part, layer, module))

    def remove(self) -> None:
        for module in self._replaced:
            del module.forward

    def _replace(self, module: nn.Module, wrap: Callable[[Forward], Forward]) -> None:
        module.forward = wrap(module.forward)
        self._replaced.append(module)

    @property
    def _plan(self) -> StepPlan:
        return self._runtime.at(self._clock.step)

    def _whole(self, inner: Forward) -> Forward:
        """The whole transformer. The wrapper bears its owner, so that ``restore`` finds it."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._velocity(inner, args, kwargs)

        forward.owner = self  # type: ignore[attr-defined]
        return forward

    def _velocity(self, inner: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the transformer returns: the velocity of a step, or its forecast."""
        self._begin(self._subject.call(args, kwargs)["timestep"])
        series = self._outputs.setdefault(self._clock.branch, Series(self._runtime.plan.order))
        is_forecast = self._plan.treatment == "forecast" and not self._plan.span and not series.is_empty
        found: Any = None if is_forecast else inner(*args, **kwargs)
        if is_forecast or (self._is_left_out and not self._plan.span):
            velocity = series.forecast(self._clock.step)
            return Transformer2DModelOutput(sample=velocity) if kwargs.get("return_dict", True) else (velocity,)
        if self._runtime.plan.forecasts_velocities:
            series.learn(found[0], self._clock.step)  # of a tuple and of diffusers' output class alike
        if self._clock.branch + 1 == self._num_branches:
            self._runtime.end_step(self._clock.run, self._clock.step)
        self._anchor = self._entering = None
        return found

    def _begin(self, timestep: Tensor) -> None:
        """Before a call: where it is, and what is known to be left out."""
        clock = self._clock
        if clock.tick(timestep):
            self._runtime = CacheRuntime(plan_cache(self._settings, clock.num_steps, self._num_layers))
            self._outputs, self._num_branches = {}, 0
            self._first_step = clock.step
        if clock.step == self._first_step:
            self._num_branches = clock.branch + 1
        if clock.branch == 0:
            span = self._plan.span
            is_known = bool(span) and not self._runtime.span(clock.run, 0, clock.step).is_empty
            self._is_left_out = self._plan.treatment == "forecast" and is_known

    def _layer(self, layer: int, inner: Forward) -> Forward:
        """One layer: run, or left out with the span that it is in."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            gate, names = self._runtime.plan.gate, self._subject.states
            states = tuple(kwargs[name] if name in kwargs else args[i] for i, name in enumerate(names))
            if layer == 0:
                self._entering = states[0]
            if gate and layer == gate.layers:
                self._pass_gate(states[0])
            plan, is_left_out = self._plan, self._is_left_out
            behind_gate = gate is not None and not plan.span and layer >= gate.layers
            if layer == plan.span.start:
                self._anchor = states
            if not (is_left_out and (behind_gate or layer in plan.span)):
                found = inner(*args, **kwargs)
                states = found if isinstance(found, tuple) else (found,)
            if layer == plan.span.stop - 1:
                states = self._end_span(states)
            return states if len(names) > 1 else states[0]

        return forward

    def _end_span(self, states: States) -> States:
        clock = self._clock
        series = self._runtime.span(clock.run, clock.branch, clock.step)
        if self._is_left_out:
            added = series.forecast(clock.step).split([x.shape[1] for x in states], 1)
            return tuple(x + y for x, y in zip(states, added, strict=True))
        assert self._anchor is not None
        series.learn(torch.cat([x - y for x, y in zip(states, self._anchor, strict=True)], 1), clock.step)
        return states

    def _pass_gate(self, hidden: Tensor) -> None:
        """Decide by what the first layers give in the prompt's pass; and learn that, if the step is computed."""
        clock, runtime = self._clock, self._runtime
        if clock.branch:
            return
        assert self._entering is not None
        sequence = self._sequence
        start, num_tokens = (sequence.part.start, sequence.num_tokens) if sequence else (0, hidden.shape[1])
        probe = runtime.probe(self._entering, hidden, start, num_tokens)
        if self._plan.treatment == "gated":
            sums = runtime.judge(clock.run, clock.step, probe)
            self._is_left_out = runtime.decide(clock.run, sequence.sum(sums) if sequence else sums)
            runtime.note(clock.run, is_left_out=self._is_left_out)
        if not self._is_left_out:
            runtime.learn_gate(clock.run, clock.step, probe)

    def _part(self, layer: int, module: Module, inner: Forward) -> Forward:
        """A module of a layer: run, or forecast."""

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            clock = self._clock
            place = clock.run, clock.branch, layer
            return self._runtime.module(place, module, clock.step, lambda: inner(*args, **kwargs))

        return forward
