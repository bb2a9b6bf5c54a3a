"""The mesh of ranks as data: axes, coordinates, and the choice of a mesh for a film. Pure arithmetic.

Axes: `replica` (films) x `stage` (layers) x `chunk` (chunks at one step) x `guidance` (conditional, unconditional) x
`seq` (tokens: Ulysses x ring). The last axis varies fastest, so ranks that talk most are neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import NamedTuple

from longvid.errors import InputError
from longvid.parallel.rules import rules_of
from longvid.plan import ModelFacts
from longvid.settings import MeshSettings, Settings

LONG_FILM = 64
"""Chunks of the film that a mesh is chosen for, before a storyboard is known."""
AXES = ("replica", "stage", "chunk", "guidance", "seq")


class Coordinate(NamedTuple):
    """Where a rank stands on every axis."""

    replica: int
    stage: int
    chunk: int
    guidance: int
    seq: int


@dataclass(frozen=True)
class Topology:
    """Ranks an axis. `ring` divides `seq`: the rest of it is Ulysses."""

    replica: int = 1
    stage: int = 1
    chunk: int = 1
    guidance: int = 1
    seq: int = 1
    ring: int = 1

    def __post_init__(self) -> None:
        assert min(getattr(self, field.name) for field in fields(self)) >= 1
        assert self.seq % self.ring == 0

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def num_ranks(self) -> int:
        return math.prod(self.sizes)

    @property
    def ulysses(self) -> int:
        return self.seq // self.ring

    def coordinate(self, rank: int) -> Coordinate:
        """The place of a rank, 0 <= rank < num_ranks."""
        assert 0 <= rank < self.num_ranks
        place = []
        for size in reversed(self.sizes):
            rank, index = divmod(rank, size)
            place.append(index)
        return Coordinate(*reversed(place))

    def rank(self, place: Coordinate) -> int:
        """The rank at a place: the inverse of `coordinate`."""
        rank = 0
        for size, index in zip(self.sizes, place, strict=True):
            assert 0 <= index < size
            rank = rank * size + index
        return rank

    def group(self, rank: int, axis: str) -> tuple[int, ...]:
        """The ranks that differ from this one in no other axis, in the order of that axis; itself included."""
        place = self.coordinate(rank)
        return tuple(self.rank(place._replace(**{axis: index})) for index in range(getattr(self, axis)))

    def __str__(self) -> str:
        parts = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, self.sizes, strict=True))
        return f"{parts} = {self.num_ranks} ranks"


def talking_pairs(topology: Topology) -> list[tuple[int, int]]:
    """The pairs of ranks (from, to) of which one may send the other a tensor that is on its device, in order."""
    return sorted({(rank, to) for rank in range(topology.num_ranks) for to in _listeners(topology, rank) if to != rank})


def _listeners(topology: Topology, rank: int) -> Iterator[int]:
    """Those that a rank may send tensors to."""
    place = topology.coordinate(rank)
    owner = place._replace(stage=0, guidance=0, seq=0)
    if place.stage + 1 < topology.stage:
        yield topology.rank(place._replace(stage=place.stage + 1))  # hidden states
    elif place.seq == 0:
        owners = (place.chunk, max(place.chunk - 1, 0))  # velocities of own chunks, and of what these see on the left
        yield from (topology.rank(owner._replace(chunk=chunk)) for chunk in owners)
    if place.stage:
        return
    yield from topology.group(rank, "chunk")  # what global tokens see; between owners finished latents, too
    if place == owner:  # latents; a group's first chunk may be seen by the places of any other
        axes = (range(topology.chunk), range(topology.guidance), range(topology.seq))
        yield from (topology.rank(Coordinate(place.replica, 0, *others)) for others in product(*axes))
    if rank == 0:
        yield from topology.group(rank, "stage")  # latents to decode


@dataclass(frozen=True)
class Workload:
    """What the choice of a mesh depends on: the film's units, how many run at once, and what can be split."""

    num_units: int
    in_flight: int
    num_layers: int
    num_heads: int
    branches: int
    splits_tokens: bool = True
    at_one_step: int = 1
    """Chunks that ranks of the `chunk` axis can share."""


def workload(settings: Settings, facts: ModelFacts) -> Workload:
    """What a long film with these settings asks of a mesh."""
    steps = settings.sampler.steps
    in_flight = rules_of(settings).in_flight(steps)
    at_one_step = in_flight if settings.schedule == "chunks" else 1
    branches, heads = settings.sampler.num_branches, facts.num_heads
    splits_tokens = settings.cache.splits_tokens
    return Workload(LONG_FILM * steps, in_flight, facts.num_layers, heads, branches, splits_tokens, at_one_step)


def fitting_meshes(num_ranks: int, mesh: MeshSettings, work: Workload) -> list[Topology]:
    """Every mesh for so many ranks that the settings leave open, with the ring that they say.

    Raises InputError, with the equation, where axes and ranks do not fit each other, the model or the film.
    """
    fixed = {axis: size for axis in AXES if isinstance(size := getattr(mesh, axis), int)}
    if all(axis in fixed for axis in AXES):
        topology = Topology(**fixed)
        if topology.num_ranks != num_ranks:
            raise InputError(f"mesh: {topology}, but {num_ranks} {'was' if num_ranks == 1 else 'were'} started")
    fits, reasons = [], []
    for topology in _topologies(num_ranks, fixed):
        topology, reason = _with_ring(topology, mesh.ring, work)
        if reason:
            reasons.append(reason)
        else:
            fits.append(topology)
    if not fits:
        product = " x ".join(f"{axis} {fixed.get(axis, 'auto')}" for axis in AXES)
        why = reasons[0] if reasons else f"no whole numbers solve {product} = {num_ranks} ranks"
        raise InputError(f"mesh: {why}")
    return fits


def choose_by_shape(meshes: Sequence[Topology], work: Workload) -> Topology:
    """The best of some meshes where no more is known of the model than its workload."""
    return min(meshes, key=lambda topology: (predicted_time(topology, work), topology.seq, topology.guidance))


def all_meshes(num_ranks: int, mesh: MeshSettings, work: Workload) -> Iterator[tuple[Topology, str | None]]:
    """Every mesh that the settings leave open, with every ring where `mesh.ring` is 1, and what rules it out.

    Where no chunks are at one step, there is no `chunk` axis to choose.
    """
    fixed = {axis: size for axis in AXES if isinstance(size := getattr(mesh, axis), int)}
    if work.at_one_step == 1:
        fixed.setdefault("chunk", 1)
    for topology in _topologies(num_ranks, fixed):
        rings = range(1, topology.seq + 1) if mesh.ring == 1 else [mesh.ring]
        for ring in rings:
            if mesh.ring > 1 or topology.seq % ring == 0:
                yield _with_ring(topology, ring, work)


def predicted_time(topology: Topology, work: Workload) -> float:
    """Time of a film in units of the whole model, for comparing meshes.

    A pipeline of N stages adds N^2 - 1 slots of 1/N unit (see `rehearsal`), and can use no more
    stages than there are units in flight; splitting tokens is taken to cost a tenth at every doubling.
    """
    stages = topology.stage
    # Of a group the largest run counts.
    run = -(-work.at_one_step // topology.chunk) / work.at_one_step
    per_unit = max(1 / stages, 1 / work.in_flight) / topology.guidance * work.branches * run
    fill = stages**2 - 1
    split: float = 0.9 ** math.log2(topology.seq) * topology.seq
    return (work.num_units + fill) * per_unit / split


def _topologies(num_ranks: int, fixed: dict[str, int]) -> Iterator[Topology]:
    """Every way to spread the ranks over the axes. Auto leaves `replica` at 1."""
    fixed = {"replica": 1, **fixed}
    free = [axis for axis in AXES if axis not in fixed]
    rest, remainder = divmod(num_ranks, math.prod(fixed.values()))
    if remainder or rest < 1 or (not free and rest != 1):
        return
    for sizes in _factorisations(rest, len(free)):
        yield Topology(**fixed, **dict(zip(free, sizes, strict=True)))


def _factorisations(product: int, count: int) -> Iterator[tuple[int, ...]]:
    if count == 0:
        yield ()
    elif count == 1:
        yield (product,)
    else:
        for first in (size for size in range(1, product + 1) if product % size == 0):
            for rest in _factorisations(product // first, count - 1):
                yield (first, *rest)


def _with_ring(topology: Topology, ring: int, work: Workload) -> tuple[Topology, str | None]:
    """The topology with its ring, and what is wrong with it, if anything."""
    if topology.replica > 1:
        return topology, f"replica {topology.replica}: a render is one film, so replica is 1"
    if topology.chunk > 1 and work.at_one_step == 1:
        return topology, f"chunk {topology.chunk}: one chunk is at a step (schedule, chunks.group), so chunk is 1"
    if topology.chunk > work.at_one_step:
        return topology, f"chunk {topology.chunk}: a group has {work.at_one_step} chunks, one a rank (chunks.group)"
    if topology.stage > work.num_layers:
        return topology, f"stage {topology.stage}: the model has {work.num_layers} layers, one a stage at least"
    if topology.guidance > work.branches:
        branches = "one branch without guidance" if work.branches == 1 else f"{work.branches} branches"
        return topology, f"guidance {topology.guidance}: there is only {branches} (sampler.guidance)"
    if topology.seq > 1 and not work.splits_tokens:
        return topology, f"seq {topology.seq}: with this cache.policy tokens stay on one rank, so seq is 1"
    if topology.seq % ring:
        return topology, f"seq {topology.seq} is not a multiple of ring {ring}"
    topology = replace(topology, ring=ring)
    if work.num_heads % topology.ulysses:
        equation = f"seq {topology.seq} / ring {ring} = {topology.ulysses}"
        return topology, f"{equation} does not divide the model's {work.num_heads} heads: raise mesh.ring"
    return topology, None
