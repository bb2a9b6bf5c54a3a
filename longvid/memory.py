"""What ranks hold, by kind, before anything is loaded. In 10^6 bytes.

Always: weights, neighbours' K/V, latents, and what a cache remembers. With a model's `Sizes` also what computing takes:
activations and messages, on the leader the VAE with its state, and the text encoder; and what `memory.*` changes of all
that. What libraries take comes on top.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import accumulate, groupby, islice

from longvid.cache.settings import plan_cache
from longvid.models.parts import ModelPart
from longvid.models.sizes import CELLS_AT_ONCE, MOST_PACKED_BYTES, Sizes, layer_bytes, packed_itemsize
from longvid.parallel.decoding import Decoding
from longvid.parallel.findings import Report
from longvid.parallel.pace import kind_of
from longvid.parallel.rules import rules_of
from longvid.parallel.topology import Topology
from longvid.plan import Chunk, ModelFacts, Plan, sharing_layers
from longvid.settings import MemorySettings, Settings

MB = 1e6
BEGINNING = 64
"""Chunks of a film in which every piece of decoding that is dealt out has come about."""


@dataclass(frozen=True)
class StageMemory:
    """One rank of a stage: of the first, the leader.

    `activations_mb` are a unit's, with messages; where it decodes and that is more, those of the decoder, for it is at
    work between units. `vae_mb` is what stays of the VAE. A text encoder that goes before the film begins counts in
    `text_mb` as far as it holds more than all that comes after it.
    """

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


@dataclass(frozen=True)
class Dealt:
    """How work is dealt out over a mesh: each stage's layers, and decoding (None: the leader does it alone)."""

    topology: Topology
    layers: Sequence[range]
    decoding: Decoding | None = None

    def most_decoded(self, stage: int, plan: Plan) -> int:
        """The most latents that a stage decodes in a row; 0: it decodes none. Of a long film the beginning tells."""
        decoding = self.decoding
        if decoding is None:
            return 0 if stage else max(chunk.num_latents for chunk in plan.chunks)
        chunks = ((film, chunk) for film, span in enumerate(plan.films) for chunk in range(len(span.chunks)))
        pieces = (piece for of_film in islice(chunks, BEGINNING) for piece in decoding.pieces(*of_film))
        return max((len(latents) for latents, at in pieces if at == stage), default=0)


def stage_memory(
    plan: Plan,
    settings: Settings,
    facts: ModelFacts,
    report: Report,
    dealt: Dealt,
    weights: Callable[[ModelPart, int], int],
    sizes: Sizes | None = None,
    *,
    has_matrix_units: bool = False,
) -> tuple[StageMemory, ...]:
    """Each stage's; `report` is that of the schedule's simulation.

    `weights` says how many bytes of a part a rank holds, with so many bytes a number. The leader has the VAE, and each
    stage that decodes has it and, at times, the decoder's state. A CPU that `has_matrix_units` holds weights packed
    beside them.
    """
    topology, bounds = dealt.topology, dealt.layers
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

    scenes = 2 * report.max_live_scenes * settings.queue.context_latents * per_latent * token
    late = sharing_layers(facts.num_layers)

    def of_stage(stage: int, layers: range) -> StageMemory:
        part = ModelPart(layers, stage == 0, stage == len(bounds) - 1)
        of_count = {count: cache.values(count, layers) for count in set(tokens)}
        values = [of_count[count] for count in tokens]
        until = [0, *accumulate(values)]
        remembered = max(until[min(i + in_flight, len(values))] - until[i] for i in range(len(values)))
        held = StageMemory(
            weights(part, itemsize) / MB,
            (kv * len(layers) + scenes * len(range(max(late.start, layers.start), layers.stop))) / MB,
            latents / MB if stage == 0 else 0.0,
            remembered * token / MB,
        )
        if not sizes:
            return held
        if has_matrix_units:
            packed = packed_linear_bytes(sizes, part, itemsize, settings)
            held = replace(held, weights_mb=held.weights_mb + packed / MB)
        at_work, waiting = activation_bytes(kinds, plan, settings, facts, sizes, topology, stage)
        most, in_units = dealt.most_decoded(stage, plan), has_matrix_units and sizes.vae.has_own_kernels
        if stage and not most:
            return replace(held, activations_mb=(at_work + waiting) / MB)
        vae, decoding = float(itemsize * sizes.vae.params), 0.0
        if most:
            at_once = max(1, min(most, CELLS_AT_ONCE // (width * height))) if in_units else 0
            vae += itemsize * sizes.vae.state_values(width * height)
            decoding = itemsize * sizes.vae.working_values(width * height, height, settings.memory.vae_rows, at_once)
        # A leader that decodes nothing has measured the decoder, where there are other stages.
        if in_units and (most or topology.stage > 1):
            vae += packed_itemsize(itemsize) * sizes.vae.decoder.packed_params
        held = replace(held, activations_mb=(max(at_work, decoding) + waiting) / MB, vae_mb=vae / MB)
        return held if stage else _with_text(held, sizes, itemsize, settings.memory)

    return tuple(of_stage(stage, layers) for stage, layers in enumerate(bounds))


def device_bytes(sizes: Sizes, part: ModelPart, itemsize: int, memory: MemorySettings) -> int:
    """Of a part's weights, those that are on the device at once: with `memory.offload`, two groups of each kind."""
    whole = sizes.part_bytes(part, itemsize)
    if memory.offload == "none":
        return whole
    away = 0
    for _, layers in groupby((sizes.layers[index] for index in part.layers), key=lambda layer: layer.params):
        each = [layer_bytes(layer, itemsize) for layer in layers]
        away += sum(sorted(each)[: max(0, len(each) - 2 * memory.group)])
    return whole - sizes.num_experts * away


def packed_linear_bytes(sizes: Sizes, part: ModelPart, itemsize: int, settings: Settings) -> int:
    """What a CPU with matrix units keeps beside a part's linear weights; see `longvid.models.linear`."""
    memory = settings.memory
    if settings.runtime.linear == "torch" or memory.offload != "none" or memory.quantize != "none":
        return 0
    packed = packed_itemsize(itemsize) * sum(sizes.layers[index].projection_params for index in part.layers)
    return packed if packed <= MOST_PACKED_BYTES else 0


def _with_text(held: StageMemory, sizes: Sizes, itemsize: int, memory: MemorySettings) -> StageMemory:
    """The leader's, with the text encoder, which is loaded whole."""
    text = itemsize * sizes.text_params
    if memory.frees_encoder(text):
        loaded_before = held.weights_mb + itemsize * sizes.vae.params / MB
        return replace(held, text_mb=max(0.0, loaded_before + text / MB - held.total_mb))
    return replace(held, text_mb=text / MB)


def activation_bytes(
    chunks: Sequence[Chunk],
    plan: Plan,
    settings: Settings,
    facts: ModelFacts,
    sizes: Sizes,
    topology: Topology,
    stage: int,
) -> tuple[float, float]:
    """The most bytes of a unit at work of any of `chunks` on a rank, and of what waits or is on its way.

    Counted a token and channel, in the layers as diffusers has them: what is alive in attention (while keys are
    rotated, in fp32), in the feed-forward, and where its output is added in fp32.
    """
    itemsize = 4 if settings.runtime.dtype == "float32" else 2
    per_latent = facts.grid.tokens_per_latent(plan.width, plan.height)
    recomputes = settings.queue.left == "recompute"
    branches = settings.sampler.num_branches // topology.guidance
    layer = max(sizes.layers, key=lambda layer: layer.inner / layer.width)
    upcast = 4 if itemsize == 2 else 0

    def of_unit(num_own: int, num_seen: int, is_joined: bool) -> tuple[float, float]:
        own, seen = per_latent * num_own / topology.seq, per_latent * num_seen / topology.seq
        attention = (6 * own + (2 * is_joined) * seen) * itemsize + 8 * seen
        feed_forward = (2 + 2 * layer.inner / layer.width) * own * itemsize
        added = 3 * own * itemsize + (8 + 2 * upcast) * own
        waiting = (branches if stage else 1) + branches - 1
        moving = 2 * settings.mesh.buffers * branches if topology.stage > 1 else 0
        levels = (24 + 6 * itemsize) * own if facts.per_token_timesteps and recomputes else 0.0
        busiest = max(attention, feed_forward, added)
        return (busiest + levels) * layer.width, (waiting + moving) * own * itemsize * layer.width

    return max(
        of_unit(
            chunk.num_latents + chunk.num_left * recomputes,
            chunk.num_left + chunk.num_latents + chunk.num_right,
            bool(chunk.num_right or (chunk.num_left and not recomputes)),
        )
        for chunk in chunks
    )
