"""Check where decoding goes in a schedule, as `verify` checks the schedule itself: derived anew, action by action."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from longvid.parallel.actions import Action, Finish
from longvid.parallel.decoding import LAG, Decode, DecodeAction, Decoded, HandOut, Move, Moves, Piece
from longvid.parallel.findings import ScheduleError
from longvid.plan import Chunk, FilmSpan


def simulate_decoding(
    stream: Iterable[Action | DecodeAction],
    chunks: Sequence[Chunk],
    films: Sequence[FilmSpan],
    first_chunk: int = 0,
    resting: Mapping[int, int] | None = None,
) -> dict[int, int]:
    """Walk through a schedule with decoding in it. Returns how many latents each stage decodes.

    Of each film the chunks before `first_chunk` are decoded, and its decoder's state is at the stage of `resting`.
    Raises ScheduleError for a latent that is decoded before it is there, out of order, twice or never, or where its
    film's state is not; and for a round that is said to be decoded and is not.
    """
    simulation = _Simulation(chunks, films, dict(resting or {}))
    simulation.next = {index: (film.chunks.start + first_chunk, 0) for index, film in enumerate(films)}
    action: Action | DecodeAction | str = "empty schedule"
    try:
        for action in stream:
            simulation.apply(action)
        action = "end"
        simulation.close()
    except ScheduleError as error:
        raise ScheduleError(f"{str(action).strip()}: {error}") from None
    return simulation.decoded


@dataclass
class _Simulation:
    chunks: Sequence[Chunk]
    films: Sequence[FilmSpan]
    states: dict[int, int]
    next: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Of each film, the chunk and latent that come next."""
    finished: dict[int, int] = field(default_factory=dict)
    """The round in which each chunk finished that is not handed out."""
    handed_out: list[Piece] = field(default_factory=list)
    decoded: dict[int, int] = field(default_factory=dict)
    newest: int = -LAG - 1
    """The last round that was handed out."""
    told: int | None = None

    def apply(self, action: Action | DecodeAction) -> None:
        match action:
            case Moves(round=n, moves=moves):
                _require(self.told is None or self.told == n - 1, f"the rounds before {n} are not all decoded")
                for move in moves:
                    self.move(move)
            case HandOut(round=n, pieces=pieces):
                self.hand_out(n, pieces)
            case Decode():
                self.decode(action)
            case Decoded():
                self.settle(action)
            case _:
                # What comes behind the last round is early on purpose: nothing else is left to do.
                _require(action.round >= self.newest + LAG - 1, "a chunk was handed out too early")
                if isinstance(action, Finish):
                    self.finished[action.latents.chunk] = action.round

    def hand_out(self, n: int, pieces: Sequence[Piece]) -> None:
        expected = [chunk for chunk, finished in self.finished.items() if finished == n]
        _require(list(dict.fromkeys(piece.chunk for piece in pieces)) == expected, f"chunks {expected} finished then")
        self.handed_out += pieces
        self.newest = max(self.newest, n)
        for chunk in expected:
            del self.finished[chunk]

    def decode(self, action: Decode) -> None:
        piece = action.piece
        _require(bool(self.handed_out) and self.handed_out[0] == piece, "it is not the next that was handed out")
        self.handed_out.pop(0)
        span = self.films[piece.film].chunks
        _require(self.next[piece.film] == (piece.chunk, piece.first), f"{self.next[piece.film]} comes next")
        _require(self.states.get(piece.film, piece.stage) == piece.stage, "the film's state is on another stage")
        _require(piece.first < piece.stop <= self.chunks[piece.chunk].num_latents, "there are no such latents")
        self.decoded[piece.stage] = self.decoded.get(piece.stage, 0) + piece.stop - piece.first
        is_whole = piece.stop == self.chunks[piece.chunk].num_latents
        self.next[piece.film] = (piece.chunk + 1, 0) if is_whole else (piece.chunk, piece.stop)
        self.states[piece.film] = piece.stage
        _require(action.ends_chunk == is_whole, "the chunk's end is said wrongly")
        _require(action.ends_film == (self.next[piece.film][0] == span.stop), "the film's end is said wrongly")
        if action.ends_film:
            del self.states[piece.film]
        elif action.move:
            self.move(action.move)

    def move(self, move: Move) -> None:
        film = move.piece.film
        _require(self.states.get(film) == move.source, f"the state of film {film} is not on stage {move.source}")
        _require(self.next[film] == (move.piece.chunk, move.piece.first), "another piece comes next")
        self.states[film] = move.piece.stage

    def settle(self, action: Decoded) -> None:
        n = action.round
        _require(self.told is None or n == self.told + 1, "rounds follow each other")
        _require(not self.handed_out, f"{self.handed_out[:1]} is not decoded")
        _require(all(finished > n for finished in self.finished.values()), "chunks that finished are not handed out")
        _require(dict(action.resting) == self.states, f"states rest at {self.states}")
        self.told = n

    def close(self) -> None:
        _require(not self.finished and not self.handed_out, "finished chunks are not decoded")
        for film, (chunk, _) in self.next.items():
            _require(chunk == self.films[film].chunks.stop, f"of film {film} chunk {chunk} is never decoded")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ScheduleError(message)
