"""The units of the queue: what forward(i, k) reads and keeps, who reads a value last, and when it is dropped.

`schedule.queue_schedule` goes through the rounds and asks `Queue` for the actions of every shot in each; what a unit of
the queue reads is said at the top of `schedule.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby

from longvid.parallel.actions import (
    Action,
    Admit,
    DropGlobals,
    DropKv,
    DropLatents,
    Encode,
    Finish,
    Forecast,
    Forward,
    Gate,
    GlobalVersion,
    KvVersion,
    LatentVersion,
    Recall,
    Step,
)
from longvid.parallel.rules import QueueRules
from longvid.parallel.snapshot import LAG, is_remembered, oldest_in_flight, snapshot
from longvid.plan import Chunk


@dataclass(frozen=True)
class Queue:
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
