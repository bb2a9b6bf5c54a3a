"""Check a schedule before it runs: a simulation that derives anew what every action must find, and a picture.

Nothing is shared with schedule.py but the Actions and the rules. The simulation keeps the values that are live and
how far each chunk has come. It refuses a read of a value that is not there or not the right one; work done
twice, out of order or never; and a value that outlives its last reader.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

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
    OverlapVersion,
    Recall,
    Step,
)
from longvid.parallel.decoding import Decode, DecodeAction
from longvid.parallel.rules import ChunkRules, QueueRules, Rules
from longvid.plan import Chunk


class ScheduleError(AssertionError):
    """The schedule is wrong: its message holds the action and what was expected."""


@dataclass(frozen=True)
class Report:
    """What a schedule costs: work done, and the most values that are live at once (counted in versions, not bytes)."""

    num_units: int
    num_forecasts: int
    num_rounds: int
    max_live_latents: int
    max_live_kv: int
    """But for those of scenes' ends."""
    max_live_scenes: int = 0


def simulate(actions: Iterable[Action], chunks: Sequence[Chunk], steps: int, rules: Rules, first: int = 0) -> Report:
    """Walk through the actions in O(chunks in flight) memory. Raises ScheduleError at the first one that is wrong.

    The chunks before `first` are finished; in a chunk schedule there are none.
    """
    simulation: _Simulation | _ChunkSimulation
    if isinstance(rules, ChunkRules):
        simulation = _ChunkSimulation(chunks, steps, rules)
    else:
        simulation = _Simulation(chunks, steps, rules, first)
    action: Action | str = "empty schedule"
    try:
        for action in actions:
            simulation.apply(action)
        action = f"end, after {action}"
        simulation.close()
    except ScheduleError as error:
        raise ScheduleError(f"{str(action).strip()}: {error}") from None
    return simulation.report()


def grid(actions: Iterable[Action | DecodeAction]) -> str:
    """A picture of rounds by chunks: the step that each chunk takes, ~ if it is forecast, and which chunks finish.

    Where stages decode, which latents in that round, each with the stage behind a slash.
    """
    steps: dict[int, dict[int, str]] = {}
    finished: dict[int, list[str]] = {}
    decoded: dict[int, list[str]] = {}
    last = -1
    for action in actions:
        last = last if isinstance(action, DecodeAction) else action.round
        match action:
            case Decode(piece=piece):
                decoded.setdefault(last, []).append(f"{piece}/{piece.stage}")
            case Forward(round=n, chunk=i, step=k):
                steps.setdefault(n, {})[i] = str(k)
            case Forecast(round=n, chunk=i, step=k):
                steps.setdefault(n, {})[i] = f"~{k}"
            case Finish(round=n, latents=latents):
                finished.setdefault(n, []).append(f"c{latents.chunk}")
    num_chunks = 1 + max((i for row in steps.values() for i in row), default=-1)
    width = max(4, len(str(num_chunks)) + 2)
    lines = ["round" + "".join(f"{f'c{i}':>{width}}" for i in range(num_chunks))]
    for n, row in steps.items():
        cells = "".join(f"{row.get(i, '.'):>{width}}" for i in range(num_chunks))
        ends = f"   finish {' '.join(finished[n])}" if n in finished else ""
        made = f"   decode {' '.join(decoded[n])}" if n in decoded else ""
        lines.append(f"{n:>5}{cells}{ends}{made}")
    return "\n".join(lines)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ScheduleError(message)


@dataclass
class _Simulation:
    """The state of a run: live values, and how far each chunk in flight has come."""

    chunks: Sequence[Chunk]
    steps: int
    rules: QueueRules
    first: int = 0

    latents: set[LatentVersion] = field(default_factory=set)
    kv: dict[KvVersion, tuple[int, int]] = field(default_factory=dict)  # the unit that stored it
    unread_kv: set[KvVersion] = field(default_factory=set)
    entered: dict[int, int] = field(default_factory=dict)  # the round in which each chunk in flight was admitted
    taken: dict[int, int] = field(default_factory=dict)  # steps taken by each chunk in flight
    velocity: set[int] = field(default_factory=set)  # chunks whose forward or forecast waits for its step
    computed: dict[int, int] = field(default_factory=dict)  # the last step of each chunk that was computed
    gated: Forward | None = None  # what the gate that was passed last leads to
    tokens: dict[GlobalVersion, bool] = field(default_factory=dict)  # whether they were read

    shots: dict[int, list[Chunk]] = field(default_factory=dict)

    num_admitted: int = 0
    num_finished: int = 0
    num_units: int = 0
    num_forecasts: int = 0
    round: int = -1
    turn: int = 0  # chunks from this one on had their turn in this round
    max_live_latents: int = 0
    max_live_kv: int = 0
    max_live_scenes: int = 0

    def __post_init__(self) -> None:
        self.num_admitted = self.num_finished = self.first
        self.last_to_share = {chunk.shares: i for i, chunk in enumerate(self.chunks) if chunk.shares is not None}

    def apply(self, action: Action) -> None:  # noqa: C901 - one match over all actions
        _require(action.round >= self.round, f"comes after round {self.round}")
        _require(self.gated is None or isinstance(action, Forward), "a gate's forward follows at once")
        if action.round > self.round:
            self.end_round()
            self.round, self.turn = action.round, len(self.chunks)
        match action:
            case Admit():
                self.admit(action)
            case Encode():
                self.encode(action)
            case Recall():
                self.recall(action)
            case Gate(forward=forward):
                _require(forward.step in self.rules.gated, f"step {forward.step} has no gate")
                self.gated = forward
            case Forward():
                self.forward(action)
            case Forecast():
                self.forecast(action)
            case Step():
                self.step(action)
            case Finish():
                self.finish(action)
            case DropLatents(latents=latents):
                self.require_latents(latents)
                self.latents.remove(latents)
            case DropKv(kv=kv):
                _require(kv in self.kv, f"{kv} is not live")
                _require(kv not in self.unread_kv, f"{kv} was stored and never read")
                del self.kv[kv]
            case Fuse():
                _require(False, "neighbours in a queue are never at the same step")
            case DropGlobals(tokens=tokens):
                _require(self.tokens.pop(tokens, False), f"{tokens} are not live, or were never read")
        self.max_live_latents = max(self.max_live_latents, len(self.latents))
        num_scenes = sum(kv.edge == "scene" for kv in self.kv)
        self.max_live_scenes = max(self.max_live_scenes, num_scenes)
        self.max_live_kv = max(self.max_live_kv, len(self.kv) - num_scenes)

    def admit(self, action: Admit) -> None:
        i = action.chunk
        _require(i == self.num_admitted < len(self.chunks), f"chunk {self.num_admitted} of {len(self.chunks)} is next")
        _require(action.round == self.rules.gap * i, f"chunk {i} enters in round {self.rules.gap * i}")
        self.num_admitted += 1
        self.entered[i], self.taken[i] = action.round, 0
        self.latents.add(LatentVersion(i, 0))

    def encode(self, action: Encode) -> None:
        found = tuple((latents.chunk, latents.version) for latents in action.latents)
        _require(self.rules.tokens, "no unit reads global tokens")
        _require(bool(self.members(action.shot)), f"there is no shot {action.shot}")
        _require(found == self.snapshot(action.shot, action.round), "these are not the latents of a round before")
        for latents in action.latents:
            self.require_latents(latents)
        _require(action.tokens not in self.tokens, f"{action.tokens} are made twice")
        self.tokens[action.tokens] = False

    def snapshot(self, shot: int, n: int) -> tuple[tuple[int, int], ...]:
        """How a shot stood as the round before n began: its long memory, then the chunks in flight."""
        members = [chunk.index for chunk in self.members(shot)]
        stood = {i: min(n - 1 - self.rules.gap * i, self.steps) for i in members}
        waiting = [i for i in members if stood[i] < self.steps]
        done, oldest = [i for i in members if stood[i] == self.steps], min(waiting, default=members[-1] + 1)
        memory = set(done[:1]) if self.rules.memory else set()
        for octave in range(self.rules.memory):
            nearer, farther = oldest - 2**octave, oldest - 2 ** (octave + 1)
            memory |= {i for i in done if farther < i <= nearer and (i - members[0]) % 2**octave == 0}
        return (*((i, self.steps) for i in sorted(memory)), *((i, stood[i]) for i in waiting if stood[i] > 0))

    def members(self, shot: int) -> list[Chunk]:
        if shot not in self.shots:
            self.shots[shot] = [chunk for chunk in self.chunks if chunk.shot == shot]
        return self.shots[shot]

    def has_tokens(self, shot: int, n: int) -> bool:
        """Whether anybody is to read a shot's tokens in a round, and there is what to make them of."""
        taken = [n - self.rules.gap * chunk.index for chunk in self.members(shot)]
        is_read = any(0 <= k < self.steps and k not in self.rules.forecast for k in taken)
        return self.rules.tokens and is_read and bool(self.snapshot(shot, n))

    def require_tokens(self, action: Forward) -> None:
        shot = self.chunks[action.chunk].shot
        expected = GlobalVersion(action.round, shot) if self.has_tokens(shot, action.round) else None
        _require(action.tokens == expected, f"its global tokens are {expected}")
        if expected:
            _require(expected in self.tokens, f"{expected} are not live")
            self.tokens[expected] = True

    def recall(self, action: Recall) -> None:
        first, wanted = self.first, LatentVersion(self.first - 1, self.steps)
        _require(self.num_admitted == first < len(self.chunks), "comes after the first chunk")
        _require(action.round == self.rules.gap * first, f"chunk {first} enters in round {self.rules.gap * first}")
        _require(self.chunks[first].num_left > 0 and action.latents == wanted, f"chunk {first} goes on from {wanted}")
        _require(wanted not in self.latents, f"{wanted} is live")
        self.latents.add(wanted)

    def begin(self, i: int, k: int, n: int) -> None:
        self.require_turn(i, k, n)
        self.require_taken(i, k)
        _require(i < self.turn, f"chunk {self.turn} had its turn in this round: the order is newest first")
        self.turn = i
        self.require_latents(LatentVersion(i, k))

    def forecast(self, action: Forecast) -> None:
        i, k = action.chunk, action.step
        self.begin(i, k, action.round)
        _require(k in self.rules.forecast, f"step {k} is to be computed")
        _require(i in self.computed, "no step was computed before")
        self.velocity.add(i)
        self.num_forecasts += 1

    def forward(self, action: Forward) -> None:
        i, k = action.chunk, action.step
        self.begin(i, k, action.round)
        _require(k not in self.rules.forecast, f"step {k} is to be forecast")
        _require(self.gated == (action if k in self.rules.gated else None), f"the gate before is of {self.gated}")
        self.gated = None
        self.computed[i] = k
        self.require_left(action)
        self.require_right(action)
        self.require_tokens(action)
        self.require_shared(action)
        for kv in action.store:
            _require((kv.chunk, kv.round) == (i, action.round), f"stores its own K/V of round {action.round}")
            _require(kv not in self.kv, f"{kv} is stored twice")
            self.kv[kv] = (i, k)
            self.unread_kv.add(kv)
        self.velocity.add(i)
        self.num_units += 1

    def require_left(self, action: Forward) -> None:
        i, k = action.chunk, action.step
        if self.chunks[i].num_left == 0:
            _require(action.left is None, "has no left context")
        elif i == self.first:
            _require(action.left == LatentVersion(i - 1, self.steps), "the left context is what was recalled")
            self.require_latents(LatentVersion(i - 1, self.steps))
        elif self.rules.left == "cached":
            self.require_kv("left", action.left, KvVersion(i - 1, action.round - self.rules.gap, "last"), (i - 1, k))
        else:
            levels = {"same": k, "fresher": min(k + self.rules.gap, self.steps)}
            expected = LatentVersion(i - 1, levels[self.rules.left_level])
            _require(action.left == expected, f"the left context is {expected}")
            self.require_latents(expected)

    def require_right(self, action: Forward) -> None:
        i, k = action.chunk, action.step
        if self.chunks[i].num_right == 0 or k < self.rules.gap:  # the right neighbour has not entered yet
            _require(action.right is None, "has no right context")
        else:
            step = self.computed.get(i + 1, -1)
            expected = KvVersion(i + 1, action.round - (k - self.rules.gap - step))
            self.require_kv("right", action.right, expected, (i + 1, step))

    def require_shared(self, action: Forward) -> None:
        source = self.chunks[action.chunk].shares
        if source is None or action.step not in self.rules.sharing:
            _require(action.shared is None, "shares nothing")
        else:
            expected = KvVersion(source, action.round - self.rules.gap * (action.chunk - source), "scene")
            self.require_kv("shared", action.shared, expected, (source, action.step))

    def require_kv(self, side: str, found: object, expected: KvVersion, unit: tuple[int, int]) -> None:
        _require(found == expected, f"the {side} context is {expected}")
        _require(self.kv.get(expected) == unit, f"the {side} context is K/V of step {unit[1]}")
        self.unread_kv.discard(expected)

    def step(self, action: Step) -> None:
        i, k = action.chunk, action.step
        self.require_turn(i, k, action.round)
        self.require_taken(i, k)
        _require(i in self.velocity, f"neither forward nor forecast of step {k} was done")
        self.require_latents(LatentVersion(i, k))
        self.velocity.remove(i)
        self.taken[i] = k + 1
        self.latents.add(LatentVersion(i, k + 1))

    def finish(self, action: Finish) -> None:
        i = action.latents.chunk
        _require(i == self.num_finished, f"chunk {self.num_finished} finishes next")
        _require(action.latents.version == self.steps, f"chunk {i} finishes after {self.steps} steps")
        self.require_turn(i, self.steps - 1, action.round)
        self.require_taken(i, self.steps)
        self.require_latents(action.latents)
        self.num_finished += 1
        del self.entered[i], self.taken[i], self.computed[i]

    def require_turn(self, i: int, k: int, n: int) -> None:
        _require(i in self.entered, f"chunk {i} is not in flight")
        _require(n == self.entered[i] + k, f"step {k} of chunk {i} belongs to round {self.entered[i] + k}")

    def require_taken(self, i: int, steps: int) -> None:
        _require(self.taken[i] == steps, f"chunk {i} has taken {self.taken[i]} steps")

    def require_latents(self, latents: LatentVersion) -> None:
        _require(latents in self.latents, f"{latents} is not live")

    def end_round(self) -> None:
        """Between rounds only those values live that are still to be read; of global tokens none."""
        _require(not self.tokens, f"{', '.join(map(str, self.tokens))} should have been dropped in round {self.round}")
        idle = [str(kv) for kv, unit in self.kv.items() if not self.kv_will_be_read(kv, unit)]
        idle += [str(latents) for latents in self.latents if not self.will_be_read(latents)]
        _require(not idle, f"{', '.join(sorted(idle))} should have been dropped in round {self.round}")

    def kv_will_be_read(self, kv: KvVersion, unit: tuple[int, int]) -> bool:
        """As left context, by the same step of the chunk after. As right context, by a later step of the chunk before,
        as long as no later step of its own is computed. As the end of a scene, by the same step of those that share it.
        """
        if kv.edge == "scene":  # of those the newest comes last to every step
            newest = self.last_to_share.get(unit[0])
            return newest is not None and self.steps_taken(newest) <= unit[1]
        if kv.edge == "last":
            return self.rules.left == "cached" and self.steps_taken(unit[0] + 1) <= unit[1]
        before = unit[0] - 1
        to_come = range(self.steps_taken(before), self.steps)
        readers = [k for k in to_come if k not in self.rules.forecast and k - self.rules.gap >= unit[1]]
        skipped = set(range(unit[1] + 1, readers[0] - self.rules.gap + 1)) if readers else {-1}
        return skipped <= self.rules.forecast

    def will_be_read(self, latents: LatentVersion) -> bool:
        """By its own chunk, which stands at it, by the neighbour, which has not come to that step, or for tokens."""
        neighbour, v, gap = latents.chunk + 1, latents.version, self.rules.gap
        if self.taken.get(latents.chunk) == v or self.will_be_encoded(latents):
            return True
        if neighbour == self.first:
            return v == self.steps and self.steps_taken(neighbour) < self.steps
        if self.rules.left == "cached" or neighbour == len(self.chunks) or self.chunks[neighbour].num_left == 0:
            return False
        ahead = gap if self.rules.left_level == "fresher" else 0
        to_come = range(self.steps_taken(neighbour), self.steps)
        return any(min(k + ahead, self.steps) == v and k not in self.rules.forecast for k in to_come)

    def will_be_encoded(self, latents: LatentVersion) -> bool:
        """Whether a later round's tokens are made of them: soon, for what is forgotten once stays so."""
        if not self.rules.tokens:
            return False
        i, v, shot = latents.chunk, latents.version, self.chunks[latents.chunk].shot
        first = self.rules.gap * i + v + 1
        last = self.rules.gap * self.members(shot)[-1].index + self.steps - 1
        rounds = range(max(first, self.round + 1), (first if v < self.steps else last) + 1)
        then = next((n for n in rounds if self.has_tokens(shot, n)), None)
        return then is not None and (i, v) in self.snapshot(shot, then)

    def steps_taken(self, i: int) -> int:
        return self.taken.get(i, 0 if i >= self.num_admitted else self.steps)

    def close(self) -> None:
        _require(self.gated is None, "the forward of the last gate is missing")
        _require(self.num_finished == len(self.chunks), f"{self.num_finished} of {len(self.chunks)} chunks finished")
        self.end_round()

    def report(self) -> Report:
        live = self.max_live_latents, self.max_live_kv, self.max_live_scenes
        num_rounds = self.round + 1 - self.rules.gap * self.first
        return Report(self.num_units, self.num_forecasts, num_rounds, *live)


@dataclass
class _ChunkSimulation:
    """The state of a chunk schedule: live values, and how far the chunks of the group at hand have come."""

    chunks: Sequence[Chunk]
    steps: int
    rules: ChunkRules

    latents: set[LatentVersion] = field(default_factory=set)
    overlaps: set[OverlapVersion] = field(default_factory=set)
    taken: dict[int, int] = field(default_factory=dict)  # steps taken by each chunk of the group
    velocity: set[int] = field(default_factory=set)  # chunks whose forward or forecast waits for its step
    fused: set[int] = field(default_factory=set)  # those of them whose velocity is fused
    gated: Forward | None = None
    tokens: set[GlobalVersion] = field(default_factory=set)

    group: range = range(0)
    num_admitted: int = 0
    num_finished: int = 0
    num_units: int = 0
    num_forecasts: int = 0
    round: int = -1
    turn: int = 0  # chunks before this one had their turn in this round
    max_live_latents: int = 0

    @property
    def step_at_hand(self) -> int:
        return self.round % self.steps

    @property
    def is_computed(self) -> bool:
        return self.step_at_hand not in self.rules.forecast

    def apply(self, action: Action) -> None:  # noqa: C901 - one match over all actions
        _require(self.gated is None or isinstance(action, Forward), "a gate's forward follows at once")
        if action.round != self.round:
            self.begin_round(action.round)
        match action:
            case Admit():
                self.admit(action)
            case Encode():
                self.encode(action)
            case DropGlobals(tokens=tokens):
                _require(tokens in self.tokens, f"{tokens} are not live")
                self.tokens.remove(tokens)
            case Gate(forward=forward):
                _require(forward.step in self.rules.gated, f"step {forward.step} has no gate")
                self.gated = forward
            case Forward():
                self.forward(action)
            case Forecast(chunk=i, step=k):
                self.take_turn(i, k)
                _require(not self.is_computed, f"step {k} is to be computed")
                self.num_forecasts += 1
            case Fuse():
                self.fuse(action)
            case Step():
                self.step(action)
            case Finish():
                self.finish(action)
            case DropLatents(latents=latents):
                self.require_latents(latents)
                self.latents.remove(latents)
            case DropKv():
                _require(False, "no K/V are kept")
        self.max_live_latents = max(self.max_live_latents, len(self.latents))

    def begin_round(self, n: int) -> None:
        _require(n == self.round + 1, f"comes after round {self.round}")
        self.end_round()
        self.round = n
        if self.step_at_hand == 0:
            groups = self.rules.groups(len(self.chunks))
            _require(n // self.steps < len(groups), "all chunks are finished")
            self.group = groups[n // self.steps]
            self.taken = {}
        self.turn = self.group.start

    def admit(self, action: Admit) -> None:
        i = action.chunk
        _require(i == self.num_admitted and i in self.group, f"chunk {self.num_admitted} of {self.group} is next")
        _require(self.step_at_hand == 0, "chunks enter with their group")
        _require(action.group == self.group, f"the group is {self.group}")
        self.require_note(LatentVersion(i, 0), is_left=action.is_left)
        self.num_admitted += 1
        self.taken[i] = 0
        self.latents.add(LatentVersion(i, 0))

    def encode(self, action: Encode) -> None:
        _require(self.has_tokens(action.shot), "no unit of this round reads global tokens")
        members = [i for i in self.group if self.chunks[i].shot == action.shot]
        _require(bool(members), f"shot {action.shot} is not in the group")
        expected = [LatentVersion(i, self.steps) for i in self.memory(action.shot)]
        expected += [LatentVersion(i, self.step_at_hand) for i in members if self.step_at_hand > 0]
        _require(action.latents == tuple(expected), f"they are made of {expected}")
        readers = list(action.readers or ())
        _require(readers == members, f"they are read by {members}")
        for latents in action.latents:
            self.require_latents(latents)
        _require(action.tokens not in self.tokens, f"{action.tokens} are made twice")
        self.tokens.add(action.tokens)

    def memory(self, shot: int) -> list[int]:
        """Finished chunks of a shot that the tokens of this group are made of."""
        return self.memory_at(self.group.start) if self.chunks[self.group.start].shot == shot else []

    def memory_at(self, border: int) -> list[int]:
        """Those that are read by the tokens of the shot that goes on at a border of groups."""
        if not self.rules.tokens or not 0 < border < len(self.chunks):
            return []
        before = [i for i in range(border) if self.chunks[i].shot == self.chunks[border].shot]
        found = set(before[:1]) if self.rules.memory else set()
        for octave in range(self.rules.memory):
            near, far = (border - 2**power for power in (octave, octave + 1))
            found |= {i for i in before if far < i <= near and (i - before[0]) % 2**octave == 0}
        return sorted(found)

    def has_tokens(self, shot: int) -> bool:
        has_any = self.step_at_hand > 0 or bool(self.memory(shot))
        return self.rules.tokens and self.is_computed and has_any

    def take_turn(self, i: int, k: int) -> None:
        _require(k == self.step_at_hand, f"step {self.step_at_hand} belongs to round {self.round}")
        _require(i == self.turn and i in self.taken, f"chunk {self.turn} is next: the order is that of the film")
        _require(self.taken[i] == k, f"chunk {i} has taken {self.taken[i]} steps")
        self.require_latents(LatentVersion(i, k))
        self.turn = i + 1
        self.velocity.add(i)

    def forward(self, action: Forward) -> None:
        i, k = action.chunk, action.step
        self.take_turn(i, k)
        _require(self.is_computed, f"step {k} is to be forecast")
        _require(self.gated == (action if k in self.rules.gated else None), f"the gate before is of {self.gated}")
        self.gated = None
        _require(action.right is None and not action.store, "a chunk sees no K/V, and keeps none")
        before = LatentVersion(i - 1, k if i > self.group.start else self.steps)
        expected = before if self.chunks[i].num_left else None
        _require(action.left == expected, f"the left context is {expected}")
        if expected:
            self.require_latents(expected)
        shot = self.chunks[i].shot
        tokens = GlobalVersion(self.round, shot) if self.has_tokens(shot) else None
        _require(action.tokens == tokens, f"its global tokens are {tokens}")
        _require(tokens is None or tokens in self.tokens, f"{tokens} are not live")
        overlap = OverlapVersion(i, k) if self.is_fused(i - 1) else None
        _require(action.overlap == overlap, f"the overlap is {overlap}")
        if overlap:
            self.overlaps.add(overlap)
        self.num_units += 1

    def is_fused(self, i: int) -> bool:
        """Whether what chunk i+1 predicts for chunk i counts in this round."""
        both = i in self.group and i + 1 in self.group and self.chunks[i + 1].num_left > 0
        return both and self.is_computed and self.step_at_hand < self.rules.fused_steps

    def fuse(self, action: Fuse) -> None:
        i, k = action.chunk, action.step
        _require(k == self.step_at_hand and i in self.velocity, f"chunk {i} has no velocity of step {k}")
        _require(action.overlap == OverlapVersion(i + 1, k), f"fuses with what chunk {i + 1} predicts at step {k}")
        _require(action.overlap in self.overlaps, f"{action.overlap} is not live")
        self.overlaps.remove(action.overlap)
        self.fused.add(i)

    def step(self, action: Step) -> None:
        i, k = action.chunk, action.step
        _require(k == self.step_at_hand and i in self.velocity, f"neither forward nor forecast of step {k} was done")
        _require((i in self.fused) == self.is_fused(i), "what the chunk after predicts is to be fused before")
        self.require_latents(LatentVersion(i, k))
        self.require_note(LatentVersion(i, k + 1), is_left=action.is_left)
        self.velocity.remove(i)
        self.fused.discard(i)
        self.taken[i] = k + 1
        self.latents.add(LatentVersion(i, k + 1))

    def finish(self, action: Finish) -> None:
        i = action.latents.chunk
        _require(i == self.num_finished, f"chunk {self.num_finished} finishes next")
        _require(action.latents.version == self.steps == self.taken.get(i), f"finishes after {self.steps} steps")
        self.require_latents(action.latents)
        self.num_finished += 1

    def require_note(self, latents: LatentVersion, *, is_left: bool) -> None:
        """Whether the chunk after reads them is said where they are made."""
        expected = self.reader_to_come(latents)
        _require(is_left == expected, f"{latents} is {'' if expected else 'not '}left context")

    def reader_to_come(self, latents: LatentVersion) -> bool:
        i, v = latents.chunk + 1, latents.version
        if i == len(self.chunks) or self.chunks[i].num_left == 0:
            return False
        return v < self.steps and v not in self.rules.forecast if i in self.group else v == self.steps

    def require_latents(self, latents: LatentVersion) -> None:
        _require(latents in self.latents, f"{latents} is not live")

    def end_round(self) -> None:
        """Every chunk of the group took its step, and only those latents live that are still to be read."""
        if self.round < 0:
            return
        behind = [i for i in self.group if self.taken.get(i) != self.step_at_hand + 1]
        _require(not behind, f"chunks {behind} did not take the step of round {self.round}")
        _require(not self.overlaps, f"{', '.join(map(str, self.overlaps))} are not used")
        _require(not self.tokens, f"{', '.join(map(str, self.tokens))} should have been dropped in round {self.round}")
        idle = self.latents - self.to_be_read()
        _require(not idle, f"{', '.join(sorted(map(str, idle)))} should have been dropped in round {self.round}")

    def to_be_read(self) -> set[LatentVersion]:
        """At the end of a round: each chunk's newest latents, and finished ones that the group's first chunk has left
        of it, or that its tokens are made of; when the group is finished, only what the next one so reads.
        """
        is_last = self.step_at_hand + 1 == self.steps
        border = self.group.stop if is_last else self.group.start
        is_read = 0 < border < len(self.chunks) and self.chunks[border].num_left > 0
        newest = set() if is_last else {LatentVersion(i, k) for i, k in self.taken.items()}
        newest |= {LatentVersion(i, self.steps) for i in self.memory_at(border)}
        return newest | ({LatentVersion(border - 1, self.steps)} if is_read else set())

    def close(self) -> None:
        _require(self.gated is None, "the forward of the last gate is missing")
        _require(self.num_finished == len(self.chunks), f"{self.num_finished} of {len(self.chunks)} chunks finished")
        self.end_round()

    def report(self) -> Report:
        return Report(self.num_units, self.num_forecasts, self.round + 1, self.max_live_latents, max_live_kv=0)
