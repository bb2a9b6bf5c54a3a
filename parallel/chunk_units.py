"""The units of chunks side by side: a group of them at one step, what each reads, and what is fused and dropped.

`schedule.chunk_schedule` deals the film out to groups and asks each `ChunkGroup` for the actions of its rounds. A group
hands on to the next the finished latents that it reads as left context, and those that global tokens are made of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

from longvid.parallel.actions import (
    Action,
    Admit,
    DropGlobals,
    DropLatents,
    Encode,
    Finish,
    Forecast,
    Forward,
    Fuse,
    Gate,
    GlobalVersion,
    LatentVersion,
    OverlapVersion,
    Step,
)
from longvid.parallel.rules import ChunkRules
from longvid.parallel.snapshot import is_remembered
from longvid.plan import Chunk


@dataclass(frozen=True)
class ChunkGroup:
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
