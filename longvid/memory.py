"""What ranks hold, by kind, before anything is loaded. In 10^6 bytes.

Always: weights, neighbours' K/V, latents, and what a cache remembers. With a model's `Sizes` also what computing takes:
activations and messages, on ranks that decode the VAE with its state, and on the leader the text encoder. What
libraries take comes on top.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from itertools import accumulate

from longvid.cache.settings import plan_cache
from longvid.models.parts import ModelPart
from longvid.models.sizes import Sizes
from longvid.parallel.pace import kind_of
from longvid.parallel.schedule import rules_of
from longvid.parallel.topology import Topology
from longvid.parallel.verify import Report
from longvid.plan import Chunk, ModelFacts, Plan, sharing_layers
from longvid.settings import Settings

MB = 1e6
VAE_COPIES = 2
"""Of the widest layer of a VAE, values at once: a copy with its past and padding, or the upsampling's."""


@dataclass(frozen=True)
class StageMemory:
    """One rank of a stage: of the first, the leader."""

    weights_mb: float
    kv_mb: float
    latents_mb: float
    cache_mb: float
    activations_mb: float = 0.0
    vae_mb: float = 0.0
    text_mb: float = 0.0

    @property
    def total_mb(self) -> float:
        return float(sum(astuple(self)))


def stage_memory(
    plan: Plan,
    settings: Settings,
    facts: ModelFacts,
    report: Report,
    topology: Topology,
    bounds: Sequence[range],
    weights: Callable[[ModelPart, int], int],
    sizes: Sizes | None = None,
    decodes: Sequence[float] = (),
) -> tuple[StageMemory, ...]:
    """Each stage's, with the layers of `bounds`; `report` is that of the schedule's simulation.

    `decodes` are the stages' parts of decoding: each with one has the VAE and, at times, the decoder's state.
    """
    itemsize = 4 if settings.runtime.dtype == "float32" else 2
    per_latent = facts.grid.tokens_per_latent(plan.width, plan.height)
    cache = plan_cache(settings.cache, settings.sampler.steps, facts.num_layers)
    branches = settings.sampler.num_branches / topology.guidance
    token = facts.hidden_size * itemsize * branches / topology.seq

    # Places of the `chunk` axis share what is in flight.
    in_flight = -(-rules_of(settings).in_flight(settings.sampler.steps) // topology.chunk)
    edges = 1 + (settings.queue.left == "cached")
    kept = min(in_flight, len(plan.chunks)) * edges if cache.is_inside and settings.schedule != "chunks" else 0
    context = max(max(chunk.num_left, chunk.num_right) for chunk in plan.chunks)
    kv = 2 * max(report.max_live_kv, kept) * context * per_latent * token

    width, height = facts.grid.latent_size(plan.width, plan.height)
    largest = max(chunk.num_latents for chunk in plan.chunks)
    latents = -(-report.max_live_latents // topology.chunk) * largest * facts.latent_channels * width * height * 4

    recomputed = settings.recomputes_left
    tokens = [per_latent * (chunk.num_latents + chunk.num_left * recomputed) for chunk in plan.chunks]
    kinds = tuple({kind_of(chunk): chunk for chunk in plan.chunks}.values())
    vae = _vae_mb(sizes, width * height, itemsize) if sizes else 0.0
    text = itemsize * sizes.text_params / MB if sizes else 0.0

    scenes = 2 * report.max_live_scenes * settings.queue.context_latents * per_latent * token
    late = sharing_layers(facts.num_layers)

    def of_stage(stage: int, layers: range) -> StageMemory:
        part = ModelPart(layers, stage == 0, stage == len(bounds) - 1)
        of_count = {count: cache.values(count, layers) for count in set(tokens)}
        values = [of_count[count] for count in tokens]
        until = [0, *accumulate(values)]
        remembered = max(until[min(i + in_flight, len(values))] - until[i] for i in range(len(values)))
        return StageMemory(
            weights(part, itemsize) / MB,
            (kv * len(layers) + scenes * len(range(max(late.start, layers.start), layers.stop))) / MB,
            latents / MB if stage == 0 else 0.0,
            remembered * token / MB,
            activation_bytes(kinds, plan, settings, facts, sizes, topology, stage) / MB if sizes else 0.0,
            vae if stage == 0 or (decodes and decodes[stage]) else 0.0,
            text if stage == 0 else 0.0,
        )

    return tuple(of_stage(stage, layers) for stage, layers in enumerate(bounds))


def _vae_mb(sizes: Sizes, cells: int, itemsize: int) -> float:
    """The VAE's, 10^6 bytes. Encoder and decoder are loaded whole."""
    vae = sizes.vae
    values = vae.params + vae.state_values(cells) + VAE_COPIES * vae.working_values(cells)
    return itemsize * values / MB


def activation_bytes(
    chunks: Sequence[Chunk],
    plan: Plan,
    settings: Settings,
    facts: ModelFacts,
    sizes: Sizes,
    topology: Topology,
    stage: int,
) -> float:
    """The most bytes of a unit at hand of any of `chunks` on a rank, and of its messages from stage to stage.

    Counted a token and channel, in the layers as diffusers has them: what is alive in attention (while keys are
    rotated, in fp32), in the feed-forward, and where its output is added in fp32.
    """
    itemsize = 4 if settings.runtime.dtype == "float32" else 2
    per_latent = facts.grid.tokens_per_latent(plan.width, plan.height)
    recomputes = settings.queue.left == "recompute"
    branches = settings.sampler.num_branches // topology.guidance
    layer = max(sizes.layers, key=lambda layer: layer.inner / layer.width)
    upcast = 4 if itemsize == 2 else 0

    def of_unit(num_own: int, num_seen: int, is_joined: bool) -> float:
        own, seen = per_latent * num_own / topology.seq, per_latent * num_seen / topology.seq
        attention = (6 * own + (2 * is_joined) * seen) * itemsize + 8 * seen
        feed_forward = (2 + 2 * layer.inner / layer.width) * own * itemsize
        added = 3 * own * itemsize + (8 + 2 * upcast) * own
        waiting = (branches if stage else 1) + branches - 1
        moving = 2 * settings.mesh.buffers * branches if topology.stage > 1 else 0
        levels = (24 + 6 * itemsize) * own if facts.per_token_timesteps and recomputes else 0.0
        busiest = max(attention, feed_forward, added)
        return (busiest + (waiting + moving) * own * itemsize + levels) * layer.width

    return max(
        of_unit(
            chunk.num_latents + chunk.num_left * recomputes,
            chunk.num_left + chunk.num_latents + chunk.num_right,
            bool(chunk.num_right or (chunk.num_left and not recomputes)),
        )
        for chunk in chunks
    )
