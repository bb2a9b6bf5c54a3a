"""What a cache leaves out, step by step: pure data, the same on every rank.

A policy answers for each of a chunk's own steps. It may leave out the whole step, whose velocity is then forecast; a
span of layers, whose sum of changes is then forecast; or single modules of layers. What depends on the data is decided
by the first rank alone, behind the first layers, and travels in the header of the unit's messages.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Module = Literal["self", "text", "ffn"]
MODULES: tuple[Module, ...] = ("self", "text", "ffn")
"""The parts of a layer: attention among tokens, attention to the prompt, feed-forward."""

Treatment = Literal["computed", "forecast", "gated"]


@dataclass(frozen=True)
class StepPlan:
    """What becomes of one step.

    `treatment` is that of the layers of `span`: forecast by what they changed in the hidden states at computed steps,
    or gated: the first rank decides between the two. An empty span that is not computed means the whole model, of which
    the velocity is forecast. `modules` (layer, module) are forecast one by one. With guidance, `skips_negative` leaves
    the negative's pass out. `active` is the share of a chunk's own tokens that go through the layers (`regions.py`).
    """

    treatment: Treatment = "computed"
    span: range = range(0)
    modules: frozenset[tuple[int, Module]] = frozenset()
    skips_negative: bool = False
    active: float = 1.0


@dataclass(frozen=True)
class GateRules:
    """How the first rank decides: by how far the hidden states behind the first `layers` are from what was forecast.

    They are forecast to `order`; `of_residual` looks at what the layers added instead of at their sum. The error is
    mean |forecast - found| over mean |found|, or over mean |forecast| if `of_forecast`. A span is computed at
    `threshold` or above, and after `max_skips` steps that were not.
    """

    layers: int
    threshold: float
    order: int
    of_residual: bool = False
    of_forecast: bool = False
    max_skips: int = 1000
    max_tokens: int = 4096
    """Of more tokens than that, so many are looked at, evenly spaced."""

    def is_computed(self, difference: float, found: float, forecast: float, skipped: int) -> bool:
        """The decision, by sums of absolute values and the number of steps skipped in a row."""
        scale = forecast if self.of_forecast else found
        return skipped >= self.max_skips or not difference < self.threshold * scale


@dataclass(frozen=True)
class RegionRules:
    """Which tokens go through the layers: those of which the prediction deviates least (`focus` low), or most (high).

    What was left out comes in again: a score is multiplied by e^(starvation · steps left out in a row).
    """

    focus: Literal["low", "high"]
    starvation: float


@dataclass(frozen=True)
class CachePlan:
    """A policy for a number of steps and layers. `order` is that of the series; `steps` are all of a chunk's own.

    `kept_modules` are those that are forecast at some step, so that what they give is remembered.
    """

    steps: tuple[StepPlan, ...]
    order: int = 0
    gate: GateRules | None = None
    regions: RegionRules | None = None
    kept_modules: frozenset[tuple[int, Module]] = field(init=False)

    def __post_init__(self) -> None:
        kept: frozenset[tuple[int, Module]] = frozenset()
        object.__setattr__(self, "kept_modules", kept.union(*(step.modules for step in self.steps)))

    @property
    def is_inside(self) -> bool:
        """Whether stages take part: something is left out inside forward passes, or a gate decides."""
        return (
            self.gate is not None
            or self.regions is not None
            or any(step.span or step.modules or step.skips_negative for step in self.steps)
        )

    @property
    def skips_negatives(self) -> bool:
        """Whether some step leaves the negative's pass out."""
        return any(step.skips_negative for step in self.steps)

    @property
    def forecasts_velocities(self) -> bool:
        """Whether some step's velocity may be forecast."""
        return any(step.treatment != "computed" and not step.span for step in self.steps)

    def values(self, num_tokens: int, layers: range) -> int:
        """How many tokens' activations a stage of these layers remembers at once of a unit's branch, at the most.

        What a span adds lies where its last layer is.
        """
        spans = any(step.span.stop - 1 in layers for step in self.steps if step.span)
        modules = sum(layer in layers for layer, _ in self.kept_modules)
        remembered = (self.order + 1) * num_tokens * (spans + modules)
        if self.regions:  # K/V; latents and velocities count as a layer's
            remembered += 2 * num_tokens * (len(layers) + 1)
        if self.gate and self.gate.layers - 1 in layers:  # of the prompt's branch alone, but gates are small
            stride = -(-num_tokens // self.gate.max_tokens)
            remembered += (self.gate.order + 1) * -(-num_tokens // stride)
        return remembered

    def share(self, layer: int, step: int) -> float:
        """How much of a layer is computed at a step, 0 to 1; what a gate may leave out counts as computed."""
        plan = self.steps[step]
        if plan.treatment == "forecast" and (not plan.span or layer in plan.span):
            return 0.0
        return plan.active * (1 - sum((layer, module) in plan.modules for module in MODULES) / len(MODULES))
