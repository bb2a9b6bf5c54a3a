"""How long a film takes on a pipeline of stages, fast: what `rehearsal` finds for a rank a stage, as a recurrence.

A rehearsal walks through every action of every rank. Here a unit is a few maxima and sums a stage, so that many meshes
can be compared in a second. A test holds the two to the same times.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from longvid.parallel.actions import Admit, Finish, Forecast, Forward, LatentVersion
from longvid.parallel.decoding import Decode, DecodeAction, Decoded, Decoding, HandOut, Move, Moves, Piece, Shares
from longvid.parallel.rules import QueueRules
from longvid.plan import Chunk, FilmSpan

PATTERN = 8
"""Chunks after which stages that decode have had about their parts: of each chunk they have other latents."""
MARGIN = 4
"""Chunks beyond those in flight until every pair of chunks adds the same time."""


@dataclass(frozen=True)
class Pace:
    """Seconds: of the whole film, until its first chunk is decoded, and of each stage's work."""

    makespan: float
    first: float
    busy: tuple[float, ...]

    @property
    def bubble(self) -> float:
        """The share of the stages' time in which they have nothing to do."""
        return 1 - sum(self.busy) / (len(self.busy) * self.makespan) if self.makespan else 0.0


@dataclass(frozen=True)
class Times:
    """What the parts of a film take, in seconds.

    `unit(chunk, step)` is each stage's work, `decode(chunk)` that of decoding a finished chunk, and `hop(chunk)` how
    long activations are on their way; `capacity` of them may be under way to a stage. The first stage decodes, or as
    `shares` has it dealt out. Then `state` is how long the decoder's state is on its way, `pack` what it takes on
    either side to give it away or to go on from it, and `works(chunk)` are the latents' parts of decoding a chunk.
    """

    unit: Callable[[int, int], Sequence[float]]
    decode: Callable[[int], float]
    hop: Callable[[int], float]
    capacity: int
    shares: Shares | None = None
    state: float = 0.0
    pack: float = 0.0
    works: Callable[[Chunk], Sequence[float]] = lambda chunk: (1,) * chunk.num_latents

    @property
    def parts(self) -> tuple[float, ...]:
        """Each stage's part of decoding."""
        return self.shares.of_stages if self.shares else (1.0,)


def pace_of(chunks: Sequence[Chunk], steps: int, rules: QueueRules, times: Times) -> Pace:
    """The pace of a film.

    Once the queue is full, every pair of chunks adds the same time (what is put off is so for two rounds), and where
    stages decode some more of them nearly so: of a long film the beginning is run, and the rest counted by the work
    that its chunks are. Units of chunks of one kind must take equal times.
    """
    in_flight, num_stages = -(-steps // rules.gap), len(times.unit(0, 0))
    prefix = min(len(chunks), max(in_flight, num_stages) + MARGIN + (PATTERN if times.shares else 0))
    beginning = run(chunks[:prefix], steps, rules, times)
    if prefix == len(chunks):
        return beginning
    period = PATTERN if times.shares else 2
    last = beginning.makespan - run(chunks[: prefix - period], steps, rules, times).makespan
    computed = [step for step in range(steps) if step not in rules.forecast]

    def units(chunk: int) -> list[float]:
        return [sum(stage) for stage in zip(*(times.unit(chunk, step) for step in computed), strict=True)]

    of_kinds = {kind: units(i) for kind, i in {kind_of(chunk): chunk.index for chunk in chunks}.items()}
    parts = [*times.parts, *[0.0] * (num_stages - len(times.parts))]

    def works(some: Sequence[Chunk]) -> Iterator[list[float]]:
        """Each chunk's, on all stages."""
        for chunk in some:
            decode = times.decode(chunk.index)
            yield [own + part * decode for own, part in zip(of_kinds[kind_of(chunk)], parts, strict=True)]

    scale = last / sum(max(work) for work in works(chunks[prefix - period : prefix]))
    busy, added = list(beginning.busy), 0.0
    for work in works(chunks[prefix:]):
        busy = [before + own for before, own in zip(busy, work, strict=True)]
        added += max(work)
    return Pace(beginning.makespan + scale * added, beginning.first, tuple(busy))


Kind = tuple[int, int, int, bool]


def kind_of(chunk: Chunk) -> Kind:
    """What the times of a chunk depend on."""
    return chunk.num_latents, chunk.num_left, chunk.num_right, chunk.start == 0


def run(chunks: Sequence[Chunk], steps: int, rules: QueueRules, times: Times) -> Pace:
    """The pace of all of these chunks, unit by unit and piece by piece."""
    stream: Iterable[_Event | DecodeAction] = _queue(len(chunks), steps, rules)
    if times.shares:
        films = (FilmSpan(range(len(chunks)), range(1), 0),)
        stream = Decoding(times.shares, chunks, films, span=rules.gap, works=times.works).spread(stream)
    state = _Run(chunks, steps, rules, times)
    for event in stream:
        state.take(event)
    state.settle()
    return Pace(max(state.clocks), state.first, tuple(state.busy))


@dataclass(frozen=True, slots=True)
class _End:
    """The end of a round that another follows."""

    round: int


_Event = Admit | Forward | Forecast | Finish | _End


def _queue(num_chunks: int, steps: int, rules: QueueRules) -> Iterator[_Event]:
    """What takes time of the queue's schedule, in its order."""
    last: int | None = None
    for n in range(rules.num_rounds(num_chunks, steps)):
        newest = min(n // rules.gap, num_chunks - 1)
        oldest = max(-(-(n - steps + 1) // rules.gap), 0)
        for i in range(newest, oldest - 1, -1):
            if last is not None and last != n:
                yield _End(last)
            last, k = n, n - rules.gap * i
            if k == 0:
                yield Admit(n, i)
            yield Forecast(n, i, k) if k in rules.forecast else Forward(n, i, k)
            if k + 1 == steps:
                yield Finish(n, LatentVersion(i, steps))


@dataclass(frozen=True, slots=True)
class _Late:
    """Something that the first stage puts off in a round: what comes at `arrival`, and what it then has or does.

    `made` is a version of latents (chunk, steps), `state` that of the decoder before a piece; it decodes or shows a
    chunk.
    """

    round: int
    arrival: float = 0.0
    made: tuple[int, int] | None = None
    state: Piece | None = None
    decodes: int | None = None
    shows: int | None = None


@dataclass
class _Run:
    """Clocks of all stages, and what the first one puts off. `states` are those of the decoder that go back to an
    earlier stage but the first, with their arrivals.
    """

    chunks: Sequence[Chunk]
    steps: int
    rules: QueueRules
    times: Times
    late: deque[_Late] = field(default_factory=deque)
    put_off: set[tuple[int, int]] = field(default_factory=set)
    states: dict[Piece, float] = field(default_factory=dict)
    round: int = 0
    first: float = 0.0

    def __post_init__(self) -> None:
        num_stages = len(self.times.unit(0, 0))
        self.clocks, self.busy = [0.0] * num_stages, [0.0] * num_stages
        self.taken: list[deque[float]] = [deque() for _ in range(num_stages)]

    def take(self, event: _Event | DecodeAction) -> None:  # noqa: C901 - one match over all events
        """The next of the schedule, on all stages. It happens in this order on each of them, but for what is late."""
        match event:
            case Admit(round=n):
                self.round = n
            case Forward(round=n, chunk=i, step=k):
                self.round = n
                self.unit(i, k, is_computed=True)
            case Forecast(round=n, chunk=i, step=k):
                self.unit(i, k, is_computed=False)
            case Finish(round=n, latents=latents):
                if not self.times.shares:
                    self.late.append(_Late(n, decodes=latents.chunk))
                self.settle_alone()
            case _End(round=n):
                self.round = n
                self.settle(n - 1)
            case Moves(moves=moves):
                for move in moves:
                    self.move(move)
            case HandOut(round=n, pieces=pieces):
                self.settle(n)
                for piece in pieces:
                    self.hear(piece.stage)
            case Decode():
                self.decode(event)
            case Decoded(resting=resting):
                for _, stage in resting:
                    self.keep(stage)

    def unit(self, i: int, k: int, *, is_computed: bool) -> None:
        """One step of a chunk, through all stages."""
        n, arrival = self.rules.gap * i + k, 0.0
        self.round = n
        if is_computed:
            needed = {(i, k), self.left(i, k)}
            while needed & self.put_off:
                self.pop()
            arrival = self.forward(i, k)
        self.put_off.add((i, k + 1))
        self.late.append(_Late(n, arrival, made=(i, k + 1)))
        self.settle_alone()

    def left(self, i: int, k: int) -> tuple[int, int]:
        """The version of the left neighbour's latents that a unit reads."""
        ahead = self.rules.gap if self.rules.left_level == "fresher" else 0
        reads = self.rules.left == "recompute" and self.chunks[i].num_left > 0
        return (i - 1, min(k + ahead, self.steps)) if reads else (i, k)

    def forward(self, i: int, k: int) -> float:
        """When the unit's velocity is back on the first stage."""
        clocks, hop, capacity, arrival = self.clocks, self.times.hop(i), self.times.capacity, 0.0
        last = len(clocks) - 1
        for stage, seconds in enumerate(self.times.unit(i, k)):
            clock = clocks[stage]
            if stage:
                clock = max(clock, arrival)
                self.taken[stage].append(clock)
            clock += seconds
            self.busy[stage] += seconds
            if stage < last and len(self.taken[stage + 1]) >= capacity:
                clock = max(clock, self.taken[stage + 1].popleft())
            clocks[stage] = clock
            arrival = clock + hop
        return arrival if last else clocks[0]

    def settle(self, done: int | None = None) -> None:
        """On the first stage: what was put off in rounds up to this one; None: all."""
        while self.late and (done is None or self.late[0].round <= done):
            self.pop()

    def settle_alone(self) -> None:
        """A lone stage puts nothing off."""
        if len(self.clocks) == 1:
            self.settle()

    def pop(self) -> None:
        late = self.late.popleft()
        self.clocks[0] = max(self.clocks[0], late.arrival)
        if late.state:
            self.compute(0, self.times.pack)
        if late.made:
            self.put_off.discard(late.made)
        if late.decodes is not None:
            self.compute(0, self.times.decode(late.decodes))
        if late.decodes == 0 or late.shows == 0:
            self.first = self.clocks[0]

    def compute(self, stage: int, seconds: float) -> None:
        self.clocks[stage] += seconds
        self.busy[stage] += seconds

    def hear(self, stage: int) -> None:
        """A stage takes what the first one tells it now."""
        self.clocks[stage] = max(self.clocks[stage], self.clocks[0])

    def decode(self, action: Decode) -> None:
        """A piece, on its stage, when the decoder's state has come. Of the last one the first stage shows the chunk."""
        piece, stage = action.piece, action.piece.stage
        while stage == 0 and any(late.state == piece for late in self.late):
            self.pop()
        if piece in self.states:
            self.go_on(stage, self.states.pop(piece))
        works = self.times.works(self.chunks[piece.chunk])
        if any(works):
            self.compute(stage, self.times.decode(piece.chunk) * sum(works[piece.first : piece.stop]) / sum(works))
        if stage:
            self.late.append(_Late(self.round, self.clocks[stage]))
        if action.ends_film:
            self.keep(stage)
        if action.ends_chunk:
            self.late.append(_Late(self.round, shows=piece.chunk))
        if action.move:
            self.move(action.move)

    def keep(self, stage: int) -> None:
        """The first stage asks that with the state whether it is to be kept, and hears of it later."""
        if stage:
            self.hear(stage)
            self.late.append(_Late(self.round, self.clocks[stage]))

    def move(self, move: Move) -> None:
        """The decoder's state goes to another stage: a later one takes it now, an earlier one before the piece."""
        piece, stage = move.piece, move.piece.stage
        self.compute(move.source, self.times.pack)
        arrival = self.clocks[move.source] + self.times.state
        if stage == 0:
            self.late.append(_Late(self.round, arrival, state=piece))
        elif move.source < stage:
            self.go_on(stage, arrival)
        else:
            self.states[piece] = arrival

    def go_on(self, stage: int, arrival: float) -> None:
        """A stage takes the decoder's state when it has come."""
        self.clocks[stage] = max(self.clocks[stage], arrival)
        self.compute(stage, self.times.pack)
