"""Films that are made together, kept apart: each has a writer, checkpoints, and a place in the decoder of its own.

To the executor they are one plan. What it saves is split by film, chunks and rounds counted within each, so that every
film can be resumed alone, or with others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longvid.checkpoint import CheckpointSaver, Ended, FilmState, Saved
from longvid.decode import DecoderStates
from longvid.ending import Ending
from longvid.errors import Preempted
from longvid.events import Event, FilmDone
from longvid.manifest import Manifest, has_checkpoint
from longvid.parallel.actions import KvVersion, LatentVersion
from longvid.parallel.run_state import KEPT, Live
from longvid.parallel.stage import KvSpan
from longvid.plan import FilmSpan, Plan
from longvid.sampler import Sampler, Solver
from longvid.script import Script
from longvid.settings import OutputSettings
from longvid.writer import FilmWriter, WriterState

T = TypeVar("T")
Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class Film:
    """A film to be made, as the leader tells all ranks."""

    path: Path
    script: Script
    plan: Plan
    manifest: Manifest | None = None
    fingerprint: dict[str, Any] = field(default_factory=dict)
    ending: Ending | None = None
    """Of the film that goes on."""


@dataclass(frozen=True)
class Job:
    """The films of one render, and their plans as one; `done` is the last round that they have behind them."""

    films: tuple[Film, ...]
    plan: Plan
    done: int


@dataclass(frozen=True)
class Clip:
    """Frames of one of the films, uint8 [T, H, W, 3]; maybe none. Those `behind` its shot's end are not of it."""

    film: int
    frames: Frames
    behind: Frames
    is_last: bool


@dataclass
class FilmSavers:
    """The executor's `Saver` for all films of a plan. `last_rounds` are those in which films end, for there is nothing
    left to save of them."""

    films: Sequence[FilmSpan]
    last_rounds: Sequence[int]
    savers: Sequence[CheckpointSaver]
    _saving: list[int] = field(default_factory=list)

    def is_due(self, done: int) -> bool:
        under_way = [self.savers[i] for i in self._under_way(done)]
        if under_way and all(saver.is_saved_for_preemption for saver in under_way):
            raise Preempted
        # Each is asked, for then it tells what became of its last save; but one that is saved waits for no other.
        are_due = [saver.is_due() for saver in under_way if not saver.is_saved_for_preemption]
        return any(are_due) and not any(saver.is_busy for saver in under_way)

    @property
    def is_saved_for_preemption(self) -> bool:
        """On the leader: whether all films that were saved last were, since somebody asked for pre-emption."""
        return bool(self._saving) and all(self.savers[i].is_saved_for_preemption for i in self._saving)

    def save_kv(self, done: int, kv: dict[KvVersion, KvSpan]) -> None:
        self._saving = self._under_way(done)
        for i in self._saving:
            film = self.films[i]
            own = {_kv_of(film, version): span for version, span in kv.items() if version.chunk in film.chunks}
            self.savers[i].save_kv(done - film.first_round, own)

    def save_latents(self, done: int, latents: dict[LatentVersion, Tensor], solvers: dict[int, Solver]) -> None:
        for i in self._saving:
            film, first = self.films[i], self.films[i].chunks.start
            own = {LatentVersion(v.chunk - first, v.version): x for v, x in latents.items() if v.chunk in film.chunks}
            histories = {chunk - first: solver for chunk, solver in solvers.items() if chunk in film.chunks}
            self.savers[i].save_latents(done - film.first_round, own, histories)

    def save_films(self, done: int) -> None:
        for i in self._saving:
            self.savers[i].save_film()

    def close(self) -> None:
        for saver in self.savers:
            saver.close()

    def _under_way(self, done: int) -> list[int]:
        """The films of which something lives on after a round."""
        spans = zip(self.films, self.last_rounds, strict=True)
        return [i for i, (film, last) in enumerate(spans) if film.first_round <= done < last]


def _kv_of(film: FilmSpan, version: KvVersion) -> KvVersion:
    """A version of the plan as the film itself counts."""
    n = version.round if version.round == KEPT else version.round - film.first_round
    return KvVersion(version.chunk - film.chunks.start, n, version.edge)


def join_live(films: Sequence[FilmSpan], saved: Sequence[Saved | None], sampler: Sampler) -> Live:
    """What lives on of all films, as the plan counts."""
    live = Live()
    for film, of_film in zip(films, saved, strict=True):
        if of_film is None:
            continue
        own, first = of_film.live(sampler), film.chunks.start
        live.latents |= {LatentVersion(first + v.chunk, v.version): value for v, value in own.latents.items()}
        live.borders |= {LatentVersion(first + v.chunk, v.version): value for v, value in own.borders.items()}
        live.kv |= {KvVersion(first + v.chunk, film.first_round + v.round, v.edge): kv for v, kv in own.kv.items()}
        live.solvers |= {first + chunk: solver for chunk, solver in own.solvers.items()}
        live.kept |= {(first + chunk, edge): kv for (chunk, edge), kv in own.kept.items()}
    return live


def join_memory(
    films: Sequence[FilmSpan], of_films: Sequence[Mapping[tuple[int, int, int], T]]
) -> dict[tuple[int, int, int], T]:
    """What policies remember by (chunk, branch, layer) of every film, as the plan counts."""
    return {
        (film.chunks.start + chunk, branch, layer): value
        for film, memory in zip(films, of_films, strict=True)
        for (chunk, branch, layer), value in memory.items()
    }


@dataclass
class FilmSet:
    """The films of a render while they are made. There are writers on the leader alone, which `open` makes.

    Leaving the context closes the writers, which keeps what there is playable. `lasts` are the last finished latents of
    each film's shot at hand, and `keep_ending` keeps how a film ended that may go on.
    """

    job: Job
    decoders: DecoderStates | None
    on_event: Callable[[Event], None]
    keep_ending: Callable[[Film, Ended, WriterState], None]
    lasts: dict[int, Tensor]
    writers: list[FilmWriter] = field(default_factory=list)
    saver: FilmSavers | None = None
    _keeping: list[bool] = field(default_factory=list)
    _ended: Clip | None = None
    _finished: set[int] = field(default_factory=set)
    _started: float = field(default_factory=time.monotonic)
    _stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def open(self, saved: Sequence[Saved | None], output: OutputSettings, ended: Ended | None) -> None:
        """Every film's writer, where its checkpoint says, and its place in the decoder.

        `ended` is what the film goes on from that has an ending.
        """
        for index, (film, before) in enumerate(zip(self.job.films, saved, strict=True)):
            keeps = bool(film.fingerprint) and (output.keep_state or film.ending is not None)
            self._keeping.append(keeps)
            shape: dict[str, Any] = {"width": film.plan.width, "height": film.plan.height, "fps": film.plan.fps}
            shape["output"] = output.model_copy(update={"keep_state": keeps})
            writer = self._open(index, film, before, ended, shape)
            self.writers.append(self._stack.enter_context(writer))

    def _open(
        self, index: int, film: Film, before: Saved | None, ended: Ended | None, shape: dict[str, Any]
    ) -> FilmWriter:
        if before is not None:
            assert before.film and self.decoders
            self.decoders.load(index, before.film.decoder)
            if before.film.last is not None:
                self.lasts[index] = before.film.last
            return FilmWriter.resume(film.path, **shape, state=before.film.writer)
        if film.ending is None:
            return FilmWriter(film.path, **shape)
        assert ended and self.decoders
        self.decoders.load(index, ended.decoder)
        self.lasts[index] = ended.last
        state = WriterState(film.ending.segments, ended.frames[:0].numpy(), tuple(film.ending.short))
        writer = FilmWriter.resume(film.path, **shape, state=state)
        if film.plan.chunks[film.plan.first_chunk].start:  # the shot goes on, and its last latent held these frames
            writer.append(ended.frames.numpy())
        return writer

    def state(self, film: int) -> FilmState:
        """What a checkpoint keeps of a film."""
        assert self.decoders
        return FilmState(self.decoders.state(film), self.writers[film].state(), self.lasts.get(film))

    def add(self, clip: Clip) -> None:
        """Write the next frames. A film is finished when the next clip comes, so that all was told of its last one."""
        self.finish_ended()
        self.writers[clip.film].append(clip.frames)
        self._ended = clip if clip.is_last else None

    def finish_ended(self) -> None:
        if self._ended is None:
            return
        clip, film, self._ended = self._ended, self._ended.film, None
        if self.saver:
            self.saver.savers[film].close()
        assert self.decoders
        ended = Ended(self.lasts.pop(film), self.decoders.state(film), torch.from_numpy(clip.behind))
        self.decoders.end(film)
        path = self.writers[film].finish()
        if self._keeping[film]:
            self.keep_ending(self.job.films[film], ended, self.writers[film].state())
        self._finished.add(film)
        self.on_event(FilmDone(path, self.job.films[film].plan.num_frames, time.monotonic() - self._started))

    def what_is_left(self) -> str:
        """After Ctrl-C: what there is of the films that are not finished."""
        left = (writer for i, writer in enumerate(self.writers) if i not in self._finished)
        return "; ".join(map(_what_is_left, left)) or "interrupted"

    def what_is_saved(self) -> str:
        """After a pre-emption: what there is to go on from."""
        kept = [film.path for i, film in enumerate(self.job.films) if i not in self._finished]
        rounds = [str(Manifest.read(path).round + 1) for path in kept if has_checkpoint(path)]
        if not rounds:
            return "stopped before the first checkpoint; the same command begins anew"
        done = (
            f"round {rounds[0]}" if len(self.job.films) == 1 else f"rounds {', '.join(rounds)} of the films under way"
        )
        if self.saver and self.saver.is_saved_for_preemption:
            return f"stopped, and saved after {done}; the same command with --resume goes on"
        return f"stopped; there was no time to save more than the checkpoint after {done}: --resume goes on from there"


def _what_is_left(writer: FilmWriter) -> str:
    path, partial = writer.path, writer.partial()
    go_on = "; --resume goes on with it" if has_checkpoint(path) else ""
    if partial is None:
        return f"interrupted before the first chunk was finished; {path} was not written{go_on}"
    return f"interrupted; what was finished is in {partial}{go_on}"
