"""Run the programs of all ranks as data: a proof that none waits for ever, and a prediction of how long they take.

Every rank does one thing after the other, and every pair of ranks is joined by channels of bounded capacity that keep
their order. What such a network computes does not depend on who is faster (Kahn, "The semantics of a simple language
for parallel programming", 1974): one rehearsal that comes to its end proves that every run does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

from longvid.parallel.actions import Action, Finish, Forward, Gate
from longvid.parallel.decoding import Decode, Piece
from longvid.parallel.decoding_roles import LEADER_DECODES, DecodingOwners, DecodingParts
from longvid.parallel.findings import ScheduleError
from longvid.parallel.lending import NOTHING_LENT, Lending
from longvid.parallel.partition import Costs
from longvid.parallel.pipeline import rank_program
from longvid.parallel.rank_actions import BULKY, Message, RankAction, Receive, Send
from longvid.parallel.topology import Topology

Cost = Callable[[int, RankAction], float]
"""Seconds that a rank needs for an action; of a message, to make or to take it."""


@dataclass(frozen=True)
class Rehearsal:
    """What a run takes, by prediction: seconds of each rank's work, and until each is done."""

    busy: tuple[float, ...]
    end: tuple[float, ...]

    @property
    def makespan(self) -> float:
        return max(self.end)

    @property
    def bubble(self) -> float:
        """The share of the ranks' time in which they have nothing to do."""
        return 1 - sum(self.busy) / (len(self.busy) * self.makespan) if self.makespan else 0.0


def nothing(rank: int, action: RankAction) -> float:
    """The cost of everything, when only order matters."""
    return 0.0


def rehearse(
    programs: Sequence[Iterable[RankAction]],
    capacity: int,
    cost: Cost = nothing,
    latency: Callable[[Message], float] = lambda message: 0.0,
    together: Sequence[tuple[int, ...]] = (),
) -> Rehearsal:
    """Carry out all programs, with `capacity` bulky messages under way from one rank to another.

    A message counts until its receiver comes to it; real receives are posted earlier, which can only help. Velocities
    and latents are small, and bounded by how long programs put steps off: they never hold their sender up. The
    ranks of each tuple in `together` exchange tokens inside forwards, so none goes through one before all have come
    to it. Raises ScheduleError for ranks that wait for each other, a message that is not the one expected, and one
    left over.
    """
    channels: dict[tuple[int, int], _Channel] = {}
    ranks = [_Rank(rank, iter(program), channels, capacity) for rank, program in enumerate(programs)]
    for members in together:
        for member in members:
            ranks[member].fellows = [ranks[other] for other in members]
    ready = deque(ranks)
    while ready:
        rank = ready.popleft()
        woken = rank.run_until_it_waits(cost, latency)
        ready.extend(ranks[other] for other in woken)
    waiting = [f"rank {rank.index}: {str(rank.waits_at).strip()}" for rank in ranks if rank.waits_at is not None]
    if waiting:
        raise ScheduleError(f"a deadlock with {capacity} buffers: {'; '.join(waiting)}")
    for (source, to), channel in channels.items():
        if channel.messages:
            raise ScheduleError(f"rank {source} sends {channel.messages[0][0]} to rank {to}, which never receives it")
    return Rehearsal(tuple(rank.busy for rank in ranks), tuple(rank.clock for rank in ranks))


def rehearse_schedule(
    make_actions: Callable[[], Iterable[Action]],
    topology: Topology,
    buffers: int,
    cost: Cost = nothing,
    decoding: DecodingParts | None = None,
    owners: DecodingOwners = LEADER_DECODES,
    lending: Lending = NOTHING_LENT,
) -> Rehearsal:
    """Rehearse a schedule on a mesh. `make_actions` gives the schedule anew for every rank: it is a stream."""
    ranks = range(topology.num_ranks)
    programs = [rank_program(make_actions(), topology, rank, decoding, owners, lending) for rank in ranks]
    groups = {topology.group(rank, "seq") for rank in range(topology.num_ranks)} if topology.seq > 1 else ()
    return rehearse(programs, buffers, cost, together=sorted(groups))


def stage_costs(
    costs: Costs,
    topology: Topology,
    bounds: Sequence[range],
    steps: int,
    share: Callable[[int, int], float] = lambda layer, step: 1.0,
    chunk_work: float | None = None,
    work: Callable[[Piece], float] = lambda piece: piece.stop - piece.first,
) -> Cost:
    """What actions cost by measurement: forwards a stage, and decoding.

    `share` says how much of a layer is computed at a step. Where stages decode, `chunk_work` is that of a chunk whose
    decoding was measured, and `work` that of a piece; None: the leader decodes where it hands out a chunk.
    """

    @cache
    def forward(stage: int, step: int) -> float:
        layers = tuple(cost * share(layer, step) for layer, cost in enumerate(costs.layers))
        return replace(costs, layers=layers, decode=0.0).of_stages(bounds)[stage]

    def cost(rank: int, action: RankAction) -> float:
        match action:
            case Forward(step=step):
                return forward(topology.coordinate(rank).stage, step)
            case Finish() if rank == 0 and chunk_work is None:
                return costs.decode * steps
            case Decode(piece=piece) if chunk_work:
                return costs.decode * steps * work(piece) / chunk_work
        return 0.0

    return cost


@dataclass
class _Channel:
    """Messages under way, each with its time of arrival; of bulky ones how many, and when those before were taken."""

    messages: deque[tuple[Message, float]] = field(default_factory=deque)
    taken: deque[float] = field(default_factory=deque)
    num_sent: int = 0
    num_taken: int = 0


@dataclass
class _Rank:
    index: int
    program: Iterator[RankAction]
    channels: dict[tuple[int, int], _Channel]
    capacity: int
    clock: float = 0.0
    busy: float = 0.0
    waits_at: RankAction | None = None
    fellows: list[_Rank] = field(default_factory=list)
    is_past: bool = False
    """Whether all its fellows have come to the forward at which it waits."""

    def run_until_it_waits(self, cost: Cost, latency: Callable[[Message], float]) -> set[int]:
        """Go on as far as possible. Returns the ranks that may go on because of it."""
        woken: set[int] = set()
        while True:
            action = self.waits_at or next(self.program, None)
            self.waits_at = action
            if action is None:
                return woken
            if isinstance(action, Send):
                if not self.has_room(action):
                    return woken
                self.work(cost(self.index, action))
                self.send(action, latency(action.message))
                woken.add(action.to)
            elif isinstance(action, Receive):
                if not self.receive(action):
                    return woken
                self.work(cost(self.index, action))
                woken.add(action.source)
            else:
                if isinstance(action, Forward | Gate) and self.fellows and not self.is_past:
                    if not self.meet(action):
                        return woken
                    woken |= {fellow.index for fellow in self.fellows if fellow is not self}
                self.is_past = False
                self.work(cost(self.index, action))
            self.waits_at = None

    def meet(self, action: Forward | Gate) -> bool:
        """Whether all fellows are at this action; then all go on from the time of the last."""
        if any(fellow.waits_at != action for fellow in self.fellows):
            return False
        clock = max(fellow.clock for fellow in self.fellows)
        for fellow in self.fellows:
            fellow.clock, fellow.is_past = clock, True
        return True

    def work(self, seconds: float) -> None:
        self.clock += seconds
        self.busy += seconds

    def has_room(self, action: Send) -> bool:
        """Whether a bulky message may be under way beside the others."""
        channel = self.channels.setdefault((self.index, action.to), _Channel())
        return not isinstance(action.message, BULKY) or channel.num_sent - channel.num_taken < self.capacity

    def send(self, action: Send, latency: float) -> None:
        channel = self.channels[self.index, action.to]
        if isinstance(action.message, BULKY):
            if channel.num_sent >= self.capacity:
                self.clock = max(self.clock, channel.taken.popleft())
            channel.num_sent += 1
        channel.messages.append((action.message, self.clock + latency))

    def receive(self, action: Receive) -> bool:
        channel = self.channels.setdefault((action.source, self.index), _Channel())
        if not channel.messages:
            return False
        message, arrival = channel.messages.popleft()
        if message != action.message:
            raise ScheduleError(f"rank {self.index}: {str(action).strip()}, but {message} comes")
        self.clock = max(self.clock, arrival)
        if isinstance(message, BULKY):
            channel.taken.append(self.clock)
            channel.num_taken += 1
        return True
