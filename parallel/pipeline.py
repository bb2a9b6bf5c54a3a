"""From one schedule to a program for every rank: sends and receives put in by a pure pass over the Actions.

The layers are split over stages. The rank at stage 0 (conditional branch, first part of the tokens) is the *leader*: it
alone owns solvers and guidance, and hands out finished chunks. The other ranks of stage 0 hold latents too, which
the leader sends them after every step.

    leader         admit  forward(c1 k0) >hidden           forward(c0 k1) >hidden   <velocity(c1 k0)  step(c1 k0) ...
    stage 1               <hidden  forward(c1 k0) >velocity        <hidden  forward(c0 k1) >velocity ...

On stage 0, what follows a forward (its step and all that comes of it) is put off until a value that it makes is
read, or until the round after next begins. So the first stage runs ahead of the others by as many units as there are
in flight, and no program waits for what it could do without. Programs are streams, like the schedule itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from longvid.parallel.schedule import (
    Action,
    Admit,
    DropKv,
    DropLatents,
    Finish,
    Forecast,
    Forward,
    Gate,
    KvVersion,
    LatentVersion,
    Recall,
    Step,
)
from longvid.parallel.topology import Coordinate, Topology

SAVE_NOTICE = 3
"""Rounds from the leader's decision to save until every rank is sure to have heard of it: see `Boundary`."""


@dataclass(frozen=True, slots=True)
class Hidden:
    """Activations of a unit that leave `stage`; `with_left`: those of left context too, where it is recomputed."""

    chunk: int
    step: int
    stage: int
    with_left: bool

    def __str__(self) -> str:
        return f"hidden c{self.chunk} k{self.step}"


@dataclass(frozen=True, slots=True)
class Velocity:
    """What the last stage predicts for a unit; `guidance` is the place of its rank on that axis."""

    chunk: int
    step: int
    guidance: int

    def __str__(self) -> str:
        return f"velocity c{self.chunk} k{self.step}" + (f" branch {self.guidance}" if self.guidance else "")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the leader decides at a gate, for the other ranks of stage 0. It is all in the header."""

    chunk: int
    step: int

    def __str__(self) -> str:
        return f"verdict c{self.chunk} k{self.step}"


Message = Hidden | Velocity | Verdict | LatentVersion


@dataclass(frozen=True, slots=True)
class Send:
    """Give a message on its way to another rank."""

    round: int
    message: Message
    to: int

    def __str__(self) -> str:
        return f"{self.round:5}  send     {self.message}  to {self.to}"


@dataclass(frozen=True, slots=True)
class Receive:
    """Wait for a message of another rank."""

    round: int
    message: Message
    source: int

    def __str__(self) -> str:
        return f"{self.round:5}  receive  {self.message}  from {self.source}"


@dataclass(frozen=True, slots=True)
class Boundary:
    """All units of `round` and before are through this rank's layers, none of a later round is.

    `kv` live on across it. Here the leader may decide to save the state after round + SAVE_NOTICE; the decision
    travels in the headers of messages. Every rank has a message that was sent later before it comes to that boundary:
    the stages by the next hidden states, the leader's peers by steps, which are put off two rounds at most.
    """

    round: int
    kv: tuple[KvVersion, ...]

    def __str__(self) -> str:
        return f"{self.round:5}  boundary {' '.join(map(str, self.kv))}".rstrip()


@dataclass(frozen=True, slots=True)
class SaveLatents:
    """On the leader: every step of `round` is taken, and `latents` are those that live on."""

    round: int
    latents: tuple[LatentVersion, ...]

    def __str__(self) -> str:
        return f"{self.round:5}  save     {' '.join(map(str, self.latents))}"


RankAction = Action | Send | Receive | Boundary | SaveLatents


def name_of(action: RankAction) -> str:
    """An action without its round, for people."""
    return str(action)[5:].strip()


def rank_program(actions: Iterable[Action], topology: Topology, rank: int) -> Iterator[RankAction]:
    """What one rank does for a schedule. For a single rank it is the schedule, with boundaries.

    Where all ranks leave out the actions of all rounds up to one, what is left goes on from the state after that round.
    """
    place = topology.coordinate(rank)
    if place.stage == 0:
        return _FirstStage(topology, place).program(actions)
    return _later_stage(actions, topology, place)


@dataclass(frozen=True)
class _End:
    """The end of a round that another follows, and what lives on across it, by the schedule."""

    round: int
    latents: tuple[LatentVersion, ...]
    kv: tuple[KvVersion, ...]


def _with_ends(actions: Iterable[Action]) -> Iterator[Action | _End]:
    """The actions, with ends between the rounds."""
    latents: dict[LatentVersion, None] = {}
    kv: dict[KvVersion, None] = {}
    current: int | None = None
    for action in actions:
        if current is not None and action.round != current:
            yield _End(current, tuple(latents), tuple(kv))
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


def _later_stage(actions: Iterable[Action], topology: Topology, place: Coordinate) -> Iterator[RankAction]:
    """Receive, forward, send: only K/V live here."""
    is_last, stage = place.stage + 1 == topology.stage, place.stage
    before, rank_after = topology.rank(place._replace(stage=stage - 1)), topology.rank(place._replace(stage=0))
    if not is_last:
        rank_after = topology.rank(place._replace(stage=stage + 1))
    leader = topology.rank(Coordinate(place.replica, 0, place.chunk, 0, 0))
    passed: list[Boundary] = []
    for action in _with_ends(actions):
        match action:
            case _End(round=n, kv=kv):
                passed.append(Boundary(n, kv))
            case Forward(round=n, chunk=i, step=k):
                with_left = isinstance(action.left, LatentVersion)
                yield Receive(n, Hidden(i, k, stage - 1, with_left), before)
                # Not before that message, which says whether to save: rounds of forecasts alone bring none.
                yield from passed
                passed.clear()
                yield action
                if not is_last:
                    yield Send(n, Hidden(i, k, stage, with_left), rank_after)
                elif place.seq == 0:
                    yield Send(n, Velocity(i, k, place.guidance), leader)
            case DropKv():
                yield action


@dataclass
class _FirstStage:
    """The program of a rank at stage 0: forwards at once, steps as late as they can be."""

    topology: Topology
    place: Coordinate

    def __post_init__(self) -> None:
        self.late: deque[RankAction] = deque()
        self.put_off: set[LatentVersion] = set()
        self.forecast: set[tuple[int, int]] = set()

    def program(self, actions: Iterable[Action]) -> Iterator[RankAction]:  # noqa: C901 - one match over all actions
        for action in _with_ends(actions):
            match action:
                case _End():
                    yield from self.end(action)
                    continue
                case Admit() | Recall():
                    yield action
                case Gate(forward=Forward(chunk=i, step=k, left=left)):
                    yield from self.flush_for(LatentVersion(i, k), left)
                    yield action
                    yield from self.share_verdict(action)
                case Forward(chunk=i, step=k, left=left):
                    yield from self.flush_for(LatentVersion(i, k), left)
                    yield action
                    yield from self.pass_on(action)
                case DropKv():
                    yield action
                case Forecast(chunk=i, step=k):
                    self.forecast.add((i, k))
                    if self.is_leader:
                        self.late.append(action)
                case Step():
                    self.step(action)
                case Finish():
                    if self.is_leader:
                        self.late.append(action)
                case DropLatents():
                    self.late.append(action)
            if self.topology.stage == self.topology.guidance == self.topology.seq == 1:
                yield from self.flush_until(action.round)
        while self.late:
            yield self.pop()

    @property
    def is_leader(self) -> bool:
        return self.place.guidance == self.place.seq == 0

    def end(self, end: _End) -> Iterator[RankAction]:
        """At the end of a round all that was put off in the one before is due."""
        if self.is_leader:
            self.late.append(SaveLatents(end.round, end.latents))
        yield from self.flush_until(end.round - 1)
        yield Boundary(end.round, end.kv)

    def share_verdict(self, action: Gate) -> Iterator[RankAction]:
        """What the leader decides, to its peers."""
        n, verdict = action.round, Verdict(action.forward.chunk, action.forward.step)
        if self.is_leader:
            yield from (Send(n, verdict, peer) for peer in self.peers())
        else:
            yield Receive(n, verdict, self.rank(guidance=0, seq=0))

    def peers(self) -> Iterator[int]:
        """The other ranks of stage 0."""
        for peer in range(1, self.topology.guidance * self.topology.seq):
            guidance, seq = divmod(peer, self.topology.seq)
            yield self.rank(guidance=guidance, seq=seq)

    def pass_on(self, action: Forward) -> Iterator[RankAction]:
        """After a forward: its activations to the next stage; or, where this stage is the last too, its velocity."""
        n, i, k = action.round, action.chunk, action.step
        if self.topology.stage > 1:
            yield Send(n, Hidden(i, k, 0, isinstance(action.left, LatentVersion)), self.rank(stage=1))
        elif self.place.guidance and not self.place.seq:
            yield Send(n, Velocity(i, k, self.place.guidance), self.rank(guidance=0))

    def step(self, action: Step) -> None:
        """A step and the messages around it, put off."""
        n, i, k = action.round, action.chunk, action.step
        made = LatentVersion(i, k + 1)
        self.put_off.add(made)
        if not self.is_leader:
            self.late.append(Receive(n, made, self.rank(guidance=0, seq=0)))
            return
        is_forecast = (i, k) in self.forecast
        self.forecast.discard((i, k))
        for guidance in range(self.topology.guidance):
            if not is_forecast and (self.topology.stage > 1 or guidance):
                source = self.rank(stage=self.topology.stage - 1, guidance=guidance)
                self.late.append(Receive(n, Velocity(i, k, guidance), source))
        self.late.append(action)
        self.late += [Send(n, made, peer) for peer in self.peers()]

    def flush_for(self, *needed: object) -> Iterator[RankAction]:
        while any(value in self.put_off for value in needed):
            yield self.pop()
        # The peers need a step's latents for the same forward, in which they exchange tokens with this rank.
        while self.late and isinstance(self.late[0], Send):
            yield self.pop()

    def flush_until(self, done: int) -> Iterator[RankAction]:
        while self.late and self.late[0].round <= done:
            yield self.pop()

    def pop(self) -> RankAction:
        action = self.late.popleft()
        match action:
            case Step(chunk=i, step=k):
                self.put_off.discard(LatentVersion(i, k + 1))
            case Receive(message=LatentVersion() as made):
                self.put_off.discard(made)
        return action

    def rank(self, **axes: int) -> int:
        return self.topology.rank(self.place._replace(**axes))
