"""Decoding, dealt out over the stages: which latents each of them decodes, when, and where the decoder's state is.

A streaming decoder goes on from a state, and its frames are the same wherever a film is cut. So a finished chunk is cut
in *pieces* of a few latents, and each stage decodes some of them. The state goes from stage to stage like any other
message, and is in one place alone; the frames go to the leader, which writes them in order.

    stage 0     c3[0:3]  k0 k1 k2 k3 k4 k5  c4[0:3]  k0 k1 k2 k3 k4 k5
    stage 1              c3[3:6]  k0 k1 k2 k3 k4 k5  c4[3:6]  k0 k1 k2 k3 k4 k5

What a latent makes a decoder do differs: some wait for the others of a pass (`DecoderPasses`). Shares are parts of that
work, and a latent that waits goes with those that it waits for.

A stage is behind the one before by what that has done more, so a state that goes to the next stage comes when it is
needed. Back to the first it has the rest of the round. A chunk that finishes in round n is handed out when round
n + LAG begins: all that the first stage puts off is done by then. Where the next chunk finishes some rounds later, its
pieces are spread over these. All actions have the round in which the chunk finished, for a checkpoint after that round
has its frames.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, groupby
from math import sqrt
from typing import Literal, Protocol, TypeVar

from longvid.geometry import EACH_ALONE, DecoderPasses
from longvid.parallel.actions import Finish, Forward, Gate
from longvid.parallel.partition import Costs, split_layers
from longvid.parallel.rules import ChunkRules, Rules
from longvid.plan import Chunk, FilmSpan, Plan

LAG = 2
"""Rounds from a chunk's last step until it is handed out: the first stage puts steps off until the next round ends."""
GOLDEN_RATIO = (sqrt(5) - 1) / 2
"""Its multiples fill the numbers from 0 to 1 as evenly as any."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Latents `first` to `stop` of a chunk that finished in `round`, and the stage that decodes them."""

    round: int
    film: int
    chunk: int
    first: int
    stop: int
    stage: int

    def __str__(self) -> str:
        return f"c{self.chunk}[{self.first}:{self.stop}]"


@dataclass(frozen=True, slots=True)
class Move:
    """The state of a film's decoder goes from a stage to that of a piece, the next to be decoded."""

    source: int
    piece: Piece


@dataclass(frozen=True, slots=True)
class Moves:
    """States go where the first pieces of the chunks that finished in a round will be decoded."""

    round: int
    moves: tuple[Move, ...]

    def __str__(self) -> str:
        return f"{self.round:5}  move     {' '.join(f'decoder to {move.piece}' for move in self.moves)}"


@dataclass(frozen=True, slots=True)
class HandOut:
    """The leader gives every stage its pieces of the chunks that finished in a round."""

    round: int
    pieces: tuple[Piece, ...]

    def __str__(self) -> str:
        return f"{self.round:5}  hand out {' '.join(map(str, self.pieces))}"


@dataclass(frozen=True, slots=True)
class Decode:
    """Make frames of a piece; `move` says where the state goes then, None: it stays."""

    piece: Piece
    move: Move | None = None
    ends_chunk: bool = False
    ends_film: bool = False

    @property
    def round(self) -> int:
        return self.piece.round

    def __str__(self) -> str:
        return f"{self.round:5}  decode   {self.piece} on stage {self.piece.stage}"


@dataclass(frozen=True, slots=True)
class Decoded:
    """All chunks that finished until the end of a round are decoded; (film, stage) say where states rest."""

    round: int
    resting: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        return f"{self.round:5}  decoded  {' '.join(f'film {film} on stage {stage}' for film, stage in self.resting)}"


DecodeAction = Moves | HandOut | Decode | Decoded


@dataclass(frozen=True)
class Shares:
    """How decoding is dealt out: each stage's part of the work.

    Of a chunk each stage decodes as many latents in a row as are its part, the earlier stages first.
    """

    of_stages: tuple[float, ...]

    def stages(self, chunk: int, works: Sequence[float]) -> list[int]:
        """The stage that decodes each latent of a film's chunk; `works` are what they make the decoder do.

        Chunks begin a part of a latent later, each another, so that stages whose parts are no whole latents get them
        all the same.
        """
        offset = (chunk + 0.5) * GOLDEN_RATIO % 1
        if not any(works):  # all wait for the next chunk
            return [self._stage_at(offset)] * len(works)
        before, total = [0.0, *accumulate(works)], sum(works)
        found = [
            self._stage_at((done + offset * work) / total) if work else None
            for done, work in zip(before, works, strict=False)
        ]
        for latent in reversed(range(len(found) - 1)):
            found[latent] = found[latent + 1] if found[latent] is None else found[latent]
        last = next(stage for stage in reversed(found) if stage is not None)
        return [last if stage is None else stage for stage in found]

    def _stage_at(self, part: float) -> int:
        """Where a part of a chunk's work, 0 to 1, lies."""
        last = max(stage for stage, share in enumerate(self.of_stages) if share)
        return next((stage for stage, until in enumerate(accumulate(self.of_stages)) if part < until), last)

    def pieces(self, chunk: int, works: Sequence[float]) -> list[tuple[range, int]]:
        """Of a film's chunk: (latents, stage)."""
        runs = groupby(enumerate(self.stages(chunk, works)), key=lambda member: member[1])
        found = [([latent for latent, _ in members], stage) for stage, members in runs]
        return [(range(latents[0], latents[-1] + 1), stage) for latents, stage in found]


def share_decoding(costs: Costs, bounds: Sequence[range]) -> Shares:
    """Decoding for the stages that have least to do: the slowest is then as fast as it can be with these layers."""
    works = replace(costs, decode=0.0).of_stages(bounds)
    level = _level(works, costs.decode)
    rest = [max(0.0, level - work) for work in works]
    if not sum(rest):
        rest = [float(work == min(works)) for work in works]
    shares = tuple(value / sum(rest) for value in rest)
    return Shares(shares)


def deal_work(
    costs: Costs, num_stages: int, decode: Literal["stages", "rows", "leader"]
) -> tuple[tuple[range, ...], Shares | None]:
    """Each stage's layers, and what it decodes; None: the leader decodes alone, and has fewer layers for it."""
    if decode != "stages" or num_stages == 1:
        return split_layers(costs, num_stages), None
    bounds = split_layers(replace(costs, decode=0.0), num_stages)
    return bounds, share_decoding(costs, bounds)


def _level(works: Sequence[float], extra: float) -> float:
    """How high all stand at least when `extra` is poured on the lowest."""
    heights = sorted(works)
    for count, next_height in enumerate([*heights[1:], float("inf")], 1):
        level = (sum(heights[:count]) + extra) / count
        if level <= next_height:
            return level
    raise AssertionError("the last height is infinite")


class Rounded(Protocol):
    """What a stream of a schedule consists of."""

    @property
    def round(self) -> int: ...


T = TypeVar("T", bound=Rounded)


@dataclass(frozen=True)
class Decoding:
    """The films whose decoding is dealt out, as the plan counts, with those of their chunks that are finished before.

    `span` is how many rounds there are from one finish to the next, `works` what each latent of a chunk makes the
    decoder do.
    """

    shares: Shares
    chunks: Sequence[Chunk]
    films: Sequence[FilmSpan]
    first_chunk: int = 0
    span: int = 1
    works: Callable[[Chunk], Sequence[float]] = lambda chunk: (1,) * chunk.num_latents

    @classmethod
    def of(cls, shares: Shares, plan: Plan, rules: Rules, steps: int, passes: DecoderPasses = EACH_ALONE) -> Decoding:
        """That of a plan's films, by a decoder of such passes."""
        span = steps if isinstance(rules, ChunkRules) else rules.gap
        return cls(shares, plan.chunks, plan.films, plan.first_chunk, span, lambda chunk: plan.works(chunk, passes))

    def pieces(self, film: int, chunk: int) -> list[tuple[range, int]]:
        """(latents, stage) of a chunk of a film, counted in it."""
        return self.shares.pieces(chunk, self.works(self.chunks[self.films[film].chunks[chunk]]))

    def work(self, piece: Piece) -> float:
        """What a piece makes the decoder do."""
        return sum(self.works(self.chunks[piece.chunk])[piece.first : piece.stop])

    def spread(self, stream: Iterable[T]) -> Iterator[T | DecodeAction]:
        """A schedule's stream with decoding in it."""
        return _Spread(self).program(stream)

    def resting(self, film: int, num_decoded: int) -> int | None:
        """The stage that has a film's state when so many of its chunks are decoded; None before the first."""
        if not num_decoded:
            return None
        return self.pieces(film, num_decoded - 1)[-1][1]


@dataclass
class _Spread:
    """Where decoding goes in a stream: first come, first served, as evenly as deadlines allow."""

    decoding: Decoding
    finished: dict[int, list[int]] = field(default_factory=dict)
    waiting: deque[DecodeAction] = field(default_factory=deque)
    jobs: deque[tuple[int, int]] = field(default_factory=deque)
    """Of what waits: by when, and how many pieces."""
    resting: dict[int, int] = field(default_factory=dict)
    next_round: int | None = None
    decodes: list[Decode] = field(default_factory=list)
    """Those of the next round, which is prepared."""

    def __post_init__(self) -> None:
        for film in range(len(self.decoding.films)):
            stage = self.decoding.resting(film, self.decoding.first_chunk)
            if stage is not None:
                self.resting[film] = stage

    def program(self, stream: Iterable[T]) -> Iterator[T | DecodeAction]:
        for n, members in groupby(stream, key=lambda action: action.round):
            actions = list(members)
            self.next_round = n if self.next_round is None else self.next_round
            self.queue_until(n - LAG, n + self.decoding.span)
            yield from _merged(actions, list(self.take(n)))
            if finished := [action.latents.chunk for action in actions if isinstance(action, Finish)]:
                self.finished[n] = finished
        self.queue_until(max(self.finished, default=-1), 0)
        yield from self.waiting

    def queue_until(self, done: int, deadline: int) -> None:
        """Have the chunks decoded that finished in the rounds up to one. States move as soon as a checkpoint has seen
        where they rest.
        """
        while self.next_round is not None and self.next_round <= done:
            n, self.next_round = self.next_round, self.next_round + 1
            self.prepare(n)
            if self.decodes:
                pieces = tuple(decode.piece for decode in self.decodes)
                self.waiting += [HandOut(n, pieces), *self.decodes]
                self.jobs.append((deadline, len(pieces)))
            self.waiting.append(Decoded(n, tuple(self.resting.items())))
            self.decodes = []
            self.prepare(n + 1)

    def prepare(self, n: int) -> None:
        """What becomes of the chunks of a round; films keep to their own states."""
        moves: list[Move] = []
        newest: dict[int, int] = {}
        for decode in [decode for chunk in self.finished.pop(n, ()) for decode in self.of_chunk(n, chunk)]:
            piece, film = decode.piece, decode.piece.film
            source = self.resting.get(film, piece.stage)
            if source != piece.stage and film in newest:
                self.decodes[newest[film]] = replace(self.decodes[newest[film]], move=Move(source, piece))
            elif source != piece.stage:
                moves.append(Move(source, piece))
            self.resting[film], newest[film] = piece.stage, len(self.decodes)
            self.decodes.append(decode)
            if decode.ends_film:
                del self.resting[film]
        if moves:
            self.waiting.append(Moves(n, tuple(moves)))

    def of_chunk(self, n: int, chunk: int) -> Iterator[Decode]:
        films = self.decoding.films
        film = next(index for index, span in enumerate(films) if chunk in span.chunks)
        pieces = self.decoding.pieces(film, chunk - films[film].chunks.start)
        for index, (latents, stage) in enumerate(pieces, 1):
            is_last = index == len(pieces)
            ends_film = is_last and chunk + 1 == films[film].chunks.stop
            yield Decode(Piece(n, film, chunk, latents.start, latents.stop, stage), None, is_last, ends_film)

    def take(self, n: int) -> Iterator[DecodeAction]:
        """What is to be done in a round: as many pieces as keep all deadlines."""
        count, most = 0, 0
        for deadline, pieces in self.jobs:
            count += pieces
            most = max(most, -(-count // max(1, deadline - n)))
        while self.waiting and (most or not isinstance(self.waiting[0], Decode)):
            action = self.waiting.popleft()
            if isinstance(action, Decode):
                most -= 1
                self.take_from_jobs()
            yield action

    def take_from_jobs(self) -> None:
        while not self.jobs[0][1]:
            self.jobs.popleft()
        deadline, pieces = self.jobs[0]
        self.jobs[0] = (deadline, pieces - 1)


def _merged(actions: Sequence[T], decoding: Sequence[DecodeAction]) -> Iterator[T | DecodeAction]:
    """A round with decoding in it, between its forwards, and none behind the round's end.

    What goes from a stage to a later one costs no time there, for that is as far behind; what goes back has to wait
    until all stages are as far. So the round has as many parts as there are such moves, and each begins with pieces.
    """
    places = [
        at
        for at, action in enumerate(actions)
        if isinstance(action, Gate) or (isinstance(action, Forward) and not (at and isinstance(actions[at - 1], Gate)))
    ]
    # Where nothing is computed: before the last action, for that may be the mark of the round's end.
    places = places or [len(actions) - 1]
    parts = list(_parts(decoding))
    before: dict[int, list[DecodeAction]] = {}
    for index, part in enumerate(parts):
        before.setdefault(places[index * len(places) // len(parts)], []).extend(part)
    for at, own in enumerate(actions):
        yield from before.get(at, ())
        yield own


def _parts(decoding: Sequence[DecodeAction]) -> Iterator[list[DecodeAction]]:
    """Pieces that follow each other without a state that goes back to an earlier stage."""
    part: list[DecodeAction] = []
    for action in decoding:
        part.append(action)
        if isinstance(action, Decode) and action.move and action.move.piece.stage < action.move.source:
            yield part
            part = []
    if part:
        yield part
