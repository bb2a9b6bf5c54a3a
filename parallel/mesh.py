"""The mesh: a topology with this rank's place in it, its channels to others and its groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from longvid.parallel.collectives import Group, new_group
from longvid.parallel.comm import Comm, DistComm, LoneComm
from longvid.parallel.topology import Coordinate, Topology, talking_pairs

_ALONE = Group((0,), 0)


@dataclass(frozen=True)
class Mesh:
    """One rank's view. `ulysses` and `ring` are its groups on the two parts of the `seq` axis, `seq` on the whole.

    `owners` is the group of all owners of chunks, on each of them.
    """

    topology: Topology
    rank: int
    comm: Comm
    seq: Group
    ulysses: Group
    ring: Group
    owners: Group = _ALONE

    @property
    def place(self) -> Coordinate:
        return self.topology.coordinate(self.rank)

    @property
    def is_leader(self) -> bool:
        """Whether this rank owns the film; it is an owner, too."""
        return self.is_owner and self.place.chunk == 0

    @property
    def is_owner(self) -> bool:
        """Whether this rank owns solvers and guidance of some chunks."""
        return self.place.stage == self.place.guidance == self.place.seq == 0

    @property
    def is_first(self) -> bool:
        return self.place.stage == 0

    @property
    def is_last(self) -> bool:
        return self.place.stage == self.topology.stage - 1


def lone_mesh() -> Mesh:
    """The mesh of a single rank, without torch.distributed."""
    return Mesh(Topology(), 0, LoneComm(), _ALONE, _ALONE, _ALONE)


def make_mesh(
    topology: Topology,
    rank: int,
    device: torch.device,
    timeout: float,
    *,
    shares_memory: bool = True,
    pairs: Sequence[tuple[int, int]] | None = None,
) -> Mesh:
    """Build groups and channels; all ranks call it together, after `connect`. See `DistComm`.

    `pairs`: None for all that programs of this topology need.
    """
    if topology.num_ranks == 1:
        return lone_mesh()
    pairs = talking_pairs(topology) if pairs is None else pairs
    comm = DistComm(device, timeout, lambda other: describe(topology, other), shares_memory=shares_memory, pairs=pairs)

    def group(members: Sequence[int]) -> Group | None:
        return new_group(members, rank, device, timeout)

    seq = ulysses = ring = Group((rank,), 0)
    # Every rank must take part in making every group, in one order.
    for first in range(0, topology.num_ranks, topology.seq):
        members = range(first, first + topology.seq)
        seq = group(members) or seq
        if 1 in (topology.ulysses, topology.ring):
            continue
        # Neighbours exchange heads; rings go over them in strides.
        for start in range(first, first + topology.seq, topology.ulysses):
            ulysses = group(range(start, start + topology.ulysses)) or ulysses
        for offset in range(topology.ulysses):
            ring = group(range(first + offset, first + topology.seq, topology.ulysses)) or ring
    if topology.ring == 1:  # a group more would be memory of NCCL's more
        ulysses = seq
    elif topology.ulysses == 1:
        ring = seq
    owners = group(topology.group(0, "chunk")) or Group((rank,), 0)
    return Mesh(topology, rank, comm, seq, ulysses, ring, owners)


def describe(topology: Topology, rank: int) -> str:
    """A rank and its place, for people: `rank 3 (stage 1, guidance 1)`."""
    place = topology.coordinate(rank)
    parts = [f"{axis} {index}" for axis, index in place._asdict().items() if getattr(topology, axis) > 1]
    return f"rank {rank}" + (f" ({', '.join(parts)})" if parts else "")
