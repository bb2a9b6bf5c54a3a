"""Meshes for a film: what each takes and holds on a machine, and the one that a render takes. Pure.

`longvid plan` and a render decide by the same rule here (`best_of`). A mesh's time is the pace of its schedule
(`parallel/pace.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from math import inf

from longvid.cache.settings import plan_cache
from longvid.chips import Chip
from longvid.errors import InputError
from longvid.machines import ChipMachine, Machine, unit_tokens
from longvid.memory import Dealt, StageMemory, device_bytes, stage_memory
from longvid.models.parts import ModelPart
from longvid.models.sizes import Flops, Layer, Sizes, Tokens, layer_bytes
from longvid.parallel.decoding import Decoding, Shares, deal_work
from longvid.parallel.findings import Report
from longvid.parallel.pace import MARGIN, Kind, Pace, Times, kind_of, pace_of
from longvid.parallel.partition import Costs
from longvid.parallel.rules import QueueRules
from longvid.parallel.schedule import make_schedule
from longvid.parallel.topology import (
    LONG_FILM,
    Topology,
    all_meshes,
    choose_by_shape,
    fitting_meshes,
    workload,
)
from longvid.parallel.verify import simulate
from longvid.plan import Chunk, ModelFacts, Plan, make_plan
from longvid.script import parse_script
from longvid.settings import Settings

CLOSE = 1.02
"""Meshes that take so many times as long as the fastest are as good: predictions are not finer than that."""
MUCH = 1.25
"""Spreading tokens over ranks, which changes rounding, must be so many times as fast as what does not."""


@dataclass(frozen=True)
class Film:
    """What is to be rendered, and by what."""

    plan: Plan
    settings: Settings
    facts: ModelFacts
    sizes: Sizes

    @property
    def itemsize(self) -> int:
        return 4 if self.settings.runtime.dtype == "float32" else 2

    @cached_property
    def rules(self) -> QueueRules:
        return QueueRules.of(self.settings)

    @property
    def steps(self) -> int:
        return self.settings.sampler.steps

    @property
    def cells(self) -> int:
        width, height = self.facts.grid.latent_size(self.plan.width, self.plan.height)
        return width * height

    def tokens(self, chunk: Chunk, step: int) -> Tokens:
        """Those of a unit: at its first steps there is no right neighbour yet."""
        per_latent = self.facts.grid.tokens_per_latent(self.plan.width, self.plan.height)
        left, is_cached = chunk.num_left, self.rules.left == "cached"
        own = chunk.num_latents + (0 if is_cached else left)
        right = chunk.num_right if step >= self.rules.gap else 0
        seen = own + right + (left if is_cached else 0)
        return Tokens(own * per_latent, seen * per_latent, self.sizes.text_columns)

    @cached_property
    def report(self) -> Report:
        """Of the schedule's beginning, for it repeats itself."""
        count = min(len(self.plan.chunks), -(-self.steps // self.rules.gap) + MARGIN)
        chunks = list(self.plan.chunks[:count])
        chunks[-1] = replace(chunks[-1], num_right=0)
        beginning = replace(self.plan, chunks=tuple(chunks))
        return simulate(make_schedule(beginning, self.settings), chunks, self.steps, self.rules)

    @cached_property
    def kinds(self) -> tuple[tuple[Chunk, int], ...]:
        """A chunk of every kind, and how many there are."""
        chunks = {kind_of(chunk): chunk for chunk in self.plan.chunks}
        return tuple((chunks[kind], count) for kind, count in Counter(map(kind_of, self.plan.chunks)).items())

    @cached_property
    def flops(self) -> Flops:
        """All that the film's units take, of all branches; without decoding."""
        plan = plan_cache(self.settings.cache, self.steps, self.facts.num_layers)
        passes: Counter[Tokens] = Counter()
        for chunk, count in self.kinds:
            for step in set(range(self.steps)) - self.rules.forecast:
                branches = 1 if plan.steps[step].skips_negative else self.settings.sampler.num_branches
                passes[self.tokens(chunk, step)] += branches * count
        return sum((self.sizes.pass_flops(tokens) * count for tokens, count in passes.items()), Flops())

    @cached_property
    def decode_flops(self) -> float:
        counts, decoder = Counter(self.decodings), self.sizes.vae.decoder
        return sum(n * decoder.flops(self.cells, work, starts) for (work, starts), n in counts.items())

    def works(self, chunk: Chunk) -> tuple[int, ...]:
        """What each of a chunk's latents makes the decoder do."""
        return self.plan.works(chunk, self.facts.decoder_passes)

    @cached_property
    def decodings(self) -> tuple[tuple[int, bool], ...]:
        """Of each chunk: latents that go through the decoder for it, and whether the first is a shot's, of one frame.

        Of tiles every one begins with such a latent.
        """
        has_tiles = self.facts.decoder_passes.repeated > 1
        return tuple((sum(self.works(chunk)), chunk.start == 0 and not has_tiles) for chunk in self.plan.chunks)

    def decoding(self, shares: Shares | None) -> Decoding | None:
        """How decoding is dealt out, as a render does it."""
        passes = self.facts.decoder_passes
        return Decoding.of(shares, self.plan, self.rules, self.steps, passes) if shares else None


@dataclass(frozen=True)
class Option:
    """A mesh: why it is ruled out, or what it would take and hold."""

    topology: Topology
    reason: str | None = None
    bounds: tuple[range, ...] = ()
    shares: Shares | None = None
    """How decoding is dealt out, where stages do it."""
    memory: tuple[StageMemory, ...] = ()
    pace: Pace | None = None

    @property
    def worst_mb(self) -> float:
        """Of the rank that holds most."""
        return max((stage.total_mb for stage in self.memory), default=0.0)

    @property
    def seconds(self) -> float:
        return self.pace.makespan if self.pace else float("inf")


def times_of(
    film: Film, machine: Machine, topology: Topology, bounds: Sequence[range], shares: Shares | None = None
) -> Times:
    """What units take on the stages of a mesh."""
    share = plan_cache(film.settings.cache, film.steps, film.facts.num_layers)
    branches = film.settings.sampler.num_branches // topology.guidance
    starts, ends = [span.start for span in bounds], [span.stop for span in bounds]
    layers = set(film.sizes.layers)

    is_fetched = [_is_fetched(film, span) for span in bounds]
    overhead = machine.overhead(topology)

    @cache
    def of_layers(tokens: Tokens) -> tuple[dict[Layer, float], dict[Layer, float]]:
        """Each kind of layer where it is, and where it is brought to the device meanwhile."""
        here = {layer: machine.layer(layer, tokens, topology) for layer in layers}
        return here, {layer: max(here[layer], _fetch(film, machine, topology, layer)) for layer in layers}

    @cache
    def stages(tokens: Tokens, step: int, num_branches: int) -> tuple[float, ...]:
        end = machine.ends(tokens, topology)
        found = []
        for start, stop, brought in zip(starts, ends, is_fetched, strict=True):
            seconds = of_layers(tokens)[brought]
            found.append(sum(seconds[film.sizes.layers[i]] * share.share(i, step) for i in range(start, stop)))
        found[0] += end
        found[-1] += end
        return tuple(num_branches * value + overhead for value in found)

    kinds = [kind_of(chunk) for chunk in film.plan.chunks]
    examples = dict(zip(kinds, film.plan.chunks, strict=True))

    @cache
    def of_kind(kind: Kind, step: int) -> tuple[float, ...]:
        count = 1 if share.steps[step].skips_negative else branches
        return stages(film.tokens(examples[kind], step), step, count)

    @cache
    def decoding(work: int, starts: bool) -> float:
        return machine.decode(film.cells, work, starts)

    @cache
    def hopping(kind: Kind) -> float:
        own = film.tokens(examples[kind], film.steps - 1).own
        values = own / topology.seq * film.facts.hidden_size * branches
        return machine.hop(values * film.itemsize, topology) if topology.stage > 1 else 0.0

    state = film.sizes.vae.state_values(film.cells) * film.itemsize
    return Times(
        unit=lambda chunk, step: of_kind(kinds[chunk], step),
        decode=lambda chunk: decoding(*film.decodings[chunk]),
        hop=lambda chunk: hopping(kinds[chunk]),
        capacity=2 * film.settings.mesh.buffers,
        shares=shares,
        state=machine.hop(state, topology) if shares else 0.0,
        pack=machine.pack(state) if shares else 0.0,
        works=film.works,
    )


def _is_fetched(film: Film, layers: range) -> bool:
    """Whether a stage's layers come and go: with one group of them, they stay."""
    return film.settings.memory.offload != "none" and len(layers) > film.settings.memory.group


def _fetch(film: Film, machine: Machine, topology: Topology, layer: Layer) -> float:
    memory = film.settings.memory
    return 0.0 if memory.offload == "none" else machine.fetch(layer_bytes(layer, film.itemsize), memory, topology)


def split(film: Film, machine: Machine, topology: Topology) -> tuple[tuple[range, ...], Shares | None]:
    """The stages' layers and decoding as a render deals them out: by what they cost at the model's own size."""
    facts, queue, sizes = film.facts, film.settings.queue, film.sizes
    tokens = unit_tokens(film.settings, facts, sizes, (facts.width, facts.height))
    branches = film.settings.sampler.num_branches // topology.guidance
    kinds = {layer: branches * machine.layer(layer, tokens, topology) for layer in set(sizes.layers)}
    end = branches * machine.ends(tokens, topology)
    width, height = facts.grid.latent_size(facts.width, facts.height)
    decode = machine.decode(width * height, queue.chunk_latents * facts.decoder_passes.repeated, False) / film.steps
    costs = Costs(tuple(kinds[layer] for layer in sizes.layers), end, end, decode)
    return deal_work(costs, topology.stage, film.settings.mesh.decode)


def options(film: Film, machine: Machine, num_ranks: int, *, with_pace: bool = True) -> list[Option]:
    """Every mesh with its best ring alone: first the best, then the others, the fastest first.

    Raises InputError for a schedule whose pace is not known.
    """
    if film.settings.schedule == "chunks":
        raise InputError("schedule=chunks: only films in the queue, and whole shots, are planned for other machines")
    found: dict[tuple[int, ...], Option] = {}
    chunk = film.plan.chunks[min(1, len(film.plan.chunks) - 1)]
    tokens = film.tokens(chunk, film.steps - 1)

    def exchange(option: Option) -> tuple[bool, float]:
        layer = film.sizes.layers[0]
        return bool(option.reason), machine.layer(layer, tokens, option.topology) if not option.reason else 0.0

    for topology, reason in all_meshes(num_ranks, film.settings.mesh, workload(film.settings, film.facts)):
        option = Option(topology, reason)
        known = found.get(topology.sizes)
        if known is None or exchange(option) < exchange(known):
            found[topology.sizes] = option
    complete = [weigh(film, machine, option, with_pace=with_pace) for option in found.values()]
    best = best_of(complete)
    return [best, *sorted((option for option in complete if option is not best), key=order)]


def order(option: Option) -> tuple[bool, float, float]:
    """The faster of those that fit is less; of those that do not, that which holds less; last, what cannot be."""
    return bool(option.reason), option.seconds, option.worst_mb or inf


def best_of(complete: Sequence[Option]) -> Option:
    """Of the meshes that fit and are as good as the fastest, that which holds least."""
    fastest = min(complete, key=order)
    if fastest.reason:
        return fastest
    close = [option for option in complete if not option.reason and option.seconds <= CLOSE * fastest.seconds]
    return min(close, key=lambda option: (option.worst_mb, option.seconds))


def weigh(film: Film, machine: Machine, option: Option, *, with_pace: bool = True) -> Option:
    """A mesh with what it takes and holds, or with what rules it out."""
    if option.reason:
        return option
    bounds, shares = split(film, machine, option.topology)
    memory = stage_memory(
        film.plan,
        film.settings,
        film.facts,
        film.report,
        Dealt(option.topology, bounds, film.decoding(shares)),
        partial(_device_bytes, film),
        film.sizes,
        has_matrix_units=machine.has_matrix_units,
    )
    option = replace(option, bounds=bounds, shares=shares, memory=memory)
    if option.worst_mb > machine.memory_gb * 1e3:
        worst = max(range(len(memory)), key=lambda stage: memory[stage].total_mb)
        held = f"stage {worst} would hold {option.worst_mb / 1e3:.1f} GB, of {machine.memory_gb:.1f} GB"
        option = replace(option, reason=held)
    if not with_pace or option.reason:
        return option
    times = times_of(film, machine, option.topology, bounds, shares)
    return replace(option, pace=pace_of(film.plan.chunks, film.steps, film.rules, times))


def _device_bytes(film: Film, part: ModelPart, itemsize: int) -> int:
    return device_bytes(film.sizes, part, itemsize, film.settings.memory)


# ----------------------------------------------------------------------------------------- the mesh that a render takes


def choose_mesh(num_ranks: int, settings: Settings, facts: ModelFacts, sizes: Sizes | None, chip: Chip) -> Topology:
    """The mesh that a render on so many chips takes: what the settings fix, and of what they leave open, the best.

    It is the best for a long film of the model's own size, whatever the storyboard, so that a film can be resumed and
    extended. Of models without `sizes`, and with schedule=chunks, the shape of the mesh decides. Raises InputError
    where nothing fits.
    """
    work = workload(settings, facts)
    meshes = fitting_meshes(num_ranks, settings.mesh, work)
    if len(meshes) == 1 or sizes is None or settings.schedule == "chunks":
        return choose_by_shape(meshes, work)
    film = long_film(settings, facts, sizes)
    machine = ChipMachine(chip, film.sizes, film.itemsize)
    complete = [weigh(film, machine, Option(topology)) for topology in meshes]
    best, together = best_of(complete), [option for option in complete if option.topology.seq == 1]
    if together:
        # While tokens stay together a film has the same bits, and can be resumed, on any number of ranks.
        exact = best_of(together)
        if not exact.reason and exact.seconds <= MUCH * best.seconds:
            return exact.topology
    return best.topology


def long_film(settings: Settings, facts: ModelFacts, sizes: Sizes) -> Film:
    """A film of the model's own size and one shot, whose queue is full for most of its time."""
    queue = settings.queue
    num_latents = LONG_FILM * queue.chunk_latents + queue.context_latents
    if settings.schedule == "sequential":
        num_latents = min(num_latents, facts.max_latents)
    scene = f"{{prompt: a film, for: {facts.grid.num_frames(num_latents)}f}}"
    whatever = replace(facts, image="none", vocabulary=None)
    plan = make_plan(parse_script(f"scenes: [{scene}]", "a long film"), settings, whatever)
    return Film(plan, settings, facts, sizes.held(settings.memory.quantize))
