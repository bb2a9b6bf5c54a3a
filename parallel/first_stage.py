"""The program of a rank at stage 0: forwards at once, and what follows them as late as it can be.

`pipeline.rank_program` chooses it. Here are latents and global tokens, on owners solvers and guidance too, and on the
leader the film. What follows a forward waits in a queue of late actions until a value that it makes is read.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

from longvid.parallel.actions import (
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
    LatentVersion,
    Recall,
    Step,
)
from longvid.parallel.chunk_runs import Run
from longvid.parallel.closings import Closings
from longvid.parallel.decoding import DecodeAction, HandOut
from longvid.parallel.decoding_roles import LEADER_DECODES, DecodePart, DecodingOwners
from longvid.parallel.lending import NOTHING_LENT, Lending
from longvid.parallel.rank_actions import (
    Border,
    Boundary,
    DropBorder,
    Halfway,
    HandOn,
    Hidden,
    Loan,
    Look,
    Overlap,
    RankAction,
    Receive,
    SaveLatents,
    Seen,
    Send,
    Velocity,
    Verdict,
)
from longvid.parallel.round_ends import Notices, RoundEnd, StreamAction
from longvid.parallel.topology import Coordinate, Topology


@dataclass(frozen=True, slots=True)
class _Late:
    """An action of an earlier round that is put off in `round`."""

    round: int
    action: RankAction


@dataclass
class FirstStage:
    """The program of a rank at stage 0: forwards at once, steps as late as they can be."""

    topology: Topology
    place: Coordinate
    decoding: DecodePart | None = None
    owners: DecodingOwners = LEADER_DECODES
    lending: Lending = NOTHING_LENT

    def __post_init__(self) -> None:
        self.late: deque[RankAction | _Late] = deque()
        self.round = 0
        self.put_off: set[LatentVersion] = set()
        self.run = Run(self.place.chunk, self.topology.chunk, self.lending)
        self.notices = Notices(self.topology, self.place)
        self.own: set[LatentVersion] = set()
        self.due: dict[LatentVersion, Receive] = {}
        self.loans: dict[LatentVersion, Receive] = {}
        self.borders: set[LatentVersion] = set()
        self.tokens: set[GlobalVersion] = set()
        self.closings = Closings(self.run)
        """What becomes of the chunks that finished in this round, where several ranks decode."""

    def program(self, stream: Iterable[StreamAction]) -> Iterator[RankAction]:  # noqa: C901 - one match over all actions
        for action in stream:
            if isinstance(action, DecodeAction):
                yield from self.decode(action)
                continue
            self.round = action.round
            yield from self.notices.before(action)
            match action:
                case RoundEnd():
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
                    self.closings.free_rounds = 0
                    yield from self.encode(action)
                case Gate(forward=Forward(chunk=i)) if self.run.has(i):
                    yield from self.prepare(action.forward)
                    yield action
                    yield from self.share_verdict(action)
                case Forward() if self.run.computes(action):
                    yield from self.prepare(action)
                    yield action
                    yield from self.pass_on(action)
                    self.await_velocity(action)
                case Forward(chunk=i) if self.run.has(i):
                    self.await_lent(action)
                case DropKv():
                    yield action
                case Forecast(chunk=i) if self.run.has(i) and self.is_owner:
                    self.late.append(action)
                case Fuse(chunk=i):
                    self.closings.free_rounds = 0
                    if self.run.has(i):
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
        self.closings.free_rounds = 0
        made = LatentVersion(action.chunk, 0)
        if self.run.has(action.chunk):
            self.own.add(made)
            yield action
        yield from self.lend_unit(action.round, made)
        if action.is_left:
            yield from self.lend(action.round, made)

    def lend(self, n: int, latents: LatentVersion) -> Iterator[RankAction]:
        """Where the chunk after reads latents on other ranks: their sends; on those, a receive to come to."""
        here, reader = self.run.owner(latents.chunk), self.run.worker(latents.chunk + 1, latents.version)
        border = Border(latents.chunk, latents.version)
        if here == reader:
            return
        if reader == self.place.chunk:
            self.due[latents] = Receive(n, border, self.rank(chunk=here, guidance=0, seq=0))
        elif here == self.place.chunk and self.is_owner:
            for guidance, seq in product(range(self.topology.guidance), range(self.topology.seq)):
                yield Send(n, border, self.rank(chunk=reader, guidance=guidance, seq=seq))

    def lend_unit(self, n: int, latents: LatentVersion) -> Iterator[RankAction]:
        """Where another place computes a chunk's next unit: a send, or there a receive to come to."""
        here, worker = self.run.owner(latents.chunk), self.run.worker(latents.chunk, latents.version)
        loan = Loan(latents.chunk, latents.version)
        if here == self.place.chunk != worker:
            yield Send(n, loan, self.rank(chunk=worker))
        elif worker == self.place.chunk != here:
            self.loans[latents] = Receive(n, loan, self.rank(chunk=here))

    def prepare(self, forward: Forward) -> Iterator[RankAction]:
        """What a forward needs."""
        lent = LatentVersion(forward.chunk, forward.step)
        if lent in self.loans:
            yield self.loans.pop(lent)
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

    def end(self, end: RoundEnd) -> Iterator[RankAction]:
        """At the end of a round all that was put off in the one before is due, and all messages to and from owners of
        other chunks: the next round's may not overtake them."""
        meets = self.owners.by_rows and bool(self.closings)
        self.close_round()
        self.closings.free_rounds += 1
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
        """Take up what finished in the round, as far as that was not done."""
        self.late += self.closings.end_round()

    def close(self, ready: list[RankAction]) -> None:
        """Take up what becomes of some chunks that finished."""
        if not ready:
            return
        if self.place.chunk:  # all this was sent before anything that finished
            self.put_off |= self.due.keys()
            self.late += map(self.take_border, list(self.due))
            self.late += self.notices.end()
        self.late += ready

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
            owner = self.run.owner(i)
            if owner != self.place.chunk:
                yield Send(n, Velocity(i, k, self.place.guidance), self.rank(chunk=owner))
                yield DropBorder(n, LatentVersion(i, k))

    def fuse(self, action: Fuse) -> None:
        """A fusion and the receives before it, put off."""
        if not self.is_owner:
            return
        place = self.run.worker(action.chunk + 1, action.step)
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

    def await_lent(self, action: Forward) -> None:
        """On the owner of a unit that another place computes: a receive of its velocity.

        The leader may be that place, and gave its notice of the round before.
        """
        worker = self.rank(chunk=self.run.worker(action.chunk, action.step))
        self.late += self.notices.end()
        self.late.append(Receive(action.round, Velocity(action.chunk, action.step, 0), worker))

    def step(self, action: Step) -> None:
        """A step and the messages around it, put off."""
        n, i, k = action.round, action.chunk, action.step
        made = LatentVersion(i, k + 1)
        if self.run.has(i):
            self.close(self.closings.before_step(i))
            self.put_off.add(made)
            self.own.add(made)
            if not self.is_owner:
                self.late.append(Receive(n, made, self.rank(guidance=0, seq=0)))
            else:
                self.late.append(action)
                self.late += [Send(n, made, peer) for peer in self.peers()]
        self.late += self.lend_unit(n, made)
        if action.is_left:
            self.late += self.lend(n, made)
        if self.run.has(i):
            self.close(self.closings.due())

    def finish(self, action: Finish) -> None:
        """The leader hands chunks out, those of other owners as they come.

        They also go to the owners that decode with it. By rows all of these decode at once, at the round's end.
        """
        if not self.is_owner:
            return
        n, latents, place, size = action.round, action.latents, self.place.chunk, self.owners.size
        owner, is_taker = self.run.owner(latents.chunk), place in self.owners.takers
        closing: list[RankAction] = []
        if owner == place:
            closing += self.give(n, latents)
        elif is_taker:
            if latents in self.due:  # the owner sent that before
                closing.append(self.take_border(latents))
            closing.append(Receive(n, latents, self.rank(chunk=owner)))
        closing += self.decode_part(n, latents)
        if place in (0, owner):
            closing.append(action)
        if owner != place and is_taker:
            closing.append(DropLatents(n, latents))
        if size == 1 or place >= size:
            self.late += closing
        else:
            self.closings.add(latents.chunk, closing, at_end=self.owners.by_rows or self.is_leader)
            self.close(self.closings.due())

    def give(self, n: int, latents: LatentVersion) -> Iterator[RankAction]:
        """Finished latents to those that decode: to whoever begins at once, so put off here already; to whoever goes on
        behind this rank in their turn among what was made of earlier chunks."""
        place, is_in_turn = self.place.chunk, not self.owners.by_rows and self.place.chunk < self.owners.size
        for taker in sorted(self.owners.takers - {place}):
            send = Send(n, latents, self.rank(chunk=taker))
            if is_in_turn and taker < place:
                yield send
            else:
                self.late.append(send)

    def decode_part(self, n: int, latents: LatentVersion) -> Iterator[RankAction]:
        """This rank's part in decoding a chunk: of the layers, between those of its neighbours, or of the rows."""
        place, size, handed = self.place.chunk, self.owners.size, Halfway(latents.chunk)
        by_layers = not self.owners.by_rows
        if by_layers and place + 1 < size:
            yield Receive(n, handed, self.rank(chunk=place + 1))
        if 0 < place < size:
            yield HandOn(n, latents)
            if by_layers:
                yield Send(n, handed, self.rank(chunk=place - 1))

    def drop(self, action: DropLatents) -> None:
        if action.latents in self.own:
            self.own.remove(action.latents)
            if not self.closings.append(action):
                self.late.append(action)
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
            case Receive(message=LatentVersion() as made) | Receive(message=Border(latents=made)):
                self.put_off.discard(made)
        return action

    def rank(self, **axes: int) -> int:
        return self.topology.rank(self.place._replace(**axes))
