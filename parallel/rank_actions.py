"""What one rank does: actions of the schedule, sends and receives, and what belongs to saving and decoding.

``longvid.parallel.pipeline`` makes a program of them; the executor carries it out.
"""

from __future__ import annotations

from dataclasses import dataclass

from longvid.parallel.actions import Action, Encode, Forward, KvVersion, LatentVersion
from longvid.parallel.decoding import Decode, Piece


@dataclass(frozen=True, slots=True)
class Hidden:
    """Activations of a unit that leave `stage`; `with_left`: those of left context too, where it is recomputed.

    `with_tokens`: the global tokens that its layers read travel along.
    """

    chunk: int
    step: int
    stage: int
    with_left: bool
    with_tokens: bool = False

    @classmethod
    def of(cls, forward: Forward, stage: int) -> Hidden:
        """What leaves a stage after a forward."""
        with_left = isinstance(forward.left, LatentVersion)
        return cls(forward.chunk, forward.step, stage, with_left, forward.tokens is not None)

    def __str__(self) -> str:
        return f"hidden c{self.chunk} k{self.step}"


@dataclass(frozen=True, slots=True)
class Velocity:
    """What the last stage predicts for a unit; `guidance` is the place of its rank on that axis."""

    chunk: int
    step: int
    guidance: int

    def __str__(self) -> str:
        return f"velocity c{self.chunk} k{self.step}" + (f" branch {self.guidance}" if self.guidance else "")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the leader decides at a gate, for the other ranks of stage 0. It is all in the header."""

    chunk: int
    step: int

    def __str__(self) -> str:
        return f"verdict c{self.chunk} k{self.step}"


@dataclass(frozen=True, slots=True)
class Overlap:
    """What the last stage predicts for a unit's left context, for the owner of that; `guidance` as in Velocity."""

    chunk: int
    step: int
    guidance: int

    def __str__(self) -> str:
        return f"overlap c{self.chunk} k{self.step}" + (f" branch {self.guidance}" if self.guidance else "")


@dataclass(frozen=True, slots=True)
class Border:
    """What the chunk after sees of latents as left context, for the ranks that have it."""

    chunk: int
    step: int

    @property
    def latents(self) -> LatentVersion:
        return LatentVersion(self.chunk, self.step)

    def __str__(self) -> str:
        return f"border {self.latents}"


@dataclass(frozen=True, slots=True)
class Loan:
    """Latents of a chunk, for the rank that computes its next unit for their owner."""

    chunk: int
    step: int

    @property
    def latents(self) -> LatentVersion:
        return LatentVersion(self.chunk, self.step)

    def __str__(self) -> str:
        return f"loan {self.latents}"


@dataclass(frozen=True, slots=True)
class Notice:
    """What the leader knows of saves as a round begins, for ranks of other chunks. It is all in the header."""

    round: int

    def __str__(self) -> str:
        return f"notice {self.round}"


@dataclass(frozen=True, slots=True)
class Seen:
    """What a shot's global tokens see of the key latents of each of these chunks, which one place has."""

    latents: tuple[LatentVersion, ...]

    @property
    def chunk(self) -> int:
        return self.latents[0].chunk

    @property
    def step(self) -> int:
        return self.latents[0].version

    def __str__(self) -> str:
        return f"seen {' '.join(map(str, self.latents))}"


@dataclass(frozen=True, slots=True)
class Halfway:
    """What a part of the decoder's layers made of a finished chunk, for the rank that has those behind them."""

    chunk: int

    def __str__(self) -> str:
        return f"halfway c{self.chunk}"


@dataclass(frozen=True, slots=True)
class PieceLatents:
    """Finished latents that the receiver is to decode."""

    piece: Piece

    def __str__(self) -> str:
        return f"latents {self.piece}"


@dataclass(frozen=True, slots=True)
class PieceFrames:
    """What was made of a piece, for the leader."""

    piece: Piece

    def __str__(self) -> str:
        return f"frames {self.piece}"


@dataclass(frozen=True, slots=True)
class DecoderState:
    """Where a film's decoder is before it comes to a piece."""

    piece: Piece

    def __str__(self) -> str:
        return f"decoder before {self.piece}"


@dataclass(frozen=True, slots=True)
class KeptState:
    """Where a film's decoder is when all chunks that finished until `round` are decoded, if a checkpoint or the film's
    end asks for it. With `is_asked` the leader's question, which is all in the header.
    """

    film: int
    round: int
    is_end: bool = False
    is_asked: bool = False

    def __str__(self) -> str:
        return f"{'ask for ' * self.is_asked}decoder of film {self.film} after {self.round}"


Message = (
    Hidden
    | Velocity
    | Verdict
    | Overlap
    | Border
    | Loan
    | Notice
    | Seen
    | Halfway
    | LatentVersion
    | PieceLatents
    | PieceFrames
    | DecoderState
    | KeptState
)
BULKY = Hidden | Halfway
"""Messages of which no more are under way between two ranks than there are buffers."""


@dataclass(frozen=True, slots=True)
class Send:
    """Give a message on its way to another rank."""

    round: int
    message: Message
    to: int

    def __str__(self) -> str:
        return f"{self.round:5}  send     {self.message}  to {self.to}"


@dataclass(frozen=True, slots=True)
class Receive:
    """Wait for a message of another rank."""

    round: int
    message: Message
    source: int

    def __str__(self) -> str:
        return f"{self.round:5}  receive  {self.message}  from {self.source}"


@dataclass(frozen=True, slots=True)
class Boundary:
    """All units of `round` and before are through this rank's layers, none of a later round is.

    `kv` live on across it. Here the leader may decide to save the state after round + SAVE_NOTICE; the decision
    travels in the headers of messages. Every rank has a message that was sent later before it comes to that boundary:
    the stages by the next hidden states, the leader's peers by steps, which are put off two rounds at most, and ranks
    of other chunks by the round's notice.
    """

    round: int
    kv: tuple[KvVersion, ...]

    def __str__(self) -> str:
        return f"{self.round:5}  boundary {' '.join(map(str, self.kv))}".rstrip()


@dataclass(frozen=True, slots=True)
class SaveLatents:
    """On owners: every step of `round` is taken, and `latents` are those that live on there."""

    round: int
    latents: tuple[LatentVersion, ...]

    def __str__(self) -> str:
        return f"{self.round:5}  save     {' '.join(map(str, self.latents))}"


@dataclass(frozen=True, slots=True)
class DropBorder:
    """Forget what this rank had received of another's latents."""

    round: int
    latents: LatentVersion

    def __str__(self) -> str:
        return f"{self.round:5}  drop     border {self.latents}"


@dataclass(frozen=True, slots=True)
class Look:
    """Find what a shot's global tokens see of own chunks' key latents; `encode` merges it with what others found."""

    encode: Encode
    own: tuple[LatentVersion, ...]

    @property
    def round(self) -> int:
        return self.encode.round

    def __str__(self) -> str:
        return f"{self.round:5}  look     at {' '.join(map(str, self.own))}"


@dataclass(frozen=True, slots=True)
class HandOn:
    """Have finished latents, or what was made of them so far, go through this rank's part of the decoder."""

    round: int
    latents: LatentVersion

    def __str__(self) -> str:
        return f"{self.round:5}  decode   part of c{self.latents.chunk}"


@dataclass(frozen=True, slots=True)
class KeepState:
    """On the leader, which has it: remember where a film's decoder is, as `KeptState` says."""

    round: int
    film: int
    is_end: bool = False

    def __str__(self) -> str:
        return f"{self.round:5}  keep     decoder of film {self.film}"


@dataclass(frozen=True, slots=True)
class Show:
    """All frames of a chunk are on the leader: hand them out."""

    round: int
    chunk: int

    def __str__(self) -> str:
        return f"{self.round:5}  show     c{self.chunk}"


@dataclass(frozen=True, slots=True)
class SaveFilms:
    """On the leader: all chunks that finished until the end of `round` are decoded and shown."""

    round: int

    def __str__(self) -> str:
        return f"{self.round:5}  save     films"


RankAction = (
    Action
    | Send
    | Receive
    | Boundary
    | SaveLatents
    | DropBorder
    | Look
    | HandOn
    | Decode
    | KeepState
    | Show
    | SaveFilms
)


def name_of(action: RankAction) -> str:
    """An action without its round, for people."""
    return str(action)[5:].strip()
