"""What a render reports while it runs: typed events, for a callback or a progress bar."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Started:
    """Planning is done and denoising begins. With several films, counts in this and other events are of all."""

    num_frames: int
    num_chunks: int
    num_rounds: int
    width: int
    height: int
    fps: float
    num_films: int = 1


@dataclass(frozen=True)
class RoundDone:
    """One pass over the queue: ``units`` chunks took one step each. ``round`` counts from 1.

    ``units_done`` of ``num_units`` is the share of the work that is done: rounds differ in length.
    """

    round: int
    num_rounds: int
    units: int
    units_done: int
    num_units: int


@dataclass(frozen=True)
class ChunkDone:
    """A chunk's frames are decoded: ``chunk`` chunks are done, and ``frames_done`` frames."""

    chunk: int
    num_chunks: int
    frames_done: int


@dataclass(frozen=True)
class PromptChanged:
    """The film follows another prompt from a frame on, the first of ``chunk``, which counts from 1."""

    prompt: str
    chunk: int
    first_frame: int


@dataclass(frozen=True)
class Notice:
    """Something the user should know although the work goes on."""

    text: str


@dataclass(frozen=True)
class FilmDone:
    """A film is complete at ``path``, so many seconds after the start."""

    path: Path
    num_frames: int
    seconds: float


Event = Started | RoundDone | ChunkDone | PromptChanged | Notice | FilmDone
