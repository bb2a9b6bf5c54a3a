"""From one schedule to a program for every rank: sends and receives put in by a pure pass over the Actions.

The layers are split over stages. The rank at stage 0 (conditional branch, first part of the tokens) is the *leader*: it
alone owns solvers and guidance, and hands out finished chunks. The other ranks of stage 0 hold latents too, which
the leader sends them after every step.

    leader         admit  forward(c1 k0) >hidden           forward(c0 k1) >hidden   <velocity(c1 k0)  step(c1 k0) ...
    stage 1               <hidden  forward(c1 k0) >velocity        <hidden  forward(c0 k1) >velocity ...

Where chunks at one step are spread over the `chunk` axis, each place on it has a run of every group, and a rank that is
its *owner*, with solvers and guidance of these chunks. The leader is the first owner. After a step an owner sends what
the next run's first chunk sees of its last one, and gets what that predicts for it. Finished chunks go to the leader.

On stage 0, what follows a forward (its step and all that comes of it) is put off until a value that it makes is
read, or until the round after next begins. So the first stage runs ahead of the others by as many units as there are
in flight, and no program waits for what it could do without. Programs are streams, like the schedule itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from longvid.parallel.actions import Action
from longvid.parallel.chunk_runs import Run, last_in_the_middle
from longvid.parallel.decoding_roles import LEADER_DECODES, DecodingOwners, DecodingParts
from longvid.parallel.first_stage import FirstStage
from longvid.parallel.later_stage import later_stage
from longvid.parallel.lending import NOTHING_LENT, Lending
from longvid.parallel.rank_actions import RankAction
from longvid.parallel.round_ends import StreamAction, with_ends
from longvid.parallel.topology import Topology

SAVE_NOTICE = 3
"""Rounds from the leader's decision to save until every rank is sure to have heard of it: see `Boundary`."""


def rank_program(
    actions: Iterable[Action],
    topology: Topology,
    rank: int,
    decoding: DecodingParts | None = None,
    owners: DecodingOwners = LEADER_DECODES,
    lending: Lending = NOTHING_LENT,
) -> Iterator[RankAction]:
    """What one rank does for a schedule. For a single rank it is the schedule, with boundaries.

    Where all ranks leave out the actions of all rounds up to one, what is left goes on from the state after that round.
    With `decoding` stages decode what finishes, and the leader shows it; else it hands out latents, and `owners` says
    who decodes with it. With `lending` ranks compute some units for the owners of other chunks.
    """
    place = topology.coordinate(rank)
    if topology.chunk > 1:
        actions = last_in_the_middle(actions, Run(place.chunk, topology.chunk, lending))
    stream: Iterable[StreamAction] = with_ends(actions)
    part = None
    if decoding and decoding.takes_part(place):
        stream, part = decoding.plan.spread(stream), decoding.part(topology, place)
    if place.stage == 0:
        return FirstStage(topology, place, part, owners, lending).program(stream)
    return later_stage(stream, topology, place, part)
