"""A rank's part in decoding: the messages around its pieces, and where in its program they are.

Between two ranks messages keep their order, so each is received where it can come without anybody waiting for the
other: on the leader behind what is put off, as velocities are; from an earlier stage where that sends it, for it is
ahead; from a later one, which is behind, right before it is needed.

One rank a stage decodes, the first. Its peers on the other axes would join in where its `Decode` is carried out (rows
of every latent over the ranks of `guidance`, `seq` and `chunk`, in lockstep): the pieces, states and frames that go
between stages stay as they are.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from longvid.parallel.decoding import Decode, DecodeAction, Decoded, Decoding, HandOut, Move, Moves, Piece
from longvid.parallel.decoding_roles import DecodePart, When
from longvid.parallel.rank_actions import (
    DecoderState,
    KeepState,
    KeptState,
    Message,
    PieceFrames,
    PieceLatents,
    RankAction,
    Receive,
    SaveFilms,
    Send,
    Show,
)
from longvid.parallel.topology import Coordinate, Topology

Steps = Iterator[tuple[When, RankAction]]


@dataclass(frozen=True)
class StageDecoding:
    """Decoding by the first rank of every stage."""

    plan: Decoding

    def takes_part(self, place: Coordinate) -> bool:
        """Whether a rank decodes; the leader, which shows what others do, always has a part."""
        return place.chunk == place.guidance == place.seq == 0

    def part(self, topology: Topology, place: Coordinate) -> DecodePart:
        """What a rank does for it."""
        return _Part(topology, place)


@dataclass
class _Part:
    topology: Topology
    place: Coordinate
    coming: defaultdict[int, deque[Receive]] = field(default_factory=lambda: defaultdict(deque))
    """States on their way from later stages, by stage."""

    def of(self, action: DecodeAction) -> Steps:
        """What the rank does for an action, and when."""
        match action:
            case Moves(moves=moves):
                for move in moves:
                    yield from self.move(move)
            case HandOut():
                yield from self.hand_out(action)
            case Decode():
                yield from self.decode(action)
            case Decoded(round=n, resting=resting):
                for film, stage in resting:
                    yield from self.keep(n, film, stage, is_end=False)
                if self.is_leader:
                    yield "late", SaveFilms(n)

    @property
    def is_leader(self) -> bool:
        return self.place.stage == 0

    def rank(self, stage: int) -> int:
        return self.topology.rank(self.place._replace(stage=stage))

    def hand_out(self, action: HandOut) -> Steps:
        for piece in action.pieces:
            if piece.stage and self.is_leader:
                yield "now", self.send(PieceLatents(piece), action.round, piece.stage)
            elif piece.stage and piece.stage == self.place.stage:
                yield "now", self.receive(PieceLatents(piece), action.round, 0)

    def decode(self, action: Decode) -> Steps:
        piece, frames = action.piece, PieceFrames(action.piece)
        if piece.stage == self.place.stage:
            yield from self.await_state(piece)
            yield "now", action
            if not self.is_leader:
                yield "now", self.send(frames, piece.round, 0)
        elif self.is_leader:
            yield "late", self.receive(frames, piece.round, piece.stage)
        if action.ends_film:
            yield from self.keep(piece.round, piece.film, piece.stage, is_end=True)
        if action.ends_chunk and self.is_leader:
            yield "late", Show(piece.round, piece.chunk)
        if action.move:
            yield from self.move(action.move)

    def move(self, move: Move) -> Steps:
        """A state that goes to another stage; the message has the round of the piece that it is for."""
        piece, stage, state = move.piece, self.place.stage, DecoderState(move.piece)
        if stage == move.source:
            yield "now", self.send(state, piece.round, piece.stage)
        elif stage == piece.stage:
            receive = self.receive(state, piece.round, move.source)
            if self.is_leader:
                yield "late", receive
            elif move.source < stage:
                yield "now", receive
            else:
                self.coming[move.source].append(receive)

    def await_state(self, piece: Piece) -> Steps:
        """What has to come before a piece is decoded, if its state is still on its way."""
        if self.is_leader:
            for source in range(1, self.topology.stage):
                yield "awaited", self.receive(DecoderState(piece), piece.round, source)
            return
        for receives in self.coming.values():
            if any(receive.message == DecoderState(piece) for receive in receives):
                while receives[0].message != DecoderState(piece):
                    yield "now", receives.popleft()
                yield "now", receives.popleft()

    def keep(self, n: int, film: int, stage: int, *, is_end: bool) -> Steps:
        """The leader asks the stage that has a film's state whether to keep it, and has it then.

        Its question says what it has decided since, so that both go by the same decision.
        """
        ask, kept = KeptState(film, n, is_end, is_asked=True), KeptState(film, n, is_end)
        if stage == 0:
            if self.is_leader:
                yield "now", KeepState(n, film, is_end)
        elif self.is_leader:
            yield "now", self.send(ask, n, stage)
            yield "late", self.receive(kept, n, stage)
        elif stage == self.place.stage:
            yield "now", self.receive(ask, n, 0)
            yield "now", self.send(kept, n, 0)

    def send(self, message: Message, n: int, stage: int) -> Send:
        return Send(n, message, self.rank(stage))

    def receive(self, message: Message, n: int, stage: int) -> Receive:
        return Receive(n, message, self.rank(stage))
