"""The outlook: which mesh of which accelerators suits a film, how long it takes, what ranks hold, what else would do.

From configs, settings and a storyboard alone. A mesh's time is the pace of its schedule (`parallel/pace.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from typing import Any

from longvid.cache.settings import plan_cache
from longvid.chips import CHIPS
from longvid.errors import InputError
from longvid.machines import ChipMachine, Machine
from longvid.memory import StageMemory, stage_memory
from longvid.models.sizes import Flops, Sizes, Tokens
from longvid.parallel.decoding import Shares, deal_work
from longvid.parallel.pace import MARGIN, Kind, Pace, Times, kind_of, pace_of
from longvid.parallel.partition import Costs
from longvid.parallel.schedule import QueueRules, make_schedule
from longvid.parallel.topology import AXES, Topology, all_meshes, workload
from longvid.parallel.verify import Report, simulate
from longvid.plan import Chunk, ModelFacts, Plan
from longvid.settings import Settings

SHOWN = 8
"""Meshes in the table."""
MOST_RANKS = 1024
"""Up to which more ranks are tried."""


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
        vae = self.sizes.vae
        return sum(n * vae.flops(self.cells, chunk.num_latents, chunk.start == 0) for chunk, n in self.kinds)


@dataclass(frozen=True)
class Option:
    """A mesh: why it is ruled out, or what it would take and hold."""

    topology: Topology
    reason: str | None = None
    bounds: tuple[range, ...] = ()
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
    film: Film, machine: Machine, topology: Topology, bounds: Sequence[range], decodes: Sequence[float] = ()
) -> Times:
    """What units take on the stages of a mesh; where these decode, with a step's part of that."""
    share = plan_cache(film.settings.cache, film.steps, film.facts.num_layers)
    branches = film.settings.sampler.num_branches // topology.guidance
    starts, ends = [span.start for span in bounds], [span.stop for span in bounds]
    layers = set(film.sizes.layers)

    @cache
    def of_layers(tokens: Tokens) -> dict[Any, float]:
        return {layer: machine.layer(layer, tokens, topology) for layer in layers}

    @cache
    def stages(tokens: Tokens, step: int, num_branches: int) -> tuple[float, ...]:
        seconds, end = of_layers(tokens), machine.ends(tokens, topology)
        costs = [seconds[layer] * share.share(index, step) for index, layer in enumerate(film.sizes.layers)]
        found = [sum(costs[start:stop]) for start, stop in zip(starts, ends, strict=True)]
        found[0] += end
        found[-1] += end
        return tuple(num_branches * value for value in found)

    kinds = [kind_of(chunk) for chunk in film.plan.chunks]
    examples = dict(zip(kinds, film.plan.chunks, strict=True))

    @cache
    def of_kind(kind: Kind, step: int) -> tuple[float, ...]:
        count = 1 if share.steps[step].skips_negative else branches
        return stages(film.tokens(examples[kind], step), step, count)

    @cache
    def decoding(kind: Kind) -> float:
        return machine.decode(film.cells, examples[kind].num_latents, examples[kind].start == 0)

    @cache
    def hopping(kind: Kind) -> float:
        own = film.tokens(examples[kind], film.steps - 1).own
        values = own / topology.seq * film.facts.hidden_size * branches
        return machine.hop(values * film.itemsize, topology) if topology.stage > 1 else 0.0

    @cache
    def with_decoding(kind: Kind, step: int) -> tuple[float, ...]:
        a_step = decoding(kind) / film.steps
        return tuple(work + part * a_step for work, part in zip(of_kind(kind, step), decodes, strict=True))

    return Times(
        unit=lambda chunk, step: (with_decoding if decodes else of_kind)(kinds[chunk], step),
        decode=lambda chunk: 0.0 if decodes else decoding(kinds[chunk]),
        hop=lambda chunk: hopping(kinds[chunk]),
        capacity=2 * film.settings.mesh.buffers,
    )


def split(film: Film, machine: Machine, topology: Topology) -> tuple[tuple[range, ...], Shares | None]:
    """The stages' layers and their decoding, dealt out by what they cost."""
    chunk = film.plan.chunks[min(1, len(film.plan.chunks) - 1)]
    tokens, branches = film.tokens(chunk, film.steps - 1), film.settings.sampler.num_branches // topology.guidance
    kinds = {layer: branches * machine.layer(layer, tokens, topology) for layer in set(film.sizes.layers)}
    end = branches * machine.ends(tokens, topology)
    decode = machine.decode(film.cells, chunk.num_latents, False) / film.steps
    costs = Costs(tuple(kinds[layer] for layer in film.sizes.layers), end, end, decode)
    return deal_work(costs, topology.stage, film.settings.mesh.decode)


def options(film: Film, machine: Machine, num_ranks: int, *, with_pace: bool = True) -> list[Option]:
    """Every mesh, the fastest of those that fit first; with its best ring alone.

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
    complete = [_complete(film, machine, option, with_pace) for option in found.values()]
    return sorted(complete, key=lambda option: (bool(option.reason), option.seconds))


def _complete(film: Film, machine: Machine, option: Option, with_pace: bool) -> Option:
    if option.reason:
        return option
    bounds, shares = split(film, machine, option.topology)
    decodes = shares.of_stages if shares else ()
    weights = lambda part, itemsize: itemsize * film.sizes.part_params(part)  # noqa: E731
    memory = stage_memory(
        film.plan, film.settings, film.facts, film.report, option.topology, bounds, weights, film.sizes, decodes
    )
    option = replace(option, bounds=bounds, memory=memory)
    if option.worst_mb > machine.memory_gb * 1e3:
        worst = max(range(len(memory)), key=lambda stage: memory[stage].total_mb)
        held = f"stage {worst} would hold {option.worst_mb / 1e3:.1f} GB, of {machine.memory_gb:.1f} GB"
        option = replace(option, reason=held)
    if not with_pace or option.reason:
        return option
    times = times_of(film, machine, option.topology, bounds, decodes)
    return replace(option, pace=pace_of(film.plan.chunks, film.steps, film.rules, times))


@dataclass(frozen=True)
class Outlook:
    """All meshes for a number of ranks, and where none fits, what would."""

    film: Film
    machine: Machine
    num_ranks: int
    options: tuple[Option, ...]
    remedies: tuple[str, ...]

    @classmethod
    def of(cls, film: Film, machine: Machine, num_ranks: int, replan: Callable[[Settings], Film]) -> Outlook:
        """`replan` lays the storyboard out anew for other settings."""
        found = tuple(options(film, machine, num_ranks))
        fits = any(option.reason is None for option in found)
        remedies = () if fits else tuple(_remedies(film, machine, num_ranks, replan))
        return cls(film, machine, num_ranks, found, remedies)

    @property
    def best(self) -> Option | None:
        """The fastest that fits."""
        return self.options[0] if self.options and self.options[0].reason is None else None

    def as_json(self) -> dict[str, Any]:
        """All of it as plain data; seconds, 10^6 bytes, 10^15 operations."""
        film, best = self.film, self.best
        return {
            "model": film.facts.name,
            "machine": self.machine.name,
            "memory_gb": self.machine.memory_gb,
            "ranks": self.num_ranks,
            "frames": film.plan.num_frames,
            "seconds": film.plan.num_frames / film.plan.fps,
            "chunks": len(film.plan.chunks),
            "steps": film.steps,
            "pflops": film.flops.each_step / 1e15,
            "attention_pflops": film.flops.attention / 1e15,
            "decode_pflops": film.decode_flops / 1e15,
            "fits": best is not None,
            "best": _option_json(best) if best else None,
            "options": [_option_json(option) for option in self.options],
            "remedies": list(self.remedies),
        }

    def as_text(self) -> str:
        """The same for people."""
        return "\n".join([*self._head(), "", *self._body()])

    def _head(self) -> Iterator[str]:
        film, plan = self.film, self.film.plan
        length = f"{plan.num_frames / plan.fps:.1f} s, {plan.num_frames} frames of {plan.width} x {plan.height}"
        yield f"film      {length} at {plan.fps:g} fps, {len(plan.chunks)} chunks × {film.steps} steps"
        yield f"model     {film.facts.name}: {film.sizes.params / 1e9:.2f} B parameters" + (
            f" × {film.sizes.num_experts} experts" if film.sizes.num_experts > 1 else ""
        )
        flops, decode = film.flops, film.decode_flops / 1e15
        share = 100 * flops.attention / flops.each_step
        work = f"{flops.each_step / 1e15:.4g} PFLOP, {share:.0f} % of it attention"
        yield f"work      {work}; decoding {decode:.3g} PFLOP"
        yield f"machine   {self.num_ranks} × {self.machine.name}, {self.machine.memory_gb:.1f} GB a rank"

    def _body(self) -> Iterator[str]:
        best = self.best
        if best is None:
            yield "does not fit"
            for option in self.options[:SHOWN]:
                yield f"  {_axes(option.topology):40}{option.reason}"
            yield "it would fit with"
            yield from (f"  {remedy}" for remedy in self.remedies or ("nothing that was tried",))
            return
        assert best.pace
        yield f"best      {_axes(best.topology)}: {as_set(best.topology)}"
        yield f"time      {duration(best.seconds)}, first frames after {duration(best.pace.first)}"
        work = self.film.plan.num_frames / self.film.plan.fps
        yield f"pace      {best.seconds / work:.2f} s a second of film, bubble {best.pace.bubble * 100:.1f} %"
        yield from _memory_table(best.memory)
        yield ""
        yield f"{'mesh':40}{'time':>10}{'first':>10}{'GB':>8}  "
        for option in self.options[:SHOWN]:
            yield _row(option, best)
        if len(self.options) > SHOWN:
            yield f"and {len(self.options) - SHOWN} more (--json lists them)"


def _option_json(option: Option) -> dict[str, Any]:
    return {
        "mesh": {**dict(zip(AXES, option.topology.sizes, strict=True)), "ring": option.topology.ring},
        "reason": option.reason,
        "seconds": option.pace.makespan if option.pace else None,
        "first_frames_s": option.pace.first if option.pace else None,
        "bubble": option.pace.bubble if option.pace else None,
        "layers": [[span.start, span.stop] for span in option.bounds],
        "memory": [asdict(stage) for stage in option.memory],
        "worst_mb": option.worst_mb,
    }


def _axes(topology: Topology) -> str:
    parts = [f"stage {topology.stage}", f"guidance {topology.guidance}", f"seq {topology.seq}"]
    return " × ".join(parts) + (f" (ring {topology.ring})" if topology.ring > 1 else "")


def as_set(topology: Topology) -> str:
    """The options of `longvid render` that choose a mesh."""
    sizes = {"stage": topology.stage, "guidance": topology.guidance, "seq": topology.seq}
    if topology.ring > 1:
        sizes["ring"] = topology.ring
    return " ".join(f"--set mesh.{axis}={size}" for axis, size in sizes.items())


def duration(seconds: float) -> str:
    """Seconds for people, to three digits."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def _memory_table(memory: Sequence[StageMemory]) -> Iterator[str]:
    """Stages that hold the same are one line."""
    kinds = {"weights": "weights", "kv": "K/V", "activations": "activations", "latents": "latents", "cache": "cache"}
    kinds |= {"vae": "VAE", "text": "text encoder"}
    rows: list[tuple[int, int, StageMemory]] = []
    for index, stage in enumerate(memory):
        if rows and rows[-1][2] == stage:
            rows[-1] = (rows[-1][0], index, stage)
        else:
            rows.append((index, index, stage))
    for first, last, stage in rows:
        values = {label: getattr(stage, f"{kind}_mb") for kind, label in kinds.items()}
        parts = ", ".join(f"{label} {value / 1e3:.3g}" for label, value in values.items() if value)
        name = f"stage {first}" if first == last else f"stages {first}-{last}"
        yield f"{name:12}{stage.total_mb / 1e3:.3g} GB: {parts}"


def _row(option: Option, best: Option) -> str:
    gb = f"{option.worst_mb / 1e3:8.1f}" if option.memory else f"{'-':>8}"
    if not option.pace:
        return f"{_axes(option.topology):40}{'-':>10}{'-':>10}{gb}  {option.reason}"
    times = f"{duration(option.seconds):>10}{duration(option.pace.first):>10}"
    return f"{_axes(option.topology):40}{times}{gb}  {_why(option, best)}"


def _why(option: Option, best: Option) -> str:
    """Why a mesh lost."""
    assert option.pace and best.pace
    if option is best:
        return ""
    slower = f"{option.seconds / best.seconds:.2f}x"
    busiest, lost = max(option.pace.busy), option.pace.bubble - best.pace.bubble
    if lost > 0.1 and busiest < 0.9 * option.seconds:
        return f"{slower}: ranks wait {option.pace.bubble * 100:.0f} % of the time (too few units in flight)"
    if lost > 0.02:
        return f"{slower}: stages are uneven or wait, bubble {option.pace.bubble * 100:.0f} %"
    if option.topology.seq > best.topology.seq:
        return f"{slower}: exchange of tokens"
    return slower


def _remedies(film: Film, machine: Machine, num_ranks: int, replan: Callable[[Settings], Film]) -> Iterator[str]:
    """What would make it fit, one change at a time."""

    def fits(film: Film, machine: Machine, num_ranks: int) -> bool:
        return any(option.reason is None for option in options(film, machine, num_ranks, with_pace=False))

    for kind in _changes(film.settings):
        for change, text in kind:
            other = replan(change)
            again = replace(machine, itemsize=other.itemsize) if isinstance(machine, ChipMachine) else machine
            if fits(other, again, num_ranks):
                yield text
                break
    more = num_ranks
    while more < MOST_RANKS:
        more *= 2
        if fits(film, machine, more):
            yield f"{more} of them"
            break
    if isinstance(machine, ChipMachine):
        larger = sorted((chip for chip in CHIPS if chip.memory_gb > machine.chip.memory_gb), key=lambda c: c.memory_gb)
        for chip in larger:
            if fits(film, replace(machine, chip=chip), num_ranks):
                yield f"--gpu {chip.name}"
                break


def _changes(settings: Settings) -> Iterator[list[tuple[Settings, str]]]:
    """Other settings that take less memory, each as `--set` says it; by kind, the least change first."""
    queue = settings.queue

    def of_queue(**values: int | str) -> tuple[Settings, str]:
        text = " ".join(f"--set queue.{key}={value}" for key, value in values.items())
        return settings.model_copy(update={"queue": queue.model_copy(update=values)}), text

    if settings.runtime.dtype == "float32":
        runtime = settings.runtime.model_copy(update={"dtype": "bfloat16"})
        yield [(settings.model_copy(update={"runtime": runtime}), "--set runtime.dtype=bfloat16")]
    if settings.schedule == "sequential":
        yield [(settings.model_copy(update={"schedule": "queue"}), "--set schedule=queue")]
        return
    if queue.left == "cached":
        yield [of_queue(left="recompute")]
    sizes = [queue.chunk_latents >> halvings for halvings in range(1, queue.chunk_latents.bit_length())]
    yield [of_queue(chunk_latents=size, context_latents=min(queue.context_latents, size)) for size in sizes]
    yield [of_queue(context_latents=queue.context_latents >> halvings) for halvings in range(1, 4)]
    gaps = [queue.gap << doublings for doublings in range(1, 7)]
    yield [of_queue(gap=gap) for gap in gaps if gap <= settings.sampler.steps]
