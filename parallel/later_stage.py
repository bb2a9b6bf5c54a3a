"""The program of a rank behind stage 0: receive hidden states, run some layers, send what they make.

`pipeline.rank_program` chooses it. Only K/V live here; solvers, guidance and latents are at stage 0 (`first_stage.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from longvid.parallel.actions import Admit, DropKv, Forward
from longvid.parallel.chunk_runs import Run
from longvid.parallel.decoding import DecodeAction
from longvid.parallel.decoding_roles import DecodePart
from longvid.parallel.rank_actions import Boundary, Hidden, Overlap, RankAction, Receive, Send, Velocity
from longvid.parallel.round_ends import Notices, RoundEnd, StreamAction
from longvid.parallel.topology import Coordinate, Topology


def later_stage(  # noqa: C901 - one match over all actions
    stream: Iterable[StreamAction], topology: Topology, place: Coordinate, decoding: DecodePart | None
) -> Iterator[RankAction]:
    """Receive, forward, send: only K/V live here."""
    run = Run(place.chunk, topology.chunk)
    notices = Notices(topology, place)
    is_last, stage = place.stage + 1 == topology.stage, place.stage
    before, rank_after = topology.rank(place._replace(stage=stage - 1)), topology.rank(place._replace(stage=0))
    if not is_last:
        rank_after = topology.rank(place._replace(stage=stage + 1))
    owner = Coordinate(place.replica, 0, place.chunk, 0, 0)
    passed: list[Boundary] = []
    for action in stream:
        if isinstance(action, DecodeAction):
            yield from (own for _, own in decoding.of(action)) if decoding else ()
            continue
        yield from notices.before(action)
        match action:
            case RoundEnd(round=n, kv=kv) if place.chunk:
                yield Boundary(n, kv)
            case RoundEnd(round=n, kv=kv):
                passed.append(Boundary(n, kv))
            case Admit():
                run.see(action)
            case Forward(round=n, chunk=i, step=k) if run.has(i):
                yield Receive(n, Hidden.of(action, stage - 1), before)
                # Not before that message, which says whether to save: rounds of forecasts alone bring none.
                yield from passed
                passed.clear()
                yield action
                if not is_last:
                    yield Send(n, Hidden.of(action, stage), rank_after)
                elif place.seq == 0:
                    if action.overlap:
                        before_it = topology.rank(owner._replace(chunk=run.owner(i - 1)))
                        yield Send(n, Overlap(i, k, place.guidance), before_it)
                    yield Send(n, Velocity(i, k, place.guidance), topology.rank(owner))
            case DropKv():
                yield action
    yield from notices.end()
