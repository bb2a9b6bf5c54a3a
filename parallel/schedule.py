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

A cache may have steps forecast instead of computed: the same steps of every chunk. Their velocity comes of the chunk's
earlier ones, no layer runs, and whoever would read their K/V reads those of the last step that was computed. Of gated
steps the first rank decides behind the first layers whether the others run; the schedule is the same either way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from longvid.plan import Chunk, Plan, sharing_steps
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
class Admit:
    """Draw z[chunk]@0 and begin a solver history."""

    round: int
    chunk: int

    def __str__(self) -> str:
        return f"{self.round:5}  admit    c{self.chunk}"


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

    Keep K/V as each of `store`.
    """

    round: int
    chunk: int
    step: int
    left: LatentVersion | KvVersion | None = None
    right: KvVersion | None = None
    store: tuple[KvVersion, ...] = ()
    shared: KvVersion | None = None

    def __str__(self) -> str:
        context = [f"  {name} {value}" for name in ("left", "right", "shared") if (value := getattr(self, name))]
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
class Step:
    """Make z[chunk]@step+1 of z[chunk]@step and the velocity of that step, which is used up."""

    round: int
    chunk: int
    step: int

    def __str__(self) -> str:
        return f"{self.round:5}  step     c{self.chunk} k{self.step}"


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


Action = Admit | Recall | Gate | Forward | Forecast | Step | Finish | DropLatents | DropKv


@dataclass(frozen=True, slots=True)
class QueueRules:
    """What the settings say of who reads what; `gap` is how many steps neighbours are apart.

    `forecast` are the steps that are not computed, `gated` those of which the first rank decides; never the first or
    the last. In the steps of `sharing`, chunks read the K/V of how the scene before ended, where the plan says so.
    """

    left: Literal["recompute", "cached"] = "recompute"
    left_level: LeftLevel = "fresher"
    gap: int = 1
    forecast: frozenset[int] = frozenset()
    gated: frozenset[int] = frozenset()
    sharing: frozenset[int] = frozenset()

    @classmethod
    def of(cls, settings: Settings) -> QueueRules:
        """The rules that the settings ask for; `sequential` is a queue whose chunks never meet."""
        steps = settings.sampler.steps
        forecast, gated = settings.cache.forecast_steps(steps), settings.cache.gated_steps(steps)
        if settings.schedule == "sequential":
            return cls(gap=steps, forecast=forecast, gated=gated)
        sharing = frozenset(sharing_steps(steps)) - forecast
        return cls(settings.queue.left, settings.queue.left_level, settings.queue.gap, forecast, gated, sharing)

    def computed(self, step: int) -> int:
        """The last step up to this one that is computed."""
        while step in self.forecast:
            step -= 1
        return step

    def num_rounds(self, num_chunks: int, steps: int) -> int:
        return (num_chunks - 1) * self.gap + steps


def make_schedule(plan: Plan, settings: Settings) -> Iterator[Action]:
    """The schedule that the settings ask for."""
    make = sequential_schedule if settings.schedule == "sequential" else queue_schedule
    return make(plan.chunks, settings.sampler.steps, QueueRules.of(settings), plan.first_chunk)


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
        for i in range(newest, oldest - 1, -1):
            yield from queue.unit(i, n - gap * i)


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


@dataclass(frozen=True)
class _Queue:
    """The rules of the queue, one a method: what forward(i, k) reads and keeps, and who reads a value last."""

    chunks: Sequence[Chunk]
    steps: int
    rules: QueueRules
    first: int = 0

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
        shared = self.shared(i, k)
        forward = Forward(n, i, k, left, right, self.store(i, k), shared)
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
            yield DropLatents(n, left)
        if shared and self.is_last_reader(i, shared):
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
        source = self.chunks[i].shares
        if source is None or k not in self.rules.sharing:
            return None
        return KvVersion(source, self.rules.gap * source + k, "scene")

    def is_last_reader(self, i: int, shared: KvVersion) -> bool:
        end = self.chunks[shared.chunk].scene_end
        return end is not None and end.last_reader == i

    def store(self, i: int, k: int) -> tuple[KvVersion, ...]:
        """First edge: wanted by forward(i-1, k + gap), or the next that comes. Last: by forward(i+1, k), if cached.

        The end of a scene: by forward(j, k) of the chunks that share it.
        """
        n, first, kept = self.rules.gap * i + k, KvVersion(i, self.rules.gap * i + k), []
        if i > 0 and any(self.right(i - 1, reader) == first for reader in self.computed_after(k)):
            kept.append(first)
        if self.rules.left == "cached" and i + 1 < len(self.chunks) and self.chunks[i + 1].num_left:
            kept.append(KvVersion(i, n, "last"))
        if self.chunks[i].scene_end and k in self.rules.sharing:
            kept.append(KvVersion(i, n, "scene"))
        return tuple(kept)

    def drop_own(self, n: int, latents: LatentVersion) -> Iterator[Action]:
        if not self.neighbour_reads_last(latents):
            yield DropLatents(n, latents)

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
