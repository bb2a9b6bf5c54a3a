"""Units that the place before computes for a chunk's owner, for chunks come in whole numbers and work should be even.

Solver and latents stay with the owner, who sends a chunk's latents before such a unit and gets its velocity. Only the
first chunk of a run is lent, in as many rounds as even things out.
"""

from __future__ import annotations

from dataclasses import dataclass

from longvid.parallel.topology import Topology
from longvid.plan import Plan
from longvid.settings import Settings

FEWEST = 2
"""Chunks of a run: while its first is lent, the owner has others to do."""


def place_of(chunk: int, group: range, size: int) -> int:
    """The place on a `chunk` axis of that size which owns a chunk of a group: contiguous runs, as even as can be.

    Later runs have one more where they are not equal: the last chunk is often short, and the leader has more to do.
    """
    index = chunk - group.start
    return index if len(group) < size else ((index + 1) * size - 1) // len(group)


@dataclass(frozen=True)
class Lending:
    """Which units are lent: of the chunks, whose units take `works` in any measure, some in these `steps`."""

    works: tuple[int, ...] = ()
    steps: frozenset[int] = frozenset()

    @classmethod
    def of(cls, plan: Plan, settings: Settings, topology: Topology) -> Lending:
        """Nothing is lent where a unit is more than one rank's, where ranks remember something of a chunk's units, and
        where all wait for each other in every round anyway, since they exchange what global tokens see.
        """
        is_alone = topology.stage == topology.guidance == topology.seq == len(plan.films) == 1
        remembers = settings.attention.policy != "dense" or settings.cache.policy != "none"
        is_left_out = settings.cache.negative_every > 1 or settings.vin.policy == "on"
        if settings.schedule != "chunks" or not is_alone or remembers or is_left_out:
            return cls()
        works = tuple(chunk.num_left + chunk.num_latents for chunk in plan.chunks)
        return cls(works, frozenset(range(settings.sampler.steps - 1)))

    def is_lent(self, chunk: int, step: int, group: range, size: int) -> bool:
        """Whether the place before the owner's computes a unit of a group's chunk."""
        place = place_of(chunk, group, size)
        begins_run = place > 0 and place_of(chunk - 1, group, size) < place
        if step not in self.steps or not begins_run or len(group) < FEWEST * size:
            return False
        before, of_group = (sum(self.works[i] for i in span) for span in (range(group.start, chunk), group))
        share = min(1.0, max(0.0, (of_group * place / size - before) / self.works[chunk]))
        return int((step + 1) * share + 0.5) > int(step * share + 0.5)


NOTHING_LENT = Lending()


def worker_of(chunk: int, step: int, group: range, size: int, lending: Lending) -> int:
    """The place that computes a unit."""
    return place_of(chunk, group, size) - lending.is_lent(chunk, step, group, size)
