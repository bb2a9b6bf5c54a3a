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

forward(i, k) reads its own z[i]@k; as left context the last latents of z[i-1]; and as right context the K/V that
forward(i+1, k-1) stored just before, in the same round.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from longvid.plan import Chunk, Plan
from longvid.settings import Settings

LeftLevel = Literal["same", "fresher"]


@dataclass(frozen=True, slots=True)
class LatentVersion:
    """A chunk's own latents after `version` steps: noise at 0, finished when it equals the number of steps."""

    chunk: int
    version: int

    def __str__(self) -> str:
        return f"z{self.chunk}@{self.version}"


@dataclass(frozen=True, slots=True)
class KvVersion:
    """K/V of every layer for a chunk's first own latents, as its forward of `round` computed them."""

    chunk: int
    round: int

    def __str__(self) -> str:
        return f"kv{self.chunk}@{self.round}"


@dataclass(frozen=True, slots=True)
class Admit:
    """Draw z[chunk]@0 and begin a solver history."""

    round: int
    chunk: int

    def __str__(self) -> str:
        return f"{self.round:5}  admit    c{self.chunk}"


@dataclass(frozen=True, slots=True)
class Forward:
    """Predict the velocity at z[chunk]@step, with context `left` and `right`; keep K/V as `store`."""

    round: int
    chunk: int
    step: int
    left: LatentVersion | None = None
    right: KvVersion | None = None
    store: KvVersion | None = None

    def __str__(self) -> str:
        context = "".join(f"  {name} {value}" for name in ("left", "right", "store") if (value := getattr(self, name)))
        return f"{self.round:5}  forward  c{self.chunk} k{self.step}{context}"


@dataclass(frozen=True, slots=True)
class Step:
    """Make z[chunk]@step+1 of z[chunk]@step and the velocity of that step's forward, which is used up."""

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


Action = Admit | Forward | Step | Finish | DropLatents | DropKv


def make_schedule(plan: Plan, settings: Settings) -> Iterator[Action]:
    """The schedule that the settings ask for."""
    if settings.schedule == "sequential":
        return sequential_schedule(plan.chunks, settings.sampler.steps)
    return queue_schedule(plan.chunks, settings.sampler.steps, settings.queue.left_level)


def queue_schedule(chunks: Sequence[Chunk], steps: int, left_level: LeftLevel) -> Iterator[Action]:
    """The queue, in len(chunks) + steps - 1 rounds. Chunks of different shots follow each other without a gap.

    `left_level` is how far denoised forward(i, k) sees its left context: "same" reads z[i-1]@k, "fresher" z[i-1]@k+1.
    """
    queue = _Queue(chunks, steps, left_level)
    for n in range(len(chunks) + steps - 1):
        newest, oldest = min(n, len(chunks) - 1), max(n - steps + 1, 0)
        for i in range(newest, oldest - 1, -1):
            yield from queue.unit(i, n - i)


def sequential_schedule(chunks: Sequence[Chunk], steps: int) -> Iterator[Action]:
    """One chunk after the other, each for all its steps: the oracle for short clips. No chunk may have context."""
    for i, chunk in enumerate(chunks):
        assert chunk.num_left == chunk.num_right == 0, "a sequential chunk is a whole shot"
        n = i * steps
        yield Admit(n, i)
        for k in range(steps):
            yield Forward(n + k, i, k)
            yield Step(n + k, i, k)
            yield DropLatents(n + k, LatentVersion(i, k))
        yield Finish(n + steps - 1, LatentVersion(i, steps))
        yield DropLatents(n + steps - 1, LatentVersion(i, steps))


@dataclass(frozen=True)
class _Queue:
    """The rules of the queue, one a method: what forward(i, k) reads and keeps, and who reads a value last."""

    chunks: Sequence[Chunk]
    steps: int
    left_level: LeftLevel

    def unit(self, i: int, k: int) -> Iterator[Action]:
        """The actions of one unit. Every value is dropped right after its last reader."""
        n, left, right = i + k, self.left(i, k), self.right(i, k)
        if k == 0:
            yield Admit(n, i)
        yield Forward(n, i, k, left, right, self.store(i, k))
        if right:
            yield DropKv(n, right)
        if left and self.neighbour_reads_last(left):
            yield DropLatents(n, left)
        yield Step(n, i, k)
        yield from self.drop_own(n, LatentVersion(i, k))
        if k + 1 == self.steps:
            yield Finish(n, LatentVersion(i, self.steps))
            yield from self.drop_own(n, LatentVersion(i, self.steps))

    def left(self, i: int, k: int) -> LatentVersion | None:
        """Chunk i-1 is one step ahead: take it as it is ("fresher"), or as it was a round ago ("same")."""
        if not self.chunks[i].num_left:
            return None
        return LatentVersion(i - 1, k + 1 if self.left_level == "fresher" else k)

    def right(self, i: int, k: int) -> KvVersion | None:
        """Chunk i+1 is one step behind and ran just before in this round; at k = 0 it has not entered yet."""
        return KvVersion(i + 1, i + k) if self.chunks[i].num_right and k > 0 else None

    def store(self, i: int, k: int) -> KvVersion | None:
        """Wanted by forward(i-1, k+1), unless chunk i-1 finished in the round before."""
        wanted = i > 0 and self.chunks[i - 1].num_right and k + 1 < self.steps
        return KvVersion(i, i + k) if wanted else None

    def drop_own(self, n: int, latents: LatentVersion) -> Iterator[Action]:
        if not self.neighbour_reads_last(latents):
            yield DropLatents(n, latents)

    def neighbour_reads_last(self, latents: LatentVersion) -> bool:
        """Whether chunk i+1 reads z[i]@v as left context after chunk i itself is done with it.

        Chunk i steps on from z[i]@v in round i + v. Chunk i+1 reads it one round later as "same" (v < steps),
        and earlier in that very round as "fresher" (v > 0). But z[i]@steps is handed out in the round before
        chunk i+1 reads it as "fresher".
        """
        i, v = latents.chunk, latents.version
        if i + 1 == len(self.chunks) or not self.chunks[i + 1].num_left:
            return False
        return v == self.steps if self.left_level == "fresher" else v < self.steps
