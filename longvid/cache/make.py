"""A cache at work, from its plan."""

from __future__ import annotations

from longvid.cache.plan import CachePlan
from longvid.cache.runtime import CacheRuntime
from longvid.cache.solver import CachingSampler
from longvid.errors import InputError
from longvid.sampler import Sampler


def make_cache(plan: CachePlan, layers: range, guidance_ranks: int) -> CacheRuntime | None:
    """The cache at work in a stage of these layers; None where stages compute all that they are given.

    Raises InputError for a first stage that does not have all layers that the gate looks at, and for a rank that would
    wait for the negative's turn.
    """
    if plan.skips_negatives and guidance_ranks > 1:
        raise InputError("cache.negative_every: leaves the ranks of mesh.guidance 2 idle; use mesh.guidance=1")
    if plan.gate and layers.start == 0 and plan.gate.layers > layers.stop:
        raise InputError(
            f"cache: the gate looks at {plan.gate.layers} layers, but of mesh.stage the first has {layers.stop}; "
            "use fewer stages, or a gate of fewer layers"
        )
    return CacheRuntime(plan) if plan.is_inside else None


def make_caching(sampler: Sampler, plan: CachePlan) -> Sampler:
    """The sampler, with solvers that forecast velocities where the plan needs that."""
    return CachingSampler(sampler, plan.order) if plan.forecasts_velocities or plan.skips_negatives else sampler
