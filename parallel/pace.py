"""How long a film takes on a pipeline of stages, fast: what `rehearsal` finds for a rank a stage, as a recurrence.

A rehearsal walks through every action of every rank. Here a unit is a few maxima and sums a stage, so that many meshes
can be compared in a second. A test holds the two to the same times.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from longvid.parallel.decoding import LAG, Shares
from longvid.parallel.rules import QueueRules
from longvid.plan import Chunk

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
    `shares` has it dealt out.
    """

    unit: Callable[[int, int], Sequence[float]]
    decode: Callable[[int], float]
    hop: Callable[[int], float]
    capacity: int
    shares: Shares | None = None

    @property
    def parts(self) -> tuple[float, ...]:
        """Each stage's part of decoding."""
        return self.shares.of_stages if self.shares else (1.0,)


def pace_of(chunks: Sequence[Chunk], steps: int, rules: QueueRules, times: Times) -> Pace:
    """The pace of a film.

    Once the queue is full, every pair of chunks adds the same time (what is put off is so for two rounds): of a long
    film the beginning is run, and the rest counted by the work that its chunks are. Chunks of one kind must take equal
    times.
    """
    in_flight, num_stages = -(-steps // rules.gap), len(times.unit(0, 0))
    prefix = min(len(chunks), max(in_flight, num_stages) + MARGIN)
    beginning = run(chunks[:prefix], steps, rules, times)
    if prefix == len(chunks):
        return beginning
    last = beginning.makespan - run(chunks[: prefix - 2], steps, rules, times).makespan
    computed = [step for step in range(steps) if step not in rules.forecast]

    def work(chunk: int) -> list[float]:
        total = [sum(stage) for stage in zip(*(times.unit(chunk, step) for step in computed), strict=True)]
        for stage, part in enumerate(times.parts):
            total[stage] += part * times.decode(chunk)
        return total

    works = {kind: work(i) for kind, i in {kind_of(chunk): chunk.index for chunk in chunks}.items()}
    scale = last / sum(max(works[kind_of(chunk)]) for chunk in chunks[prefix - 2 : prefix])
    rest = Counter(map(kind_of, chunks[prefix:]))
    busy = [
        before + sum(count * works[kind][stage] for kind, count in rest.items())
        for stage, before in enumerate(beginning.busy)
    ]
    makespan = beginning.makespan + scale * sum(count * max(works[kind]) for kind, count in rest.items())
    return Pace(makespan, beginning.first, tuple(busy))


Kind = tuple[int, int, int, bool]


def kind_of(chunk: Chunk) -> Kind:
    """What the times of a chunk depend on."""
    return chunk.num_latents, chunk.num_left, chunk.num_right, chunk.start == 0


def run(chunks: Sequence[Chunk], steps: int, rules: QueueRules, times: Times) -> Pace:
    """The pace of all of these chunks, unit by unit."""
    state = _Run(chunks, steps, rules, times)
    for n in range(rules.num_rounds(len(chunks), steps)):
        state.decode_until(n - LAG)
        newest = min(n // rules.gap, len(chunks) - 1)
        oldest = max(-(-(n - steps + 1) // rules.gap), 0)
        for i in range(newest, oldest - 1, -1):
            state.unit(n, i, n - rules.gap * i)
        state.settle(n - 1)
        state.show()
    state.settle(rules.num_rounds(len(chunks), steps))
    state.decode_rest()
    return Pace(max(state.clocks), state.first, tuple(state.busy))


@dataclass
class _Run:
    """Clocks of all stages. `late` is what the first stage puts off: (round, chunk, version or None, arrival).

    Where stages decode, `finished` are chunks that wait for it, with their rounds. A piece is taken to begin with a
    round: what it waits for is then done, for later stages are as far behind.
    """

    chunks: Sequence[Chunk]
    steps: int
    rules: QueueRules
    times: Times
    late: deque[tuple[int, int, int | None, float]] = field(default_factory=deque)
    put_off: set[tuple[int, int]] = field(default_factory=set)
    first: float = 0.0
    finished: deque[tuple[int, int]] = field(default_factory=deque)
    shown: float | None = None
    """When the first chunk's pieces are decoded, until the first stage comes to show them."""

    def __post_init__(self) -> None:
        num_stages = len(self.times.unit(0, 0))
        self.clocks, self.busy = [0.0] * num_stages, [0.0] * num_stages
        self.taken: list[deque[float]] = [deque() for _ in range(num_stages)]
        shares = self.times.shares
        self.pieces = [shares.pieces(i, chunk.num_latents) for i, chunk in enumerate(self.chunks)] if shares else []

    def unit(self, n: int, i: int, k: int) -> None:
        """One step of a chunk, through all stages."""
        arrival = 0.0
        if k not in self.rules.forecast:
            needed = {(i, k), self.left(i, k)}
            while needed & self.put_off:
                self.pop()
            arrival = self.forward(i, k)
        self.put_off.add((i, k + 1))
        self.late.append((n, i, k + 1, arrival))
        if k + 1 == self.steps:
            self.late.append((n, i, None, 0.0))
        if len(self.clocks) == 1:
            self.settle(n)

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

    def settle(self, done: int) -> None:
        """On the first stage: what was put off in rounds up to this one."""
        while self.late and self.late[0][0] <= done:
            self.pop()

    def pop(self) -> None:
        n, i, version, arrival = self.late.popleft()
        self.clocks[0] = max(self.clocks[0], arrival)
        if version is not None:
            self.put_off.discard((i, version))
            return
        if self.pieces:
            self.finished.append((n, i))
            return
        seconds = self.times.decode(i)
        self.clocks[0] += seconds
        self.busy[0] += seconds
        if i == 0:
            self.first = self.clocks[0]

    def decode_until(self, done: int) -> None:
        """Decode the chunks that finished in rounds up to one, a piece a stage."""
        while self.finished and self.finished[0][0] <= done:
            _, i = self.finished.popleft()
            ends = [self.decode_piece(i, latents, stage) for latents, stage in self.pieces[i]]
            if i == 0:
                self.shown = max(ends)

    def decode_piece(self, i: int, latents: range, stage: int) -> float:
        """When a stage is done with a piece."""
        seconds = self.times.decode(i) * len(latents) / self.chunks[i].num_latents
        self.clocks[stage] += seconds
        self.busy[stage] += seconds
        return self.clocks[stage]

    def show(self) -> None:
        """On the first stage, at the end of a round: hand out the first chunk's frames if they are there."""
        if self.shown is not None:
            self.first, self.shown = max(self.shown, self.clocks[0]), None

    def decode_rest(self) -> None:
        """What is left when all units are done: piece after piece, for there is one state."""
        now = 0.0
        for _, i in self.finished:
            for latents, stage in self.pieces[i]:
                self.clocks[stage] = max(self.clocks[stage], now)
                now = self.decode_piece(i, latents, stage)
            self.first = self.first or now
