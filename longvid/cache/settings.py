"""Settings of caches: what is left out of which step, and how it is forecast. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field

from longvid.cache.plan import MODULES, CachePlan, GateRules, RegionRules, StepPlan
from longvid.cache.table import read_table
from longvid.document import Section, with_policy
from longvid.errors import InputError

Order = Annotated[int, Field(ge=0, le=4)]
Steps = Annotated[int, Field(ge=1, le=1000)]
Level = Literal["output", "last_layer", "module"]


class Policy(Section):
    """What every policy answers. The first and the last step are always computed.

    With guidance, the negative's pass is made at every `negative_every`-th step; between them its velocity is the one
    that leads to the clean latents that it last foretold (residual guidance of StreamDiffusion, arXiv 2312.12491).
    """

    negative_every: Annotated[int, Field(ge=1, le=1000)] = 1

    @property
    def splits_tokens(self) -> bool:
        """Whether a unit's tokens may be spread over ranks."""
        return True

    @property
    def is_of_modules(self) -> bool:
        """Whether single modules of layers are left out."""
        return False

    def forecast_steps(self, num_steps: int) -> frozenset[int]:
        """The steps at which no layer runs anywhere."""
        return frozenset()

    def gated_steps(self, num_steps: int) -> frozenset[int]:
        """The steps at which the first rank decides."""
        return frozenset()

    def plan(self, num_steps: int, num_layers: int) -> CachePlan:
        """All of it, for a model. Raises ValueError where they do not go together, InputError for a bad table."""
        forecast = self.forecast_steps(num_steps)
        return CachePlan(tuple(StepPlan("forecast" if k in forecast else "computed") for k in range(num_steps)))


class NoCache(Policy):
    """Every step is computed."""

    policy: Literal["none"] = "none"


class TaylorSeer(Policy):
    """TaylorSeer (arXiv 2503.06923): every `interval`-th step is computed, the others are a Taylor series over those.

    The series is of the velocity (`output`), of what all layers add to the latents' embedding (`last_layer`), or of
    what every module of every layer gives (`module`: the paper's, at the price of memory). The first `first_steps` and
    the last step are always computed.
    """

    policy: Literal["taylorseer"]
    interval: Annotated[int, Field(ge=1, le=100)] = 5
    order: Order = 1
    first_steps: Steps = 3
    level: Level = "output"

    @property
    def is_of_modules(self) -> bool:
        return self.level == "module"

    def left_out(self, num_steps: int) -> frozenset[int]:
        """The steps that are not computed."""
        between = range(self.first_steps, num_steps - 1)
        return frozenset(k for k in between if (k - self.first_steps + 1) % self.interval)

    def forecast_steps(self, num_steps: int) -> frozenset[int]:
        return self.left_out(num_steps) if self.level == "output" else frozenset()

    def plan(self, num_steps: int, num_layers: int) -> CachePlan:
        left_out = self.left_out(num_steps)
        everything = frozenset((layer, module) for layer in range(num_layers) for module in MODULES)

        def step(k: int) -> StepPlan:
            if self.level == "module":
                return StepPlan(modules=everything if k in left_out else frozenset())
            span = range(num_layers) if self.level == "last_layer" else range(0)
            return StepPlan("forecast" if k in left_out else "computed", span)

        return CachePlan(tuple(map(step, range(num_steps))), self.order)


class ConfidenceGatedTaylor(Policy):
    """CG-Taylor: the velocity is forecast as long as the first layer's output comes as a Taylor series foretells it.

    `gate` is the error from which on a step is computed: 0 computes all.
    """

    policy: Literal["cg_taylor"]
    gate: Annotated[float, Field(ge=0, le=100)] = 0.36
    gate_order: Order = 3
    order: Order = 1
    first_steps: Steps = 3
    max_skips: Steps = 5

    def gated_steps(self, num_steps: int) -> frozenset[int]:
        return frozenset(range(self.first_steps, num_steps - 1))

    def plan(self, num_steps: int, num_layers: int) -> CachePlan:
        gate = GateRules(1, self.gate, self.gate_order, max_skips=self.max_skips)
        return CachePlan(_gated(self.gated_steps(num_steps), num_steps, range(0)), self.order, gate)


class FirstBlock(Policy):
    """First-block caching (DBCache): the first `layers` run; if they add what they added before, the others do not.

    `threshold` is the relative difference from which on a step is computed. What the others add is kept, or by an
    `order` above 0 forecast.
    """

    policy: Literal["first_block"]
    layers: Annotated[int, Field(ge=1, le=1000)] = 1
    threshold: Annotated[float, Field(ge=0, le=100)] = 0.08
    order: Order = 0
    first_steps: Steps = 8
    max_skips: Steps = 1000

    def gated_steps(self, num_steps: int) -> frozenset[int]:
        return frozenset(range(self.first_steps, num_steps - 1))

    def plan(self, num_steps: int, num_layers: int) -> CachePlan:
        if self.layers >= num_layers:
            raise ValueError(f"layers: must be less than the model's {num_layers}, not {self.layers}")
        gate = GateRules(self.layers, self.threshold, 0, of_residual=True, of_forecast=True, max_skips=self.max_skips)
        rest = range(self.layers, num_layers)
        return CachePlan(_gated(self.gated_steps(num_steps), num_steps, rest), self.order, gate)


class DeltaDit(Policy):
    """Delta-DiT (arXiv 2406.01125): a span of layers is left out, and what it added kept: the rear, later the front.

    Of the model's layers `share` are left out, in all but every `interval`-th step. From step `switch` (a share of the
    steps) on they are the front ones. Chunks in flight are at different steps, so front and rear balance the stages.
    """

    policy: Literal["delta_dit"]
    interval: Annotated[int, Field(ge=1, le=100)] = 2
    share: Annotated[float, Field(gt=0, lt=1)] = 0.75
    switch: Annotated[float, Field(ge=0, le=1)] = 0.5
    order: Order = 0
    first_steps: Steps = 1

    def plan(self, num_steps: int, num_layers: int) -> CachePlan:
        count = min(max(1, round(self.share * num_layers)), num_layers - 1)
        if not count:
            raise ValueError("a model of one layer has no front and rear")
        switch = round(self.switch * num_steps)

        def step(k: int) -> StepPlan:
            begin, span = (0, range(num_layers - count, num_layers)) if k < switch else (switch, range(count))
            begin = max(begin, self.first_steps - 1)
            is_computed = k <= begin or k == num_steps - 1 or (k - begin) % self.interval == 0
            return StepPlan("computed" if is_computed else "forecast", span)

        return CachePlan(tuple(map(step, range(num_steps))), self.order)


class StaticTable(Policy):
    """A table: the steps that are computed, one by one, or a file by `longvid train cache` with modules a step.

    What is left out is forecast like TaylorSeer's.
    """

    policy: Literal["static"]
    computed: Annotated[tuple[Annotated[int, Field(ge=0, le=999)], ...], Field(strict=False)] = ()
    table: Annotated[str, Field(min_length=1)] | None = None
    order: Order = 0

    @property
    def is_of_modules(self) -> bool:
        return self.table is not None

    def forecast_steps(self, num_steps: int) -> frozenset[int]:
        return frozenset() if self.table else frozenset(range(1, num_steps - 1)) - frozenset(self.computed)

    def plan(self, num_steps: int, num_layers: int) -> CachePlan:
        if self.table is None:
            return CachePlan(super().plan(num_steps, num_layers).steps, self.order)
        rows = read_table(self.table, num_steps, num_layers)
        return CachePlan(tuple(StepPlan(modules=row) for row in rows), self.order)


class RegionAdaptive(Policy):
    """Region-adaptive sampling (RAS, arXiv 2502.10389): of a chunk's tokens only `ratio` go through the layers a step.

    The others keep their last velocity, and their K/V stand where they were. The first `first_steps`, every
    `reset_every`-th step after them and the last are of all tokens. `focus` and `starvation` say which are chosen.
    """

    policy: Literal["ras"]
    ratio: Annotated[float, Field(gt=0, le=1)] = 0.5
    first_steps: Steps = 4
    reset_every: Steps = 8
    focus: Literal["low", "high"] = "high"
    starvation: Annotated[float, Field(ge=0, le=10)] = 0.1

    @property
    def splits_tokens(self) -> bool:
        return False

    def plan(self, num_steps: int, num_layers: int) -> CachePlan:
        def active(k: int) -> float:
            is_whole = k < self.first_steps or k == num_steps - 1 or (k - self.first_steps + 1) % self.reset_every == 0
            return 1.0 if is_whole else self.ratio

        steps = tuple(StepPlan(active=active(k)) for k in range(num_steps))
        return CachePlan(steps, regions=RegionRules(self.focus, self.starvation))


def plan_cache(settings: Policy, num_steps: int, num_layers: int) -> CachePlan:
    """What is left out at which step. Raises InputError where model, steps and policy do not go together."""
    try:
        plan = settings.plan(num_steps, num_layers)
    except ValueError as error:
        raise InputError(f"cache: {error}") from None

    def with_negative(k: int, step: StepPlan) -> StepPlan:
        # Where a span is learned, it is learned of both branches.
        learns = step.treatment == "computed" and bool(step.span)
        return replace(step, skips_negative=k % settings.negative_every != 0 and not learns)

    return replace(plan, steps=tuple(with_negative(k, step) for k, step in enumerate(plan.steps)))


def _gated(steps: Iterable[int], num_steps: int, span: range) -> tuple[StepPlan, ...]:
    return tuple(StepPlan("gated" if k in steps else "computed", span) for k in range(num_steps))


POLICIES = ("none", "taylorseer", "cg_taylor", "first_block", "delta_dit", "static", "ras")


def _with_policy(data: Any) -> Any:
    return with_policy(data, "none", POLICIES)


CacheSettings = Annotated[
    NoCache | TaylorSeer | ConfidenceGatedTaylor | FirstBlock | DeltaDit | StaticTable | RegionAdaptive,
    Discriminator("policy"),
    BeforeValidator(_with_policy),
]
