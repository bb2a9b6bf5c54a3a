"""Runs: the chunks of a group that one place on the `chunk` axis owns, and the order in which it takes them.

A pure pass over a chunk schedule's Actions, before `pipeline.py` makes a program of them for the ranks of that place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby

from longvid.parallel.actions import (
    Action,
    Admit,
    DropLatents,
    Finish,
    Forecast,
    Forward,
    Fuse,
    Gate,
    LatentVersion,
    Step,
)
from longvid.parallel.rules import ChunkRules, rules_of
from longvid.plan import Plan
from longvid.settings import Settings


def place_of(chunk: int, group: range, size: int) -> int:
    """The place on a `chunk` axis of that size which owns a chunk of a group: contiguous runs, as even as can be.

    Later runs have one more where they are not equal: the last chunk is often short, and the leader has more to do.
    """
    index = chunk - group.start
    return index if len(group) < size else ((index + 1) * size - 1) // len(group)


def owners_of(plan: Plan, settings: Settings, size: int) -> list[int]:
    """The place on a `chunk` axis of that size that has each chunk of a plan, whatever its schedule."""
    rules, num_chunks = rules_of(settings), len(plan.chunks)
    if not isinstance(rules, ChunkRules):
        return [0] * num_chunks
    return [place_of(i, group, size) for group in rules.groups(num_chunks) for i in group]


@dataclass
class Run:
    """The chunks of the group at hand that one place on the `chunk` axis owns."""

    place: int
    size: int
    group: range = range(0)
    past: list[range] = field(default_factory=list)

    def see(self, action: Admit) -> None:
        if action.group is not None and action.group != self.group:
            self.past.append(self.group)
            self.group = action.group

    def owner(self, chunk: int) -> int:
        """The place of a chunk of this group, or of an earlier one, or of the first one of the next."""
        group = next((group for group in (self.group, *reversed(self.past)) if chunk in group), None)
        return place_of(chunk, group, self.size) if group else 0

    def has(self, chunk: int) -> bool:
        return self.owner(chunk) == self.place

    def chunks_of(self, place: int) -> list[int]:
        """Those of the group at hand that a place has."""
        return [i for i in self.group if place_of(i, self.group, self.size) == place]


def last_in_the_middle(actions: Iterable[Action], run: Run) -> Iterator[Action]:
    """A chunk schedule in the order that one run takes it: its last chunk in the middle of every round.

    Forwards of a round need nothing of each other, and runs wait only for each other's ends: the last chunk for what
    the next run's first one predicts, and that for the last one's step. So either has half a round of time to come.
    """
    for _, members in groupby(actions, key=lambda action: action.round):
        yield from _rearranged(list(members), run)


def _rearranged(actions: list[Action], run: Run) -> list[Action]:
    for action in actions:
        if isinstance(action, Admit):
            run.see(action)
    own = [i for i in run.group if run.has(i)]
    # Chunks finish in the order of the film.
    if len(own) < 3 or any(isinstance(action, Finish | Forecast) for action in actions):
        return actions
    last, before = own[-1], own[len(own) // 2 - 1]
    early: list[Action] = []
    settling: list[Action] = []
    rest: list[Action] = []
    for action in actions:
        match action:
            case Forward(chunk=i) | Gate(forward=Forward(chunk=i)) if i == last:
                early.append(action)
            case Fuse(chunk=i) | Step(chunk=i) | DropLatents(latents=LatentVersion(chunk=i)) if i == last:
                settling.append(action)
            case _:
                rest.append(action)
    # Steps keep the order of the forwards, in which velocities come from other ranks.
    forward = next(at for at, a in enumerate(rest) if isinstance(a, Forward) and a.chunk == before) + 1
    settled = next(at for at, a in enumerate(rest) if isinstance(a, DropLatents) and a.latents.chunk == before) + 1
    return [*rest[:forward], *early, *rest[forward:settled], *settling, *rest[settled:]]
