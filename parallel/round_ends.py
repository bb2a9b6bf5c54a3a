"""Ends of rounds in a stream of Actions, and what lives on across them; and what the leader says as a round begins.

Programs of all stages (`first_stage.py`, `later_stage.py`) make of an end a `Boundary`, where a run may be saved, and
of the leader's word a `Notice`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from longvid.parallel.actions import (
    Action,
    Admit,
    DropKv,
    DropLatents,
    Encode,
    Forward,
    KvVersion,
    LatentVersion,
    Recall,
    Step,
)
from longvid.parallel.decoding import DecodeAction
from longvid.parallel.rank_actions import Notice, RankAction, Receive, Send
from longvid.parallel.topology import Coordinate, Topology


@dataclass(frozen=True)
class RoundEnd:
    """The end of a round that another follows, and what lives on across it, by the schedule."""

    round: int
    latents: tuple[LatentVersion, ...]
    kv: tuple[KvVersion, ...]


StreamAction = Action | RoundEnd | DecodeAction


def with_ends(actions: Iterable[Action]) -> Iterator[Action | RoundEnd]:
    """The actions, with ends between the rounds."""
    latents: dict[LatentVersion, None] = {}
    kv: dict[KvVersion, None] = {}
    current: int | None = None
    for action in actions:
        if current is not None and action.round != current:
            yield RoundEnd(current, tuple(latents), tuple(kv))
        current = action.round
        match action:
            case Admit(chunk=i):
                latents[LatentVersion(i, 0)] = None
            case Recall(latents=recalled):
                latents[recalled] = None
            case Forward(store=store):
                kv |= dict.fromkeys(store)
            case Step(chunk=i, step=k):
                latents[LatentVersion(i, k + 1)] = None
            case DropLatents(latents=dropped):
                del latents[dropped]
            case DropKv(kv=gone):
                del kv[gone]
        yield action


@dataclass
class Notices:
    """The leader's word at the beginning of every round, to the ranks of other chunks, who have it by its end."""

    topology: Topology
    place: Coordinate
    told: int = -1
    round: int = -1

    def __post_init__(self) -> None:
        is_leader = not any((self.place.stage, self.place.chunk, self.place.guidance, self.place.seq))
        ranks = range(self.topology.num_ranks) if is_leader else ()
        self.targets = [rank for rank in ranks if self.topology.coordinate(rank).chunk]

    def before(self, action: Action | RoundEnd) -> Iterator[RankAction]:
        """What goes before an action."""
        self.round = action.round
        if self.place.chunk:
            if isinstance(action, RoundEnd):
                yield from self.end()
        elif self.told < action.round and not isinstance(action, Admit | Encode | RoundEnd):
            self.told = action.round
            yield from (Send(action.round, Notice(action.round), to) for to in self.targets)

    def end(self) -> Iterator[RankAction]:
        """Receive what is still under way."""
        if self.place.chunk and self.told < self.round:
            self.told = self.round
            yield Receive(self.round, Notice(self.round), 0)
