"""The schedule: which unit of work runs when, and exactly what it reads. Pure data, made as it is read.

A schedule is a stream of Actions. Each names the values that it reads and makes, so that whoever carries it out does no
arithmetic and never polls: `z3@5` is the latents of chunk 3 after 5 steps, `kv4@7` the K/V of chunk 4 from round 7.

In the queue (DualParal, "Minute-Long Videos with Dual Parallelisms"), chunk i enters in round i and is at step
k = n - i in round n. A round takes one step of every queued chunk, newest first. `verify.grid` for 3 steps:

    round  c0  c1  c2  c3
        0   0   .   .   .
        1   1   0   .   .
        2   2   1   0   .   finish c0
        3   .   2   1   0   finish c1
        4   .   .   2   1   finish c2
        5   .   .   .   2   finish c3

forward(i, k) reads its own z[i]@k; as right context the K/V that forward(i+1, k-1) stored just before, in the same
round; and as left context either the last latents of z[i-1], recomputed through all layers (`left: recompute`), or the
K/V that forward(i-1, k) stored a round ago, when chunk i-1 was at the same step (`left: cached`).

After a transition `share`, the chunks of the new scene also read the K/V of how the scene before ended, as its chunk
stored them at the same step. They live until the last of these chunks was at that step.

With a `gap` of g steps between neighbours, chunk i enters in round g·i: fewer chunks are in flight.

In the chunk schedule (VIN, "Generating, Fast and Slow: Video Interface Networks"), all chunks are at one step. Left
context is recomputed from the last latents of the chunk before, at that step; in the early steps what both chunks
predict for these latents is fused. Chunks that are more than a group follow in groups, for memory must not grow with
the film: the first chunk of a group sees the finished latents of the one before. With groups of 2, for 2 steps:

    round  c0  c1  c2
        0   0   0   .
        1   1   1   .   finish c0 c1
        2   .   .   0
        3   .   .   1   finish c2

A cache may have steps forecast instead of computed: the same steps of every chunk. Their velocity comes of the chunk's
earlier ones, no layer runs, and whoever would read their K/V reads those of the last step that was computed. Of gated
steps the first rank decides behind the first layers whether the others run; the schedule is the same either way.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import groupby, pairwise
from typing import Any, Literal

from longvid.parallel.snapshot import LAG, is_remembered, oldest_in_flight, snapshot
from longvid.plan import Chunk, FilmSpan, Plan, sharing_steps
from longvid.settings import Settings

LeftLevel = Literal["same", "fresher"]
Edge = Literal["first", "last", "scene"]
_EDGES: dict[Edge, str] = {"first": "<", "last": ">", "scene": "|"}


@dataclass(frozen=True, slots=True)
class LatentVersion:
    """A chunk's own latents after `version` steps: noise at 0, finished when it equals the number of steps."""

    chunk: int
    version: int

    def __str__(self) -> str:
        return f"z{self.chunk}@{self.version}"


@dataclass(frozen=True, slots=True)
class KvVersion:
    """K/V of every layer for a chunk's first or last own latents, as its forward of `round` computed them.

    Those of a `scene`'s end are of late layers alone.
    """

    chunk: int
    round: int
    edge: Edge = "first"

    def __str__(self) -> str:
        return f"kv{self.chunk}{_EDGES[self.edge]}@{self.round}"


@dataclass(frozen=True, slots=True)
class OverlapVersion:
    """The velocity that a chunk's forward at `step` predicts for its left context, the last latents of another."""

    chunk: int
    step: int

    def __str__(self) -> str:
        return f"v{self.chunk}<@{self.step}"


@dataclass(frozen=True, slots=True)
class GlobalVersion:
    """The global tokens that the units of a shot read in a round."""

    round: int
    shot: int = 0

    def __str__(self) -> str:
        return f"g{self.shot}@{self.round}"


@dataclass(frozen=True, slots=True)
class Admit:
    """Draw z[chunk]@0 and begin a solver history.

    In the chunk schedule: with the others of `group`; `is_left` says that the chunk after reads z[chunk]@0.
    """

    round: int
    chunk: int
    group: range | None = None
    is_left: bool = False

    def __str__(self) -> str:
        return f"{self.round:5}  admit    c{self.chunk}{_left_of(self.chunk, self.is_left)}"


@dataclass(frozen=True, slots=True)
class Encode:
    """Make a shot's global tokens for a round, of the key latents in these `latents`.

    In the chunk schedule: for the units of `readers`.
    """

    round: int
    latents: tuple[LatentVersion, ...]
    shot: int = 0
    readers: range | None = None

    @property
    def tokens(self) -> GlobalVersion:
        return GlobalVersion(self.round, self.shot)

    def __str__(self) -> str:
        return f"{self.round:5}  encode   {self.tokens}  of {' '.join(map(str, self.latents))}"


@dataclass(frozen=True, slots=True)
class Recall:
    """Take up the last latents of the film that goes on, of as many as there is left context."""

    round: int
    latents: LatentVersion

    def __str__(self) -> str:
        return f"{self.round:5}  recall   {self.latents}"


@dataclass(frozen=True, slots=True)
class Forward:
    """Predict the velocity at z[chunk]@step, with context `left` and `right`, and in late layers `shared`.

    Keep K/V as each of `store`. With `overlap`, predict and keep that too. With `tokens`, its layers read global
    tokens, too.
    """

    round: int
    chunk: int
    step: int
    left: LatentVersion | KvVersion | None = None
    right: KvVersion | None = None
    store: tuple[KvVersion, ...] = ()
    tokens: GlobalVersion | None = None
    overlap: OverlapVersion | None = None
    shared: KvVersion | None = None

    def __str__(self) -> str:
        names = ("left", "right", "shared", "tokens", "overlap")
        context = [f"  {name} {value}" for name in names if (value := getattr(self, name))]
        context += [f"  store {value}" for value in self.store]
        return f"{self.round:5}  forward  c{self.chunk} k{self.step}{''.join(context)}"


@dataclass(frozen=True, slots=True)
class Gate:
    """Run the first layers of the forward that follows, and decide whether the others are to run."""

    forward: Forward

    @property
    def round(self) -> int:
        return self.forward.round

    def __str__(self) -> str:
        return f"{self.round:5}  gate     c{self.forward.chunk} k{self.forward.step}"


@dataclass(frozen=True, slots=True)
class Forecast:
    """Predict the velocity of a step from those of the chunk's computed steps, without a forward."""

    round: int
    chunk: int
    step: int

    def __str__(self) -> str:
        return f"{self.round:5}  forecast c{self.chunk} k{self.step}"


@dataclass(frozen=True, slots=True)
class Fuse:
    """Fuse what the chunk after predicts for the last latents of z[chunk]@step into their velocity, with weights that
    rise linearly towards that chunk. It is used up.
    """

    round: int
    chunk: int
    step: int
    overlap: OverlapVersion

    def __str__(self) -> str:
        return f"{self.round:5}  fuse     c{self.chunk} k{self.step}  with {self.overlap}"


@dataclass(frozen=True, slots=True)
class Step:
    """Make z[chunk]@step+1 of z[chunk]@step and the velocity of that step, which is used up.

    `is_left`: the chunk after reads what it makes, in a chunk schedule.
    """

    round: int
    chunk: int
    step: int
    is_left: bool = False

    def __str__(self) -> str:
        return f"{self.round:5}  step     c{self.chunk} k{self.step}{_left_of(self.chunk, self.is_left)}"


@dataclass(frozen=True, slots=True)
class Finish:
    """Hand out a chunk's finished latents and end its solver history."""

    round: int
    latents: LatentVersion

    def __str__(self) -> str:
        return f"{self.round:5}  finish   {self.latents}"


@dataclass(frozen=True, slots=True)
class DropLatents:
    """Forget latents: nothing reads them any more."""

    round: int
    latents: LatentVersion

    def __str__(self) -> str:
        return f"{self.round:5}  drop     {self.latents}"


@dataclass(frozen=True, slots=True)
class DropKv:
    """Forget K/V: nothing reads them any more."""

    round: int
    kv: KvVersion

    def __str__(self) -> str:
        return f"{self.round:5}  drop     {self.kv}"


@dataclass(frozen=True, slots=True)
class DropGlobals:
    """Forget global tokens: nothing reads them any more."""

    round: int
    tokens: GlobalVersion

    def __str__(self) -> str:
        return f"{self.round:5}  drop     {self.tokens}"


Action = Admit | Recall | Encode | Gate | Forward | Forecast | Fuse | Step | Finish | DropLatents | DropKv | DropGlobals


def _left_of(chunk: int, is_left: bool) -> str:
    return f"  left of c{chunk + 1}" if is_left else ""


@dataclass(frozen=True, slots=True)
class QueueRules:
    """What the settings say of who reads what; `gap` is how many steps neighbours are apart.

    `forecast` are the steps that are not computed, `gated` those of which the first rank decides; never the first or
    the last. With `tokens`, units read global tokens, for which a shot's finished chunks are kept as far back as
    `memory` says (`snapshot.is_remembered`). In the steps of `sharing`, chunks read the K/V of how the scene before
    ended, where the plan says so.
    """

    left: Literal["recompute", "cached"] = "recompute"
    left_level: LeftLevel = "fresher"
    gap: int = 1
    forecast: frozenset[int] = frozenset()
    gated: frozenset[int] = frozenset()
    tokens: bool = False
    memory: int = 0
    sharing: frozenset[int] = frozenset()

    @classmethod
    def of(cls, settings: Settings) -> QueueRules:
        """The rules that the settings ask for; `sequential` is a queue whose chunks never meet."""
        steps = settings.sampler.steps
        forecast, gated = settings.cache.forecast_steps(steps), settings.cache.gated_steps(steps)
        if settings.schedule == "sequential":
            return cls(gap=steps, forecast=forecast, gated=gated)
        queue, vin = settings.queue, settings.vin
        has_tokens, sharing = vin.policy == "on", frozenset(sharing_steps(steps)) - forecast
        return cls(queue.left, queue.left_level, queue.gap, forecast, gated, has_tokens, vin.memory, sharing)

    def computed(self, step: int) -> int:
        """The last step up to this one that is computed."""
        while step in self.forecast:
            step -= 1
        return step

    def num_rounds(self, num_chunks: int, steps: int) -> int:
        return (num_chunks - 1) * self.gap + steps

    def num_units(self, num_chunks: int, steps: int, rounds: int) -> int:
        """Units of the first so many rounds."""
        full = self.num_finished(num_chunks, steps, rounds)
        entered = min(num_chunks, -(-rounds // self.gap))
        begun = range(rounds - self.gap * full, rounds - self.gap * entered, -self.gap)
        return steps * full + len(begun) * (begun[0] + begun[-1]) // 2 if begun else steps * full

    def num_finished(self, num_chunks: int, steps: int, rounds: int) -> int:
        """Chunks that are finished after so many rounds."""
        return min(max((rounds - steps) // self.gap + 1, 0), num_chunks)

    def in_flight(self, steps: int) -> int:
        """Chunks that are denoised at once, at most."""
        return -(-steps // self.gap)


@dataclass(frozen=True, slots=True)
class ChunkRules:
    """What the settings say of the chunk schedule: chunks of a group at most, and the steps whose overlaps are fused.

    `forecast` and `gated` are as in QueueRules. With `tokens`, each step reads global tokens of the shot's chunks in
    the group, as they stand before it, and of those finished ones that `memory` says. Of pure noise none are made.
    """

    group: int = 64
    fused_steps: int = 0
    forecast: frozenset[int] = frozenset()
    gated: frozenset[int] = frozenset()
    tokens: bool = False
    memory: int = 0

    @classmethod
    def of(cls, settings: Settings) -> ChunkRules:
        steps, chosen, vin = settings.sampler.steps, settings.chunks, settings.vin
        forecast, gated = settings.cache.forecast_steps(steps), settings.cache.gated_steps(steps)
        return cls(chosen.group, round(chosen.fuse * steps), forecast, gated, vin.policy == "on", vin.memory)

    def groups(self, num_chunks: int) -> tuple[range, ...]:
        """As few groups as there can be, as even as they can be: ranks share each of them."""
        count = -(-num_chunks // self.group)
        edges = [-(-num_chunks * g // count) for g in range(count + 1)]
        return tuple(range(*pair) for pair in pairwise(edges))

    def num_rounds(self, num_chunks: int, steps: int) -> int:
        return len(self.groups(num_chunks)) * steps

    def num_units(self, num_chunks: int, steps: int, rounds: int) -> int:
        """Units of the first so many rounds."""
        groups = self.groups(num_chunks)
        return sum(len(group) * min(max(rounds - steps * g, 0), steps) for g, group in enumerate(groups))

    def num_finished(self, num_chunks: int, steps: int, rounds: int) -> int:
        """Chunks that are finished after so many rounds."""
        return sum(map(len, self.groups(num_chunks)[: rounds // steps]))

    def in_flight(self, steps: int) -> int:
        """Chunks that are denoised at once, at most."""
        return self.group


Rules = QueueRules | ChunkRules


def rules_of(settings: Settings) -> Rules:
    """The rules that the settings ask for."""
    return ChunkRules.of(settings) if settings.schedule == "chunks" else QueueRules.of(settings)


def make_schedule(plan: Plan, settings: Settings) -> Iterator[Action]:
    """The schedule that the settings ask for; of several films, each round by round beside the others."""

    def of_film(film: FilmSpan) -> Iterator[Action]:
        alone = _schedule(plan.chunks[film.chunks.start : film.chunks.stop], settings, plan.first_chunk)
        return (shift(action, film.chunks.start, film.first_round) for action in alone)

    return heapq.merge(*map(of_film, plan.films), key=lambda action: action.round)


def _schedule(chunks: Sequence[Chunk], settings: Settings, first: int) -> Iterator[Action]:
    """That of one film's chunks, those before `first` being finished."""
    steps = settings.sampler.steps
    if settings.schedule == "chunks":
        return chunk_schedule(chunks, steps, ChunkRules.of(settings))
    if settings.schedule == "sequential":
        return sequential_schedule(chunks, steps, QueueRules.of(settings), first)
    return queue_schedule(chunks, steps, QueueRules.of(settings), first)


def last_round(film: FilmSpan, settings: Settings) -> int:
    """The round in which a film's last chunk takes its last step."""
    return film.first_round + rules_of(settings).num_rounds(len(film.chunks), settings.sampler.steps) - 1


def first_round(plan: Plan, settings: Settings) -> int:
    """The round in which work begins: that in which a film that goes on would have come so far."""
    rules = rules_of(settings)
    return rules.gap * plan.first_chunk if isinstance(rules, QueueRules) else 0


def num_rounds(plan: Plan, settings: Settings) -> int:
    """Rounds from the first one until the last film is done."""
    return 1 + max(last_round(film, settings) for film in plan.films) - first_round(plan, settings)


def num_units(plan: Plan, settings: Settings, done: int) -> int:
    """Units of the rounds up to `done`."""
    rules, steps, begun = rules_of(settings), settings.sampler.steps, done + 1 - first_round(plan, settings)
    return sum(
        rules.num_units(len(film.chunks) - plan.first_chunk, steps, max(0, begun - film.first_round))
        for film in plan.films
    )


def num_finished(plan: Plan, settings: Settings, done: int) -> list[int]:
    """Chunks of each film that are finished when round `done` is over."""
    rules, steps, begun = rules_of(settings), settings.sampler.steps, done + 1 - first_round(plan, settings)
    return [
        plan.first_chunk
        + rules.num_finished(len(film.chunks) - plan.first_chunk, steps, max(0, begun - film.first_round))
        for film in plan.films
    ]


def shift(action: Action, chunks: int, rounds: int) -> Action:
    """The same action, with chunks and rounds that are so many further. Shots are those of the plan already."""
    if not chunks and not rounds:
        return action
    if isinstance(action, Gate):
        forward = shift(action.forward, chunks, rounds)
        assert isinstance(forward, Forward)
        return Gate(forward)
    moved = {item.name: _shifted(getattr(action, item.name), chunks, rounds) for item in fields(action)}
    if "chunk" in moved:
        moved["chunk"] += chunks
    return replace(action, **{**moved, "round": action.round + rounds})


def _shifted(value: Any, chunks: int, rounds: int) -> Any:
    """A value that an action names; or several."""
    match value:
        case LatentVersion():
            return LatentVersion(value.chunk + chunks, value.version)
        case KvVersion():
            return KvVersion(value.chunk + chunks, value.round + rounds, value.edge)
        case GlobalVersion():
            return GlobalVersion(value.round + rounds, value.shot)
        case tuple():
            return tuple(_shifted(item, chunks, rounds) for item in value)
        case range():
            return range(value.start + chunks, value.stop + chunks)
    return value


def queue_schedule(chunks: Sequence[Chunk], steps: int, rules: QueueRules, first: int = 0) -> Iterator[Action]:
    """The queue. Chunks of different shots follow each other without a pause.

    `left_level` is how far denoised forward(i, k) sees latents as left context: "same" reads z[i-1]@k, "fresher"
    z[i-1] as it stands, `gap` steps further (or finished). Chunks before `first` are finished: what the first one reads
    as left context is clean at all steps, and is recalled.
    """
    queue = _Queue(chunks, steps, rules, first)
    gap = rules.gap
    for n in range(gap * first, rules.num_rounds(len(chunks), steps)):
        newest, oldest = min(n // gap, len(chunks) - 1), max(-(-(n - steps + 1) // gap), first)
        for shot, members in groupby(range(newest, oldest - 1, -1), key=lambda i: chunks[i].shot):
            yield from queue.of_shot(n, shot, list(members))


def sequential_schedule(
    chunks: Sequence[Chunk], steps: int, rules: QueueRules | None = None, first: int = 0
) -> Iterator[Action]:
    """One chunk after the other, each for all its steps: the oracle for short clips. No chunk may have context, but for
    the first one of a film that goes on.

    Of the rules only what a cache leaves out counts.
    """
    alone = [*chunks[:1], *chunks[first + 1 :]]
    assert all(chunk.num_left == chunk.num_right == 0 for chunk in alone), "a sequential chunk is a whole shot"
    return queue_schedule(chunks, steps, replace(rules or QueueRules(), gap=steps), first)


def chunk_schedule(chunks: Sequence[Chunk], steps: int, rules: ChunkRules) -> Iterator[Action]:
    """All chunks of a group at the same step, in the order of the film; one group after the other."""
    groups = rules.groups(len(chunks))
    for g, (group, after) in enumerate(zip(groups, (*groups[1:], range(0)), strict=True)):
        together = _Group(chunks, steps, rules, group, after)
        for k in range(steps):
            yield from together.round(g * steps + k, k)


@dataclass(frozen=True)
class _Group:
    """Chunks that are denoised side by side, and those that are next."""

    chunks: Sequence[Chunk]
    steps: int
    rules: ChunkRules
    group: range
    after: range

    def round(self, n: int, k: int) -> Iterator[Action]:
        """One step of every chunk. A chunk steps when the one after has read its latents, so few values live twice."""
        if k == 0:
            for i in self.group:
                yield Admit(n, i, self.group, self.is_left(LatentVersion(i, 0)))
        encodes = list(self.encodes(n, k))
        yield from encodes
        if k + 1 == self.steps:
            yield from self.forget(n)
        for i in self.group:
            if k in self.rules.forecast:
                yield Forecast(n, i, k)
            else:
                yield from self.forward(n, i, k)
            if i > self.group.start:
                yield from self.settle(n, i - 1, k)
        yield from self.settle(n, self.group[-1], k)
        for encode in encodes:
            yield DropGlobals(n, encode.tokens)

    def has_tokens(self, k: int, shot: int) -> bool:
        """Whether a shot has tokens at a step: when it is computed, and there is more to make them of than noise."""
        has_memory = shot == self.chunks[self.group.start].shot and bool(self.memory)
        return self.rules.tokens and k not in self.rules.forecast and (k > 0 or has_memory)

    def encodes(self, n: int, k: int) -> Iterator[Encode]:
        """The global tokens of every shot in the group."""
        for shot, found in groupby(self.group, key=lambda i: self.chunks[i].shot):
            members = list(found)
            if self.has_tokens(k, shot):
                finished = self.memory if members[0] == self.group.start else ()
                told = [LatentVersion(i, self.steps) for i in finished]
                told += [LatentVersion(i, k) for i in members if k]
                yield Encode(n, tuple(told), shot, range(members[0], members[-1] + 1))

    @cached_property
    def memory(self) -> tuple[int, ...]:
        """The finished chunks of earlier groups that the tokens of the group's first shot are made of."""
        return tuple(i for i in range(self.shot_start(self.group), self.group.start) if self.is_read(i, self.group))

    def shot_start(self, group: range) -> int:
        """The first chunk of the shot that a group begins with, or goes on with."""
        start = group.start
        while self.chunks[start].start:
            start -= 1
        return start

    def is_read(self, i: int, group: range) -> bool:
        """Whether the tokens of a group are made of an earlier group's chunk, too."""
        if not self.rules.tokens or not group:
            return False
        first = self.shot_start(group)
        return first <= i < group.start and is_remembered(i, first, group.start, self.rules.memory)

    def forget(self, n: int) -> Iterator[Action]:
        """Finished chunks that tokens were made of for the last time. One that is left out once is left out for good.

        The last of them is seen as left context, too.
        """
        for i in self.memory:
            is_left = i + 1 == self.group.start and self.chunks[i + 1].num_left > 0
            if not is_left and not self.is_read(i, self.after):
                yield DropLatents(n, LatentVersion(i, self.steps))

    def forward(self, n: int, i: int, k: int) -> Iterator[Action]:
        left = self.left(i, k)
        shot = self.chunks[i].shot
        tokens = GlobalVersion(n, shot) if self.has_tokens(k, shot) else None
        forward = Forward(n, i, k, left, tokens=tokens, overlap=self.overlap(i, k))
        if k in self.rules.gated:
            yield Gate(forward)
        yield forward
        if left and left.chunk < self.group.start and k + 1 == self.steps and not self.is_read(left.chunk, self.after):
            yield DropLatents(n, left)

    def settle(self, n: int, i: int, k: int) -> Iterator[Action]:
        """What follows a chunk's forward."""
        fused = self.overlap(i + 1, k) if i + 1 in self.group else None
        if fused:
            yield Fuse(n, i, k, fused)
        made = LatentVersion(i, k + 1)
        yield Step(n, i, k, self.is_left(made))
        yield DropLatents(n, LatentVersion(i, k))
        if made.version == self.steps:
            yield Finish(n, made)
            if not self.is_left(made) and not self.is_read(i, self.after):
                yield DropLatents(n, made)

    def left(self, i: int, k: int) -> LatentVersion | None:
        if not self.chunks[i].num_left:
            return None
        return LatentVersion(i - 1, k if i > self.group.start else self.steps)

    def is_left(self, latents: LatentVersion) -> bool:
        """Whether the chunk after reads this: in its step of the same number; if of another group, when finished."""
        i, v = latents.chunk + 1, latents.version
        if i == len(self.chunks) or not self.chunks[i].num_left:
            return False
        if i not in self.group:
            return v == self.steps
        return v < self.steps and v not in self.rules.forecast

    def overlap(self, i: int, k: int) -> OverlapVersion | None:
        """What the chunk predicts for the chunk before; none for a finished one, and none of a forecast."""
        has_left = self.chunks[i].num_left > 0 and i > self.group.start
        is_fused = k < self.rules.fused_steps and k not in self.rules.forecast
        return OverlapVersion(i, k) if has_left and is_fused else None


@dataclass(frozen=True)
class _Queue:
    """The rules of the queue, one a method: what forward(i, k) reads and keeps, and who reads a value last."""

    chunks: Sequence[Chunk]
    steps: int
    rules: QueueRules
    first: int = 0
    kept: dict[LatentVersion, None] = field(default_factory=dict)
    """Latents that global tokens alone are still to be made of."""

    def of_shot(self, n: int, shot: int, members: Sequence[int]) -> Iterator[Action]:
        """The units of a shot in a round; members newest first."""
        if not self.has_tokens(n, shot):
            for i in members:
                yield from self.unit(i, n - self.rules.gap * i)
            return
        versions = snapshot(self.shots[shot], n, self.steps, self.rules.gap, self.rules.memory)
        encode = Encode(n, tuple(LatentVersion(*version) for version in versions), shot)
        yield encode
        yield from self.forget(n, shot)
        for i in members:
            yield from self.unit(i, n - self.rules.gap * i)
        yield DropGlobals(n, encode.tokens)

    @cached_property
    def shots(self) -> dict[int, range]:
        """The chunks of every shot."""
        members = ((shot, list(chunks)) for shot, chunks in groupby(self.chunks, key=lambda chunk: chunk.shot))
        return {shot: range(chunks[0].index, chunks[-1].index + 1) for shot, chunks in members}

    def has_tokens(self, n: int, shot: int) -> bool:
        """Whether a shot has tokens in a round: when there are forwards to read them, and latents to make them of."""
        if not self.rules.tokens:
            return False
        members, gap = self.shots[shot], self.rules.gap
        oldest, newest = oldest_in_flight(members, n, self.steps, gap), min(n // gap, members[-1])
        is_read = any(n - gap * i not in self.rules.forecast for i in range(oldest, newest + 1))
        return is_read and bool(snapshot(members, n, self.steps, gap, self.rules.memory))

    def unit(self, i: int, k: int) -> Iterator[Action]:
        """The actions of one unit. Every value is dropped right after its last reader."""
        n = self.rules.gap * i + k
        if k == 0:
            if i == self.first and self.chunks[i].num_left:
                yield Recall(n, LatentVersion(i - 1, self.steps))
            yield Admit(n, i)
        if k in self.rules.forecast:
            yield Forecast(n, i, k)
        else:
            yield from self.forward(n, i, k)
        yield Step(n, i, k)
        yield from self.drop_own(n, LatentVersion(i, k))
        if k + 1 == self.steps:
            yield Finish(n, LatentVersion(i, self.steps))
            yield from self.drop_own(n, LatentVersion(i, self.steps))

    def forward(self, n: int, i: int, k: int) -> Iterator[Action]:
        left, right = self.left(i, k), self.right(i, k)
        shot = self.chunks[i].shot
        tokens = GlobalVersion(n, shot) if self.has_tokens(n, shot) else None
        shared = self.shared(i, k)
        forward = Forward(n, i, k, left, right, self.store(i, k), tokens, shared=shared)
        if k in self.rules.gated:
            yield Gate(forward)
        yield forward
        if right and not any(self.right(i, later) == right for later in self.computed_after(k)):
            yield DropKv(n, right)
        if isinstance(left, KvVersion):
            yield DropKv(n, left)
        elif left and i == self.first:
            if k + 1 == self.steps:
                yield DropLatents(n, left)
        elif left and self.neighbour_reads_last(left) and (self.rules.left_level == "same" or k + 1 == self.steps):
            yield from self.release(n, left)
        if shared and self.is_last_reader(i):
            yield DropKv(n, shared)

    def computed_after(self, k: int) -> Iterator[int]:
        return (later for later in range(k + 1, self.steps) if later not in self.rules.forecast)

    def left(self, i: int, k: int) -> LatentVersion | KvVersion | None:
        """Chunk i-1 is `gap` steps ahead: take it as it is ("fresher"), or as it was `gap` rounds ago."""
        if not self.chunks[i].num_left:
            return None
        if i == self.first:
            return LatentVersion(i - 1, self.steps)
        if self.rules.left == "cached":
            return KvVersion(i - 1, self.rules.gap * (i - 1) + k, "last")
        ahead = self.rules.gap if self.rules.left_level == "fresher" else 0
        return LatentVersion(i - 1, min(k + ahead, self.steps))

    def right(self, i: int, k: int) -> KvVersion | None:
        """Chunk i+1 is `gap` steps behind and ran just before in this round, unless it has not entered yet.

        Where that step was a forecast: the last one that was computed.
        """
        behind = k - self.rules.gap
        if not self.chunks[i].num_right or behind < 0:
            return None
        return KvVersion(i + 1, self.rules.gap * (i + 1) + self.rules.computed(behind))

    def shared(self, i: int, k: int) -> KvVersion | None:
        """How the scene before ended, when its chunk was at this step."""
        shares = self.chunks[i].shares
        if shares is None or k not in self.rules.sharing:
            return None
        source = shares - self.chunks[0].index
        return KvVersion(source, self.rules.gap * source + k, "scene")

    def is_last_reader(self, i: int) -> bool:
        """Of how the scene before ended: its readers follow each other."""
        return i + 1 == len(self.chunks) or self.chunks[i + 1].shares != self.chunks[i].shares

    def store(self, i: int, k: int) -> tuple[KvVersion, ...]:
        """First edge: wanted by forward(i-1, k + gap), or the next that comes. Last: by forward(i+1, k), if cached.

        The end of a scene: by forward(j, k) of the chunks that share it.
        """
        n, first, kept = self.rules.gap * i + k, KvVersion(i, self.rules.gap * i + k), []
        if i > 0 and any(self.right(i - 1, reader) == first for reader in self.computed_after(k)):
            kept.append(first)
        if self.rules.left == "cached" and i + 1 < len(self.chunks) and self.chunks[i + 1].num_left:
            kept.append(KvVersion(i, n, "last"))
        is_shared = i + 1 < len(self.chunks) and self.chunks[i + 1].shares == self.chunks[i].index
        if is_shared and k in self.rules.sharing:
            kept.append(KvVersion(i, n, "scene"))
        return tuple(kept)

    def drop_own(self, n: int, latents: LatentVersion) -> Iterator[Action]:
        if not self.neighbour_reads_last(latents):
            yield from self.release(n, latents)

    def release(self, n: int, latents: LatentVersion) -> Iterator[Action]:
        """No forward reads these latents any more; global tokens may still be made of them."""
        if self.is_encoded_after(n, latents):
            self.kept[latents] = None
        else:
            yield DropLatents(n, latents)

    def forget(self, n: int, shot: int) -> Iterator[Action]:
        """Behind a shot's Encode of round n: what was kept for no other."""
        for latents in [z for z in self.kept if self.chunks[z.chunk].shot == shot]:
            if not self.is_encoded_after(n, latents):
                del self.kept[latents]
                yield DropLatents(n, latents)

    def is_encoded_after(self, n: int, latents: LatentVersion) -> bool:
        """Whether an Encode of a later round reads these latents."""
        i, v, gap = latents.chunk, latents.version, self.rules.gap
        if not self.rules.tokens or v == 0:
            return False
        shot = self.chunks[i].shot
        members = self.shots[shot]
        first = gap * i + v + LAG  # the round whose snapshot shows them first
        if v < self.steps:
            return first > n and self.has_tokens(first, shot)
        last = gap * members[-1] + self.steps - 1
        then = next((m for m in range(max(first, n + 1), last + 1) if self.has_tokens(m, shot)), None)
        if then is None:
            return False
        # One that is left out once is left out for good.
        oldest = oldest_in_flight(members, then - LAG, self.steps, gap)
        return is_remembered(i, members.start, oldest, self.rules.memory)

    def neighbour_reads_last(self, latents: LatentVersion) -> bool:
        """Whether chunk i+1 reads z[i]@v as left context after chunk i itself is done with it.

        Chunk i steps on from z[i]@v in round gap·i + v. Chunk i+1 reads it `gap` rounds later as "same" (v < steps),
        and earlier in that very round as "fresher"; but z[i]@steps is handed out before chunk i+1 reads it as
        "fresher", at each of its last `gap` steps.
        """
        i, v = latents.chunk, latents.version
        if self.rules.left == "cached" or i + 1 == len(self.chunks) or not self.chunks[i + 1].num_left:
            return False
        if self.rules.left_level == "fresher":  # the last step is never a forecast
            return v == self.steps
        return v < self.steps and v not in self.rules.forecast
