"""The queue, simulated: a walk through its Actions that derives anew what each must find.

`verify.simulate` feeds it. It shares the Actions and the rules with what makes a queue (`queue_units.py`), and none of
its arithmetic: a mistake would have to be made twice, in two ways, to pass.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    Recall,
    Step,
)
from longvid.parallel.findings import Report, require
from longvid.parallel.rules import QueueRules
from longvid.plan import Chunk


@dataclass
class QueueSimulation:
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

    shots: dict[int, range] = field(default_factory=dict)

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
        require(action.round >= self.round, f"comes after round {self.round}")
        require(self.gated is None or isinstance(action, Forward), "a gate's forward follows at once")
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
                require(forward.step in self.rules.gated, f"step {forward.step} has no gate")
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
                require(kv in self.kv, f"{kv} is not live")
                require(kv not in self.unread_kv, f"{kv} was stored and never read")
                del self.kv[kv]
            case Fuse():
                require(False, "neighbours in a queue are never at the same step")
            case DropGlobals(tokens=tokens):
                require(self.tokens.pop(tokens, False), f"{tokens} are not live, or were never read")
        self.max_live_latents = max(self.max_live_latents, len(self.latents))
        num_scenes = sum(kv.edge == "scene" for kv in self.kv)
        self.max_live_scenes = max(self.max_live_scenes, num_scenes)
        self.max_live_kv = max(self.max_live_kv, len(self.kv) - num_scenes)

    def admit(self, action: Admit) -> None:
        i = action.chunk
        require(i == self.num_admitted < len(self.chunks), f"chunk {self.num_admitted} of {len(self.chunks)} is next")
        require(action.round == self.rules.gap * i, f"chunk {i} enters in round {self.rules.gap * i}")
        self.num_admitted += 1
        self.entered[i], self.taken[i] = action.round, 0
        self.latents.add(LatentVersion(i, 0))

    def encode(self, action: Encode) -> None:
        found = tuple((latents.chunk, latents.version) for latents in action.latents)
        require(self.rules.tokens, "no unit reads global tokens")
        require(bool(self.members(action.shot)), f"there is no shot {action.shot}")
        require(found == self.snapshot(action.shot, action.round), "these are not the latents of a round before")
        for latents in action.latents:
            self.require_latents(latents)
        require(action.tokens not in self.tokens, f"{action.tokens} are made twice")
        self.tokens[action.tokens] = False

    def snapshot(self, shot: int, n: int) -> tuple[tuple[int, int], ...]:
        """How a shot stood as the round before n began: its long memory, then the chunks in flight."""
        members, gap = self.members(shot), self.rules.gap
        oldest = min(max(members.start, (n - 1 - self.steps) // gap + 1), members.stop)  # of those with steps to take
        done, in_flight = range(members.start, oldest), range(oldest, min(members.stop, (n - 2) // gap + 1))
        memory = set(done[:1]) if self.rules.memory else set()
        for octave in range(self.rules.memory):
            nearer, farther = oldest - 2**octave, oldest - 2 ** (octave + 1)
            near = range(max(farther + 1, done.start), nearer + 1)
            memory |= {i for i in near if (i - members.start) % 2**octave == 0}
        return (*((i, self.steps) for i in sorted(memory)), *((i, n - 1 - gap * i) for i in in_flight))

    def members(self, shot: int) -> range:
        """The chunks of a shot."""
        if shot not in self.shots:
            found = [chunk.index for chunk in self.chunks if chunk.shot == shot]
            self.shots[shot] = range(found[0], found[-1] + 1) if found else range(0)
        return self.shots[shot]

    def has_tokens(self, shot: int, n: int) -> bool:
        """Whether anybody is to read a shot's tokens in a round, and there is what to make them of."""
        if not self.rules.tokens:
            return False
        members, gap = self.members(shot), self.rules.gap
        in_flight = range(max(members.start, (n - self.steps) // gap + 1), min(members.stop, n // gap + 1))
        is_read = any(n - gap * i not in self.rules.forecast for i in in_flight)
        return is_read and bool(self.snapshot(shot, n))

    def require_tokens(self, action: Forward) -> None:
        shot = self.chunks[action.chunk].shot
        expected = GlobalVersion(action.round, shot) if self.has_tokens(shot, action.round) else None
        require(action.tokens == expected, f"its global tokens are {expected}")
        if expected:
            require(expected in self.tokens, f"{expected} are not live")
            self.tokens[expected] = True

    def recall(self, action: Recall) -> None:
        first, wanted = self.first, LatentVersion(self.first - 1, self.steps)
        require(self.num_admitted == first < len(self.chunks), "comes after the first chunk")
        require(action.round == self.rules.gap * first, f"chunk {first} enters in round {self.rules.gap * first}")
        require(self.chunks[first].num_left > 0 and action.latents == wanted, f"chunk {first} goes on from {wanted}")
        require(wanted not in self.latents, f"{wanted} is live")
        self.latents.add(wanted)

    def begin(self, i: int, k: int, n: int) -> None:
        self.require_turn(i, k, n)
        self.require_taken(i, k)
        require(i < self.turn, f"chunk {self.turn} had its turn in this round: the order is newest first")
        self.turn = i
        self.require_latents(LatentVersion(i, k))

    def forecast(self, action: Forecast) -> None:
        i, k = action.chunk, action.step
        self.begin(i, k, action.round)
        require(k in self.rules.forecast, f"step {k} is to be computed")
        require(i in self.computed, "no step was computed before")
        self.velocity.add(i)
        self.num_forecasts += 1

    def forward(self, action: Forward) -> None:
        i, k = action.chunk, action.step
        self.begin(i, k, action.round)
        require(k not in self.rules.forecast, f"step {k} is to be forecast")
        require(self.gated == (action if k in self.rules.gated else None), f"the gate before is of {self.gated}")
        self.gated = None
        self.computed[i] = k
        self.require_left(action)
        self.require_right(action)
        self.require_tokens(action)
        self.require_shared(action)
        for kv in action.store:
            require((kv.chunk, kv.round) == (i, action.round), f"stores its own K/V of round {action.round}")
            require(kv not in self.kv, f"{kv} is stored twice")
            self.kv[kv] = (i, k)
            self.unread_kv.add(kv)
        self.velocity.add(i)
        self.num_units += 1

    def require_left(self, action: Forward) -> None:
        i, k = action.chunk, action.step
        if self.chunks[i].num_left == 0:
            require(action.left is None, "has no left context")
        elif i == self.first:
            require(action.left == LatentVersion(i - 1, self.steps), "the left context is what was recalled")
            self.require_latents(LatentVersion(i - 1, self.steps))
        elif self.rules.left == "cached":
            self.require_kv("left", action.left, KvVersion(i - 1, action.round - self.rules.gap, "last"), (i - 1, k))
        else:
            levels = {"same": k, "fresher": min(k + self.rules.gap, self.steps)}
            expected = LatentVersion(i - 1, levels[self.rules.left_level])
            require(action.left == expected, f"the left context is {expected}")
            self.require_latents(expected)

    def require_right(self, action: Forward) -> None:
        i, k = action.chunk, action.step
        if self.chunks[i].num_right == 0 or k < self.rules.gap:  # the right neighbour has not entered yet
            require(action.right is None, "has no right context")
        else:
            step = self.computed.get(i + 1, -1)
            expected = KvVersion(i + 1, action.round - (k - self.rules.gap - step))
            self.require_kv("right", action.right, expected, (i + 1, step))

    def require_shared(self, action: Forward) -> None:
        source = self.chunks[action.chunk].shares
        if source is None or action.step not in self.rules.sharing:
            require(action.shared is None, "shares nothing")
        else:
            expected = KvVersion(source, action.round - self.rules.gap * (action.chunk - source), "scene")
            self.require_kv("shared", action.shared, expected, (source, action.step))

    def require_kv(self, side: str, found: object, expected: KvVersion, unit: tuple[int, int]) -> None:
        require(found == expected, f"the {side} context is {expected}")
        require(self.kv.get(expected) == unit, f"the {side} context is K/V of step {unit[1]}")
        self.unread_kv.discard(expected)

    def step(self, action: Step) -> None:
        i, k = action.chunk, action.step
        self.require_turn(i, k, action.round)
        self.require_taken(i, k)
        require(i in self.velocity, f"neither forward nor forecast of step {k} was done")
        self.require_latents(LatentVersion(i, k))
        self.velocity.remove(i)
        self.taken[i] = k + 1
        self.latents.add(LatentVersion(i, k + 1))

    def finish(self, action: Finish) -> None:
        i = action.latents.chunk
        require(i == self.num_finished, f"chunk {self.num_finished} finishes next")
        require(action.latents.version == self.steps, f"chunk {i} finishes after {self.steps} steps")
        self.require_turn(i, self.steps - 1, action.round)
        self.require_taken(i, self.steps)
        self.require_latents(action.latents)
        self.num_finished += 1
        del self.entered[i], self.taken[i], self.computed[i]

    def require_turn(self, i: int, k: int, n: int) -> None:
        require(i in self.entered, f"chunk {i} is not in flight")
        require(n == self.entered[i] + k, f"step {k} of chunk {i} belongs to round {self.entered[i] + k}")

    def require_taken(self, i: int, steps: int) -> None:
        require(self.taken[i] == steps, f"chunk {i} has taken {self.taken[i]} steps")

    def require_latents(self, latents: LatentVersion) -> None:
        require(latents in self.latents, f"{latents} is not live")

    def end_round(self) -> None:
        """Between rounds only those values live that are still to be read; of global tokens none."""
        require(not self.tokens, f"{', '.join(map(str, self.tokens))} should have been dropped in round {self.round}")
        idle = [str(kv) for kv, unit in self.kv.items() if not self.kv_will_be_read(kv, unit)]
        idle += [str(latents) for latents in self.latents if not self.will_be_read(latents)]
        require(not idle, f"{', '.join(sorted(idle))} should have been dropped in round {self.round}")

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
        last = self.rules.gap * self.members(shot)[-1] + self.steps - 1
        rounds = range(max(first, self.round + 1), (first if v < self.steps else last) + 1)
        then = next((n for n in rounds if self.has_tokens(shot, n)), None)
        return then is not None and (i, v) in self.snapshot(shot, then)

    def steps_taken(self, i: int) -> int:
        return self.taken.get(i, 0 if i >= self.num_admitted else self.steps)

    def close(self) -> None:
        require(self.gated is None, "the forward of the last gate is missing")
        require(self.num_finished == len(self.chunks), f"{self.num_finished} of {len(self.chunks)} chunks finished")
        self.end_round()

    def report(self) -> Report:
        live = self.max_live_latents, self.max_live_kv, self.max_live_scenes
        num_rounds = self.round + 1 - self.rules.gap * self.first
        return Report(self.num_units, self.num_forecasts, num_rounds, *live)
