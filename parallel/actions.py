"""Actions: the words that schedules are made of. A schedule is a stream of them, and programs are made of it.

Each names the values that it reads and makes (`z3@5`: the latents of chunk 3 after 5 steps; `kv4@7`: the K/V of chunk 4
from round 7), so that whoever carries it out does no arithmetic and never polls. `schedule.py` makes them, `verify.py`
proves a stream of them right, `pipeline.py` puts sends and receives between them, and the executor has a case for each.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

Edge = Literal["first", "last", "scene"]
_EDGES: dict[Edge, str] = {"first": "<", "last": ">", "scene": "|"}


@dataclass(frozen=True, slots=True)
class LatentVersion:
    """A chunk's own latents after `version` steps: noise at 0, finished when it equals the number of steps."""

    chunk: int
    version: int

    def __str__(self) -> str:
        return f"z{self.chunk}@{self.version}"


@dataclass(frozen=True, slots=True)
class KvVersion:
    """K/V of every layer for a chunk's first or last own latents, as its forward of `round` computed them.

    Those of a `scene`'s end are of late layers alone.
    """

    chunk: int
    round: int
    edge: Edge = "first"

    def __str__(self) -> str:
        return f"kv{self.chunk}{_EDGES[self.edge]}@{self.round}"


@dataclass(frozen=True, slots=True)
class OverlapVersion:
    """The velocity that a chunk's forward at `step` predicts for its left context, the last latents of another."""

    chunk: int
    step: int

    def __str__(self) -> str:
        return f"v{self.chunk}<@{self.step}"


@dataclass(frozen=True, slots=True)
class GlobalVersion:
    """The global tokens that the units of a shot read in a round."""

    round: int
    shot: int = 0

    def __str__(self) -> str:
        return f"g{self.shot}@{self.round}"


@dataclass(frozen=True, slots=True)
class Admit:
    """Draw z[chunk]@0 and begin a solver history.

    In the chunk schedule: with the others of `group`; `is_left` says that the chunk after reads z[chunk]@0.
    """

    round: int
    chunk: int
    group: range | None = None
    is_left: bool = False

    def __str__(self) -> str:
        return f"{self.round:5}  admit    c{self.chunk}{_left_of(self.chunk, self.is_left)}"


@dataclass(frozen=True, slots=True)
class Encode:
    """Make a shot's global tokens for a round, of the key latents in these `latents`.

    In the chunk schedule: for the units of `readers`.
    """

    round: int
    latents: tuple[LatentVersion, ...]
    shot: int = 0
    readers: range | None = None

    @property
    def tokens(self) -> GlobalVersion:
        return GlobalVersion(self.round, self.shot)

    def __str__(self) -> str:
        return f"{self.round:5}  encode   {self.tokens}  of {' '.join(map(str, self.latents))}"


@dataclass(frozen=True, slots=True)
class Recall:
    """Take up the last latents of the film that goes on, of as many as there is left context."""

    round: int
    latents: LatentVersion

    def __str__(self) -> str:
        return f"{self.round:5}  recall   {self.latents}"


@dataclass(frozen=True, slots=True)
class Forward:
    """Predict the velocity at z[chunk]@step, with context `left` and `right`, and in late layers `shared`.

    Keep K/V as each of `store`. With `overlap`, predict and keep that too. With `tokens`, its layers read global
    tokens, too.
    """

    round: int
    chunk: int
    step: int
    left: LatentVersion | KvVersion | None = None
    right: KvVersion | None = None
    store: tuple[KvVersion, ...] = ()
    tokens: GlobalVersion | None = None
    overlap: OverlapVersion | None = None
    shared: KvVersion | None = None

    def __str__(self) -> str:
        names = ("left", "right", "shared", "tokens", "overlap")
        context = [f"  {name} {value}" for name in names if (value := getattr(self, name))]
        context += [f"  store {value}" for value in self.store]
        return f"{self.round:5}  forward  c{self.chunk} k{self.step}{''.join(context)}"


@dataclass(frozen=True, slots=True)
class Gate:
    """Run the first layers of the forward that follows, and decide whether the others are to run."""

    forward: Forward

    @property
    def round(self) -> int:
        return self.forward.round

    def __str__(self) -> str:
        return f"{self.round:5}  gate     c{self.forward.chunk} k{self.forward.step}"


@dataclass(frozen=True, slots=True)
class Forecast:
    """Predict the velocity of a step from those of the chunk's computed steps, without a forward."""

    round: int
    chunk: int
    step: int

    def __str__(self) -> str:
        return f"{self.round:5}  forecast c{self.chunk} k{self.step}"


@dataclass(frozen=True, slots=True)
class Fuse:
    """Fuse what the chunk after predicts for the last latents of z[chunk]@step into their velocity, with weights that
    rise linearly towards that chunk. It is used up.
    """

    round: int
    chunk: int
    step: int
    overlap: OverlapVersion

    def __str__(self) -> str:
        return f"{self.round:5}  fuse     c{self.chunk} k{self.step}  with {self.overlap}"


@dataclass(frozen=True, slots=True)
class Step:
    """Make z[chunk]@step+1 of z[chunk]@step and the velocity of that step, which is used up.

    `is_left`: the chunk after reads what it makes, in a chunk schedule.
    """

    round: int
    chunk: int
    step: int
    is_left: bool = False

    def __str__(self) -> str:
        return f"{self.round:5}  step     c{self.chunk} k{self.step}{_left_of(self.chunk, self.is_left)}"


@dataclass(frozen=True, slots=True)
class Finish:
    """Hand out a chunk's finished latents and end its solver history."""

    round: int
    latents: LatentVersion

    def __str__(self) -> str:
        return f"{self.round:5}  finish   {self.latents}"


@dataclass(frozen=True, slots=True)
class DropLatents:
    """Forget latents: nothing reads them any more."""

    round: int
    latents: LatentVersion

    def __str__(self) -> str:
        return f"{self.round:5}  drop     {self.latents}"


@dataclass(frozen=True, slots=True)
class DropKv:
    """Forget K/V: nothing reads them any more."""

    round: int
    kv: KvVersion

    def __str__(self) -> str:
        return f"{self.round:5}  drop     {self.kv}"


@dataclass(frozen=True, slots=True)
class DropGlobals:
    """Forget global tokens: nothing reads them any more."""

    round: int
    tokens: GlobalVersion

    def __str__(self) -> str:
        return f"{self.round:5}  drop     {self.tokens}"


Action = Admit | Recall | Encode | Gate | Forward | Forecast | Fuse | Step | Finish | DropLatents | DropKv | DropGlobals


def _left_of(chunk: int, is_left: bool) -> str:
    return f"  left of c{chunk + 1}" if is_left else ""


def shift(action: Action, chunks: int, rounds: int) -> Action:
    """The same action, with chunks and rounds that are so many further. Shots are those of the plan already."""
    if not chunks and not rounds:
        return action
    if isinstance(action, Gate):
        forward = shift(action.forward, chunks, rounds)
        assert isinstance(forward, Forward)
        return Gate(forward)
    moved = {item.name: _shifted(getattr(action, item.name), chunks, rounds) for item in fields(action)}
    if "chunk" in moved:
        moved["chunk"] += chunks
    return replace(action, **{**moved, "round": action.round + rounds})


def _shifted(value: Any, chunks: int, rounds: int) -> Any:
    """A value that an action names; or several."""
    match value:
        case LatentVersion():
            return LatentVersion(value.chunk + chunks, value.version)
        case KvVersion():
            return KvVersion(value.chunk + chunks, value.round + rounds, value.edge)
        case GlobalVersion():
            return GlobalVersion(value.round + rounds, value.shot)
        case tuple():
            return tuple(_shifted(item, chunks, rounds) for item in value)
        case range():
            return range(value.start + chunks, value.stop + chunks)
    return value
