"""Chunks side by side, simulated: a walk through their Actions that derives anew what each must find.

`verify.simulate` feeds it. It shares the Actions and the rules with what makes such a schedule (`chunk_units.py`), and
none of its arithmetic.
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
    LatentVersion,
    OverlapVersion,
    Step,
)
from longvid.parallel.findings import Report, require
from longvid.parallel.rules import ChunkRules
from longvid.plan import Chunk


@dataclass
class ChunkSimulation:
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
        require(self.gated is None or isinstance(action, Forward), "a gate's forward follows at once")
        if action.round != self.round:
            self.begin_round(action.round)
        match action:
            case Admit():
                self.admit(action)
            case Encode():
                self.encode(action)
            case DropGlobals(tokens=tokens):
                require(tokens in self.tokens, f"{tokens} are not live")
                self.tokens.remove(tokens)
            case Gate(forward=forward):
                require(forward.step in self.rules.gated, f"step {forward.step} has no gate")
                self.gated = forward
            case Forward():
                self.forward(action)
            case Forecast(chunk=i, step=k):
                self.take_turn(i, k)
                require(not self.is_computed, f"step {k} is to be computed")
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
                require(False, "no K/V are kept")
        self.max_live_latents = max(self.max_live_latents, len(self.latents))

    def begin_round(self, n: int) -> None:
        require(n == self.round + 1, f"comes after round {self.round}")
        self.end_round()
        self.round = n
        if self.step_at_hand == 0:
            groups = self.rules.groups(len(self.chunks))
            require(n // self.steps < len(groups), "all chunks are finished")
            self.group = groups[n // self.steps]
            self.taken = {}
        self.turn = self.group.start

    def admit(self, action: Admit) -> None:
        i = action.chunk
        require(i == self.num_admitted and i in self.group, f"chunk {self.num_admitted} of {self.group} is next")
        require(self.step_at_hand == 0, "chunks enter with their group")
        require(action.group == self.group, f"the group is {self.group}")
        self.require_note(LatentVersion(i, 0), is_left=action.is_left)
        self.num_admitted += 1
        self.taken[i] = 0
        self.latents.add(LatentVersion(i, 0))

    def encode(self, action: Encode) -> None:
        require(self.has_tokens(action.shot), "no unit of this round reads global tokens")
        members = [i for i in self.group if self.chunks[i].shot == action.shot]
        require(bool(members), f"shot {action.shot} is not in the group")
        expected = [LatentVersion(i, self.steps) for i in self.memory(action.shot)]
        expected += [LatentVersion(i, self.step_at_hand) for i in members if self.step_at_hand > 0]
        require(action.latents == tuple(expected), f"they are made of {expected}")
        readers = list(action.readers or ())
        require(readers == members, f"they are read by {members}")
        for latents in action.latents:
            self.require_latents(latents)
        require(action.tokens not in self.tokens, f"{action.tokens} are made twice")
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
        require(k == self.step_at_hand, f"step {self.step_at_hand} belongs to round {self.round}")
        require(i == self.turn and i in self.taken, f"chunk {self.turn} is next: the order is that of the film")
        require(self.taken[i] == k, f"chunk {i} has taken {self.taken[i]} steps")
        self.require_latents(LatentVersion(i, k))
        self.turn = i + 1
        self.velocity.add(i)

    def forward(self, action: Forward) -> None:
        i, k = action.chunk, action.step
        self.take_turn(i, k)
        require(self.is_computed, f"step {k} is to be forecast")
        require(self.gated == (action if k in self.rules.gated else None), f"the gate before is of {self.gated}")
        self.gated = None
        require(action.right is None and not action.store, "a chunk sees no K/V, and keeps none")
        before = LatentVersion(i - 1, k if i > self.group.start else self.steps)
        expected = before if self.chunks[i].num_left else None
        require(action.left == expected, f"the left context is {expected}")
        if expected:
            self.require_latents(expected)
        shot = self.chunks[i].shot
        tokens = GlobalVersion(self.round, shot) if self.has_tokens(shot) else None
        require(action.tokens == tokens, f"its global tokens are {tokens}")
        require(tokens is None or tokens in self.tokens, f"{tokens} are not live")
        overlap = OverlapVersion(i, k) if self.is_fused(i - 1) else None
        require(action.overlap == overlap, f"the overlap is {overlap}")
        if overlap:
            self.overlaps.add(overlap)
        self.num_units += 1

    def is_fused(self, i: int) -> bool:
        """Whether what chunk i+1 predicts for chunk i counts in this round."""
        both = i in self.group and i + 1 in self.group and self.chunks[i + 1].num_left > 0
        return both and self.is_computed and self.step_at_hand < self.rules.fused_steps

    def fuse(self, action: Fuse) -> None:
        i, k = action.chunk, action.step
        require(k == self.step_at_hand and i in self.velocity, f"chunk {i} has no velocity of step {k}")
        require(action.overlap == OverlapVersion(i + 1, k), f"fuses with what chunk {i + 1} predicts at step {k}")
        require(action.overlap in self.overlaps, f"{action.overlap} is not live")
        self.overlaps.remove(action.overlap)
        self.fused.add(i)

    def step(self, action: Step) -> None:
        i, k = action.chunk, action.step
        require(k == self.step_at_hand and i in self.velocity, f"neither forward nor forecast of step {k} was done")
        require((i in self.fused) == self.is_fused(i), "what the chunk after predicts is to be fused before")
        self.require_latents(LatentVersion(i, k))
        self.require_note(LatentVersion(i, k + 1), is_left=action.is_left)
        self.velocity.remove(i)
        self.fused.discard(i)
        self.taken[i] = k + 1
        self.latents.add(LatentVersion(i, k + 1))

    def finish(self, action: Finish) -> None:
        i = action.latents.chunk
        require(i == self.num_finished, f"chunk {self.num_finished} finishes next")
        require(action.latents.version == self.steps == self.taken.get(i), f"finishes after {self.steps} steps")
        self.require_latents(action.latents)
        self.num_finished += 1

    def require_note(self, latents: LatentVersion, *, is_left: bool) -> None:
        """Whether the chunk after reads them is said where they are made."""
        expected = self.reader_to_come(latents)
        require(is_left == expected, f"{latents} is {'' if expected else 'not '}left context")

    def reader_to_come(self, latents: LatentVersion) -> bool:
        i, v = latents.chunk + 1, latents.version
        if i == len(self.chunks) or self.chunks[i].num_left == 0:
            return False
        return v < self.steps and v not in self.rules.forecast if i in self.group else v == self.steps

    def require_latents(self, latents: LatentVersion) -> None:
        require(latents in self.latents, f"{latents} is not live")

    def end_round(self) -> None:
        """Every chunk of the group took its step, and only those latents live that are still to be read."""
        if self.round < 0:
            return
        behind = [i for i in self.group if self.taken.get(i) != self.step_at_hand + 1]
        require(not behind, f"chunks {behind} did not take the step of round {self.round}")
        require(not self.overlaps, f"{', '.join(map(str, self.overlaps))} are not used")
        require(not self.tokens, f"{', '.join(map(str, self.tokens))} should have been dropped in round {self.round}")
        idle = self.latents - self.to_be_read()
        require(not idle, f"{', '.join(sorted(map(str, idle)))} should have been dropped in round {self.round}")

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
        require(self.gated is None, "the forward of the last gate is missing")
        require(self.num_finished == len(self.chunks), f"{self.num_finished} of {len(self.chunks)} chunks finished")
        self.end_round()

    def report(self) -> Report:
        return Report(self.num_units, self.num_forecasts, self.round + 1, self.max_live_latents, max_live_kv=0)
