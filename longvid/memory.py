"""What ranks hold, by kind, before anything is loaded: weights, neighbours' K/V, latents, and what a cache remembers.

Activations of the unit at hand, text encoder, VAE and what libraries take come on top. In 10^6 bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from longvid.cache.settings import plan_cache
from longvid.models.parts import ModelPart
from longvid.parallel.schedule import QueueRules
from longvid.parallel.topology import Topology
from longvid.parallel.verify import Report
from longvid.plan import ModelFacts, Plan, sharing_layers
from longvid.settings import Settings

MB = 1e6


@dataclass(frozen=True)
class StageMemory:
    """One rank of a stage."""

    weights_mb: float
    kv_mb: float
    latents_mb: float
    cache_mb: float


def stage_memory(
    plan: Plan,
    settings: Settings,
    facts: ModelFacts,
    report: Report,
    topology: Topology,
    bounds: Sequence[range],
    weights: Callable[[ModelPart, int], int],
) -> tuple[StageMemory, ...]:
    """Each stage's, with the layers of `bounds`; `report` is that of the schedule's simulation."""
    itemsize = 4 if settings.runtime.dtype == "float32" else 2
    per_latent = facts.grid.tokens_per_latent(plan.width, plan.height)
    cache = plan_cache(settings.cache, settings.sampler.steps, facts.num_layers)
    branches = settings.sampler.num_branches / topology.guidance
    token = facts.hidden_size * itemsize * branches / topology.seq

    in_flight = -(-settings.sampler.steps // QueueRules.of(settings).gap)
    edges = 1 + (settings.queue.left == "cached")
    kept = min(in_flight, len(plan.chunks)) * edges if cache.is_inside else 0
    context = max(max(chunk.num_left, chunk.num_right) for chunk in plan.chunks)
    kv = 2 * max(report.max_live_kv, kept) * context * per_latent * token

    width, height = facts.grid.latent_size(plan.width, plan.height)
    largest = max(chunk.num_latents for chunk in plan.chunks)
    latents = report.max_live_latents * largest * facts.latent_channels * width * height * 4

    recomputed = settings.queue.left == "recompute"
    tokens = [per_latent * (chunk.num_latents + chunk.num_left * recomputed) for chunk in plan.chunks]

    scenes = 2 * report.max_live_scenes * settings.queue.context_latents * per_latent * token
    late = sharing_layers(facts.num_layers)

    def of_stage(stage: int, layers: range) -> StageMemory:
        part = ModelPart(layers, stage == 0, stage == len(bounds) - 1)
        values = [cache.values(count, layers) for count in tokens]
        remembered = max(sum(values[i : i + in_flight]) for i in range(len(values)))
        return StageMemory(
            weights(part, itemsize) / MB,
            (kv * len(layers) + scenes * len(range(max(late.start, layers.start), layers.stop))) / MB,
            latents / MB if stage == 0 else 0.0,
            remembered * token / MB,
        )

    return tuple(of_stage(stage, layers) for stage, layers in enumerate(bounds))
