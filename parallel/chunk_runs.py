"""Runs: the chunks of a group that one place on the `chunk` axis owns, and the order in which it takes them.

A pure pass over a chunk schedule's Actions, before `pipeline.py` makes a program of them for the ranks of that place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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
from longvid.parallel.lending import NOTHING_LENT, Lending, place_of, worker_of
from longvid.parallel.rules import ChunkRules, rules_of
from longvid.parallel.topology import Topology
from longvid.plan import Plan
from longvid.settings import Settings


def owners_of(plan: Plan, settings: Settings, size: int) -> list[int]:
    """The place on a `chunk` axis of that size that has each chunk of a plan, whatever its schedule."""
    rules, num_chunks = rules_of(settings), len(plan.chunks)
    if not isinstance(rules, ChunkRules):
        return [0] * num_chunks
    return [place_of(i, group, size) for group in rules.groups(num_chunks) for i in group]


def readers_of(plan: Plan, settings: Settings, topology: Topology) -> Callable[[LatentVersion], set[int]]:
    """Who reads latents that live on across a round besides their owner, places on the `chunk` axis: whoever has them
    as left context, and whoever computes their chunk's next unit. Chunks are those of the plan.
    """
    rules, size, lending = rules_of(settings), topology.chunk, Lending.of(plan, settings, topology)
    if not isinstance(rules, ChunkRules):
        return lambda latents: {0}
    groups = rules.groups(len(plan.chunks))

    def group_of(chunk: int) -> range:
        return next(group for group in groups if chunk in group)

    def readers(latents: LatentVersion) -> set[int]:
        i, is_finished = latents.chunk + 1, latents.version == settings.sampler.steps
        chunks = [] if is_finished else [latents.chunk]
        if i < len(plan.chunks) and plan.chunks[i].num_left and is_finished == (i not in group_of(i - 1)):
            chunks.append(i)
        return {worker_of(chunk, latents.version, group_of(chunk), size, lending) for chunk in chunks}

    return readers


@dataclass
class Run:
    """The chunks of the group at hand that one place on the `chunk` axis owns."""

    place: int
    size: int
    lending: Lending = NOTHING_LENT
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

    def worker(self, chunk: int, step: int) -> int:
        """The place that computes a unit of a chunk of this group, or of the first one of the next."""
        is_here = chunk in self.group
        return worker_of(chunk, step, self.group, self.size, self.lending) if is_here else self.owner(chunk)

    def computes(self, unit: Forward) -> bool:
        return self.worker(unit.chunk, unit.step) == self.place

    def chunks_of(self, place: int) -> list[int]:
        """Those of the group at hand that a place has."""
        return [i for i in self.group if place_of(i, self.group, self.size) == place]


def last_in_the_middle(actions: Iterable[Action], run: Run) -> Iterator[Action]:
    """A chunk schedule in the order that one run takes it: its last chunk in the middle of every round.

    Forwards of a round need nothing of each other, and runs wait only for each other's ends: the last chunk for what
    the next run's first one predicts, and that for the last one's step. So either has half a round of time to come.
    A unit of the next run's first chunk that is computed here follows the last own one. Its owner comes to the step
    when the round ends, and has others to do until then.
    """
    for _, members in groupby(actions, key=lambda action: action.round):
        yield from _rearranged(list(members), run)


def _rearranged(actions: list[Action], run: Run) -> list[Action]:
    for action in actions:
        if isinstance(action, Admit):
            run.see(action)
    own = [i for i in run.group if run.has(i)]
    # Chunks finish in the order of the film.
    if not own or any(isinstance(action, Finish | Forecast) for action in actions):
        return actions
    units = [action for action in actions if isinstance(action, Forward)]
    lent = {unit.chunk for unit in units if run.has(unit.chunk) and not run.computes(unit)}
    others = [unit.chunk for unit in units if run.computes(unit) and unit.chunk < own[-1]]
    is_moved = len(others) >= 2
    early: list[Action] = []
    settling: list[Action] = []
    last: list[Action] = []
    rest: list[Action] = []
    for action in actions:
        match action:
            case Forward(chunk=i) | Fuse(chunk=i) | Step(chunk=i) | DropLatents(latents=LatentVersion(chunk=i)) if (
                i in lent
            ):
                last.append(action)
            case Forward(chunk=i) as unit if is_moved and i >= own[-1] and run.computes(unit):
                early.append(action)
            case Gate(forward=Forward(chunk=i)) if is_moved and i == own[-1]:
                early.append(action)
            case Fuse(chunk=i) | Step(chunk=i) | DropLatents(latents=LatentVersion(chunk=i)) if (
                is_moved and i == own[-1]
            ):
                settling.append(action)
            case _:
                rest.append(action)
    if not is_moved:
        return [*rest, *last]
    # Steps keep the order of the forwards, in which velocities come from other ranks.
    before = others[(len(others) + 1) // 2 - 1]
    forward = next(at for at, a in enumerate(rest) if isinstance(a, Forward) and a.chunk == before) + 1
    settled = next(at for at, a in enumerate(rest) if isinstance(a, DropLatents) and a.latents.chunk == before) + 1
    return [*rest[:forward], *early, *rest[forward:settled], *settling, *rest[settled:], *last]
