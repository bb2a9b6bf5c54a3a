"""A cache at work, from its plan."""

from __future__ import annotations

from longvid.cache.plan import CachePlan
from longvid.cache.runtime import CacheRuntime
from longvid.cache.taylor import TaylorSampler
from longvid.errors import InputError
from longvid.sampler import Sampler


def make_cache(plan: CachePlan, layers: range) -> CacheRuntime | None:
    """The cache at work in a stage of these layers; None where stages compute all that they are given.

    Raises InputError for a first stage that does not have all layers that the gate looks at.
    """
    if plan.gate and layers.start == 0 and plan.gate.layers > layers.stop:
        raise InputError(
            f"cache: the gate looks at {plan.gate.layers} layers, but of mesh.stage the first has {layers.stop}; "
            "use fewer stages, or a gate of fewer layers"
        )
    return CacheRuntime(plan) if plan.is_inside else None


def make_forecasting(sampler: Sampler, plan: CachePlan) -> Sampler:
    """The sampler, with solvers that forecast velocities where the plan needs that."""
    return TaylorSampler(sampler, plan.order) if plan.forecasts_velocities else sampler
