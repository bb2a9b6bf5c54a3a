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

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, product
from typing import Literal, Protocol

from longvid.parallel.actions import (
    Action,
    Admit,
    DropGlobals,
    DropKv,
    DropLatents,
    Encode,
    Finish,
    Forecast,
    Forward,
    Fuse,
    Gate,
    GlobalVersion,
    KvVersion,
    LatentVersion,
    Recall,
    Step,
)
from longvid.parallel.decoding import DecodeAction, Decoding, HandOut
from longvid.parallel.rank_actions import (
    Border,
    Boundary,
    DropBorder,
    Halfway,
    HandOn,
    Hidden,
    Look,
    Notice,
    Overlap,
    RankAction,
    Receive,
    SaveLatents,
    Seen,
    Send,
    Velocity,
    Verdict,
)
from longvid.parallel.topology import Coordinate, Topology

SAVE_NOTICE = 3
"""Rounds from the leader's decision to save until every rank is sure to have heard of it: see `Boundary`."""


When = Literal["now", "late", "awaited"]
"""Of what the leader does for decoding: at once; in its turn behind what is put off; or when that came in its turn."""


class DecodingParts(Protocol):
    """Decoding as all ranks know it."""

    @property
    def plan(self) -> Decoding: ...

    def takes_part(self, place: Coordinate) -> bool: ...

    def part(self, topology: Topology, place: Coordinate) -> DecodePart: ...


class DecodePart(Protocol):
    """A rank's part in decoding."""

    def of(self, action: DecodeAction) -> Iterator[tuple[When, RankAction]]:
        """What the rank does for an action, and when. On later stages all of it is done at once."""
        ...


@dataclass(frozen=True)
class DecodingOwners:
    """The first `size` owners of the `chunk` axis decode together.

    Each has some of the decoder's layers, the last owner the first of them; or some rows, all of the same latent.
    """

    size: int = 1
    by_rows: bool = False

    @property
    def takers(self) -> set[int]:
        """The places of those that finished latents go to."""
        return set(range(self.size)) if self.by_rows else {0, self.size - 1}


LEADER_DECODES = DecodingOwners()


def rank_program(
    actions: Iterable[Action],
    topology: Topology,
    rank: int,
    decoding: DecodingParts | None = None,
    owners: DecodingOwners = LEADER_DECODES,
) -> Iterator[RankAction]:
    """What one rank does for a schedule. For a single rank it is the schedule, with boundaries.

    Where all ranks leave out the actions of all rounds up to one, what is left goes on from the state after that round.
    With `decoding` stages decode what finishes, and the leader shows it; else it hands out latents, and `owners` says
    who decodes with it.
    """
    place = topology.coordinate(rank)
    if topology.chunk > 1:
        actions = _last_in_the_middle(actions, _Run(place.chunk, topology.chunk))
    stream: Iterable[_StreamAction] = _with_ends(actions)
    part = None
    if decoding and decoding.takes_part(place):
        stream, part = decoding.plan.spread(stream), decoding.part(topology, place)
    if place.stage == 0:
        return _FirstStage(topology, place, part, owners).program(stream)
    return _later_stage(stream, topology, place, part)


def place_of(chunk: int, group: range, size: int) -> int:
    """The place on a `chunk` axis of that size which owns a chunk of a group: contiguous runs, as even as can be.

    Later runs have one more where they are not equal: the last chunk is often short, and the leader has more to do.
    """
    index = chunk - group.start
    return index if len(group) < size else ((index + 1) * size - 1) // len(group)


@dataclass
class _Run:
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


def _last_in_the_middle(actions: Iterable[Action], run: _Run) -> Iterator[Action]:
    """A chunk schedule in the order that one run takes it: its last chunk in the middle of every round.

    Forwards of a round need nothing of each other, and runs wait only for each other's ends: the last chunk for what
    the next run's first one predicts, and that for the last one's step. So either has half a round of time to come.
    """
    for _, members in groupby(actions, key=lambda action: action.round):
        yield from _rearranged(list(members), run)


def _rearranged(actions: list[Action], run: _Run) -> list[Action]:
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


@dataclass(frozen=True)
class _End:
    """The end of a round that another follows, and what lives on across it, by the schedule."""

    round: int
    latents: tuple[LatentVersion, ...]
    kv: tuple[KvVersion, ...]


_StreamAction = Action | _End | DecodeAction


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


def _later_stage(  # noqa: C901 - one match over all actions
    stream: Iterable[_StreamAction], topology: Topology, place: Coordinate, decoding: DecodePart | None
) -> Iterator[RankAction]:
    """Receive, forward, send: only K/V live here."""
    run = _Run(place.chunk, topology.chunk)
    notices = _Notices(topology, place)
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
            case _End(round=n, kv=kv) if place.chunk:
                yield Boundary(n, kv)
            case _End(round=n, kv=kv):
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


@dataclass
class _Notices:
    """The leader's word at the beginning of every round, to the ranks of other chunks, who have it by its end."""

    topology: Topology
    place: Coordinate
    told: int = -1
    round: int = -1

    def __post_init__(self) -> None:
        is_leader = not any((self.place.stage, self.place.chunk, self.place.guidance, self.place.seq))
        ranks = range(self.topology.num_ranks) if is_leader else ()
        self.targets = [rank for rank in ranks if self.topology.coordinate(rank).chunk]

    def before(self, action: Action | _End) -> Iterator[RankAction]:
        """What goes before an action."""
        self.round = action.round
        if self.place.chunk:
            if isinstance(action, _End):
                yield from self.end()
        elif self.told < action.round and not isinstance(action, Admit | Encode | _End):
            self.told = action.round
            yield from (Send(action.round, Notice(action.round), to) for to in self.targets)

    def end(self) -> Iterator[RankAction]:
        """Receive what is still under way."""
        if self.place.chunk and self.told < self.round:
            self.told = self.round
            yield Receive(self.round, Notice(self.round), 0)


@dataclass(frozen=True, slots=True)
class _Late:
    """An action of an earlier round that is put off in `round`."""

    round: int
    action: RankAction


@dataclass
class _FirstStage:
    """The program of a rank at stage 0: forwards at once, steps as late as they can be."""

    topology: Topology
    place: Coordinate
    decoding: DecodePart | None = None
    owners: DecodingOwners = LEADER_DECODES

    def __post_init__(self) -> None:
        self.late: deque[RankAction | _Late] = deque()
        self.round = 0
        self.put_off: set[LatentVersion] = set()
        self.run = _Run(self.place.chunk, self.topology.chunk)
        self.notices = _Notices(self.topology, self.place)
        self.own: set[LatentVersion] = set()
        self.due: dict[LatentVersion, Receive] = {}
        self.borders: set[LatentVersion] = set()
        self.tokens: set[GlobalVersion] = set()
        self.coming: deque[RankAction] = deque()
        """Latents that finished in this round on other ranks, where several decode, and ..."""
        self.closing: deque[RankAction] = deque()
        """... what becomes of all that did."""

    def program(self, stream: Iterable[_StreamAction]) -> Iterator[RankAction]:  # noqa: C901 - one match over all actions
        for action in stream:
            if isinstance(action, DecodeAction):
                yield from self.decode(action)
                continue
            self.round = action.round
            yield from self.notices.before(action)
            match action:
                case _End():
                    yield from self.end(action)
                    continue
                case Admit():
                    yield from self.admit(action)
                case Recall(latents=recalled):
                    self.own.add(recalled)
                    yield action
                case DropGlobals(tokens=tokens) if tokens in self.tokens:
                    self.tokens.remove(tokens)
                    yield action
                case Encode():
                    yield from self.encode(action)
                case Gate(forward=Forward(chunk=i)) if self.run.has(i):
                    yield from self.prepare(action.forward)
                    yield action
                    yield from self.share_verdict(action)
                case Forward(chunk=i) if self.run.has(i):
                    yield from self.prepare(action)
                    yield action
                    yield from self.pass_on(action)
                    self.await_velocity(action)
                case DropKv():
                    yield action
                case Forecast(chunk=i) if self.run.has(i) and self.is_owner:
                    self.late.append(action)
                case Fuse(chunk=i) if self.run.has(i):
                    self.fuse(action)
                case Step():
                    self.step(action)
                case Finish():
                    self.finish(action)
                case DropLatents():
                    self.drop(action)
            if self.topology.stage == self.topology.guidance == self.topology.seq == 1:
                yield from self.flush_until(action.round)
        while self.late:
            yield self.pop()
        yield from self.notices.end()
        self.close_round()
        while self.late:
            yield self.pop()

    @property
    def is_owner(self) -> bool:
        return self.place.guidance == self.place.seq == 0

    @property
    def is_leader(self) -> bool:
        return self.is_owner and self.place.chunk == 0

    def admit(self, action: Admit) -> Iterator[RankAction]:
        self.run.see(action)
        made = LatentVersion(action.chunk, 0)
        if self.run.has(action.chunk):
            self.own.add(made)
            yield action
        if action.is_left:
            yield from self.lend(action.round, made)

    def lend(self, n: int, latents: LatentVersion) -> Iterator[RankAction]:
        """Where the chunk after reads latents on other ranks: their sends; on those, a receive to come to."""
        here, reader = self.run.owner(latents.chunk), self.run.owner(latents.chunk + 1)
        border = Border(latents.chunk, latents.version)
        if here == reader:
            return
        if reader == self.place.chunk:
            self.due[latents] = Receive(n, border, self.rank(chunk=here, guidance=0, seq=0))
        elif here == self.place.chunk and self.is_owner:
            for guidance, seq in product(range(self.topology.guidance), range(self.topology.seq)):
                yield Send(n, border, self.rank(chunk=reader, guidance=guidance, seq=seq))

    def prepare(self, forward: Forward) -> Iterator[RankAction]:
        """What a forward needs."""
        yield from self.flush_for(LatentVersion(forward.chunk, forward.step), forward.left)
        if isinstance(forward.left, LatentVersion) and forward.left in self.due:
            yield self.take_border(forward.left)

    def take_border(self, latents: LatentVersion) -> Receive:
        self.borders.add(latents)
        return self.due.pop(latents)

    def encode(self, action: Encode) -> Iterator[RankAction]:
        """Global tokens of a shot that has chunks here. In a chunk schedule ranks look at own ones, finished ones of
        earlier groups among them, and tell those that have readers."""
        if action.readers is None:
            self.tokens.add(action.tokens)
            yield from self.flush_for(*action.latents)
            yield action
            return
        n, runs = action.round, defaultdict[int, list[LatentVersion]](list)
        for latents in action.latents:
            runs[self.run.owner(latents.chunk)].append(latents)
        readers = dict.fromkeys(map(self.run.owner, action.readers))
        own, is_reader = runs.pop(self.place.chunk, []), self.place.chunk in readers
        if own:
            yield from self.flush_for(*own)
            yield Look(action, tuple(own))
            for place in readers:
                if place != self.place.chunk:
                    yield Send(n, Seen(tuple(own)), self.rank(chunk=place))
        if is_reader:
            yield from [self.take_border(latents) for latents in list(self.due)]  # they were sent before
            self.tokens.add(action.tokens)
            for place, others in runs.items():
                yield Receive(n, Seen(tuple(others)), self.rank(chunk=place))
            yield action

    def end(self, end: _End) -> Iterator[RankAction]:
        """At the end of a round all that was put off in the one before is due, and all messages to and from owners of
        other chunks: the next round's may not overtake them."""
        meets = self.owners.by_rows and bool(self.closing)
        self.close_round()
        while meets and self.late:  # who has come to its rows waits for the others, and may not owe them anything
            yield self.pop()
        if self.is_owner:
            self.late.append(SaveLatents(end.round, tuple(z for z in end.latents if z in self.own)))
        yield from self.flush_until(end.round - 1)
        crossing = [at for at, action in enumerate(self.late) if self.is_crossing(action)]
        for _ in range(crossing[-1] + 1 if crossing else 0):
            yield self.pop()
        yield Boundary(end.round, end.kv)

    def close_round(self) -> None:
        """Take up what finished in the round."""
        self.late += [*self.coming, *self.closing]
        self.coming.clear()
        self.closing.clear()

    def decode(self, action: DecodeAction) -> Iterator[RankAction]:
        """The leader's part in decoding. What others send is received in the order in which they send it."""
        if self.decoding is None:
            return
        if isinstance(action, HandOut):
            yield from self.flush_until(action.round)
        for when, own in self.decoding.of(action):
            if when == "late":
                self.late.append(_Late(self.round, own))
            elif when == "now":
                yield own
            else:
                while any(isinstance(late, _Late) and late.action == own for late in self.late):
                    yield self.pop()

    def is_crossing(self, action: RankAction | _Late) -> bool:
        if not isinstance(action, Send | Receive):
            return False
        other = action.to if isinstance(action, Send) else action.source
        return self.topology.coordinate(other).chunk != self.place.chunk

    def share_verdict(self, action: Gate) -> Iterator[RankAction]:
        """What the owner decides, to its peers."""
        n, verdict = action.round, Verdict(action.forward.chunk, action.forward.step)
        if self.is_owner:
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
            yield Send(n, Hidden.of(action, 0), self.rank(stage=1))
        elif not self.place.seq:
            before = self.rank(chunk=self.run.owner(i - 1), guidance=0)
            if action.overlap and before != self.rank():
                yield Send(n, Overlap(i, k, self.place.guidance), before)
            if self.place.guidance:
                yield Send(n, Velocity(i, k, self.place.guidance), self.rank(guidance=0))

    def fuse(self, action: Fuse) -> None:
        """A fusion and the receives before it, put off."""
        if not self.is_owner:
            return
        place = self.run.owner(action.chunk + 1)
        if place != self.place.chunk:
            for guidance in range(self.topology.guidance):
                source = self.rank(stage=self.topology.stage - 1, chunk=place, guidance=guidance)
                self.late.append(Receive(action.round, Overlap(action.chunk + 1, action.step, guidance), source))
        self.late.append(action)

    def await_velocity(self, action: Forward) -> None:
        """On the owner: receives of what is predicted for own chunks on other ranks, in the order of the forwards."""
        if not self.is_owner:
            return
        n, i, k = action.round, action.chunk, action.step
        for guidance in range(self.topology.guidance):
            source = self.rank(stage=self.topology.stage - 1, guidance=guidance)
            if source == self.rank():
                continue
            if action.overlap and self.run.has(i - 1):
                self.late.append(Receive(n, Overlap(i, k, guidance), source))
            self.late.append(Receive(n, Velocity(i, k, guidance), source))

    def step(self, action: Step) -> None:
        """A step and the messages around it, put off."""
        n, i, k = action.round, action.chunk, action.step
        made = LatentVersion(i, k + 1)
        if self.run.has(i):
            self.put_off.add(made)
            self.own.add(made)
            if not self.is_owner:
                self.late.append(Receive(n, made, self.rank(guidance=0, seq=0)))
            else:
                self.late.append(action)
                self.late += [Send(n, made, peer) for peer in self.peers()]
        if action.is_left:
            self.late += self.lend(n, made)

    def finish(self, action: Finish) -> None:
        """The leader hands chunks out, those of other owners as they come.

        They also go to the owners that decode with it: at the round's end, when every owner has done its own, so that
        all decode at once.
        """
        if not self.is_owner:
            return
        n, latents, place, handed = action.round, action.latents, self.place.chunk, Halfway(action.latents.chunk)
        owner, size, takers = self.run.owner(latents.chunk), self.owners.size, self.owners.takers
        coming, closing = (self.coming, self.closing) if size > 1 else (self.late, self.late)
        if owner == place:
            self.late += [Send(n, latents, self.rank(chunk=taker)) for taker in sorted(takers - {place})]
        elif place in takers:
            if latents in self.due:  # the owner sent that before
                coming.append(self.take_border(latents))
            coming.append(Receive(n, latents, self.rank(chunk=owner)))
        by_layers = not self.owners.by_rows
        if by_layers and place + 1 < size:
            closing.append(Receive(n, handed, self.rank(chunk=place + 1)))
        if 0 < place < size:
            closing.append(HandOn(n, latents))
        if by_layers and 0 < place < size:
            closing.append(Send(n, handed, self.rank(chunk=place - 1)))
        if owner == place or place == 0:
            closing.append(action)
        if owner != place and place in takers:
            closing.append(DropLatents(n, latents))

    def drop(self, action: DropLatents) -> None:
        if action.latents in self.own:
            self.own.remove(action.latents)
            (self.closing or self.late).append(action)
        elif action.latents in self.borders:
            self.borders.remove(action.latents)
            self.late.append(DropBorder(action.round, action.latents))

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
        if isinstance(action, _Late):
            return action.action
        match action:
            case Step(chunk=i, step=k):
                self.put_off.discard(LatentVersion(i, k + 1))
            case Receive(message=LatentVersion() as made):
                self.put_off.discard(made)
        return action

    def rank(self, **axes: int) -> int:
        return self.topology.rank(self.place._replace(**axes))
