"""Progress: a render's events as a bar on a terminal, and as plain lines elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.text import Text

from longvid.events import ChunkDone, Event, FilmDone, Notice, RoundDone, Started

Clock = Callable[[], float]

LINE_EVERY_S = 5.0
"""Plain lines come no faster than this, for they may go to a log."""
_RECENT_ROUNDS = 8


@dataclass
class Tally:
    """How far a render is, counted from its events."""

    clock: Clock = time.monotonic
    plan: Started | None = None
    began: float = 0.0
    round: int = 0
    num_units: int = 0
    chunk: int = 0
    frames_done: int = 0
    films_done: int = 0
    _ends: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=_RECENT_ROUNDS + 1))

    def add(self, event: Event) -> None:
        """Count one event."""
        match event:
            case Started():
                self.plan, self.began = event, self.clock()
                self._ends.clear()  # a render that is begun again does some rounds anew
                self._ends.append((0, self.began))
            case RoundDone():
                self.round = event.round
                self._ends.append((event.units_done, self.clock()))
                self.num_units = event.num_units
            case ChunkDone():
                self.chunk, self.frames_done = event.chunk, event.frames_done
            case FilmDone():
                self.films_done += 1
            case _:
                pass

    @property
    def is_done(self) -> bool:
        """Whether every film is complete."""
        return self.films_done == (self.plan.num_films if self.plan else 1)

    def frames_per_s(self) -> float | None:
        """Frames of film a second of work since the start; None before the first chunk."""
        elapsed = self.clock() - self.began
        return self.frames_done / elapsed if self.frames_done and elapsed > 0 else None

    def left_s(self) -> float | None:
        """Seconds until the last round ends, by the pace of the latest rounds; None before the first has ended.

        Paced by units, not by rounds: rounds are short while the queue fills and empties.
        """
        if len(self._ends) < 2:
            return None
        (first, began), (last, ended) = self._ends[0], self._ends[-1]
        unit_s = (ended - began) / (last - first)
        return max(0.0, ended + unit_s * (self.num_units - last) - self.clock())

    def status(self) -> str:
        """One line, such as `round 12/49, chunk 4/42, film 5.8/62.0 s, 21.3 frames/s, 0:39 left`."""
        if self.plan is None:
            return ""
        plan, pace, left_s = self.plan, self.frames_per_s(), self.left_s()
        parts = [
            f"round {self.round}/{plan.num_rounds}",
            f"chunk {self.chunk}/{plan.num_chunks}",
            f"film {self.frames_done / plan.fps:.1f}/{plan.num_frames / plan.fps:.1f} s",
        ]
        if pace is not None:
            parts.append(f"{pace:.1f} frames/s")
        if left_s is not None:
            parts.append(f"{clock_time(left_s)} left")
        return ", ".join(parts)


def clock_time(seconds: float) -> str:
    """`0:39`, `12:05` or `3:20:00`."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


@contextmanager
def show_progress(console: Console, clock: Clock = time.monotonic) -> Iterator[Callable[[Event], None]]:
    """A callback that shows events on `console`; the terminal is clean again when the context ends, however it ends."""
    tally = Tally(clock)
    if not console.is_interactive:
        yield Lines(lambda line: _print(console, line), tally).show
        return
    bar = _Bar(console, tally)
    with bar.progress:
        yield bar.show


class Lines:
    """A line at the start, one now and then, one at the end."""

    def __init__(self, write: Callable[[str], None], tally: Tally) -> None:
        self._write, self._tally = write, tally
        self._last_line = tally.clock()

    def show(self, event: Event) -> None:
        self._tally.add(event)
        match event:
            case Started() | Notice() | FilmDone():
                self._write(_line(event))
                self._last_line = self._tally.clock()
            case RoundDone() | ChunkDone():
                if self._tally.clock() - self._last_line >= LINE_EVERY_S:
                    self._write(self._tally.status())
                    self._last_line = self._tally.clock()


class _Bar:
    """A bar over the rounds that goes away at the end; what remains is written above it."""

    def __init__(self, console: Console, tally: Tally) -> None:
        self._tally = tally
        columns = (SpinnerColumn(), BarColumn(bar_width=None), TextColumn("{task.description}", markup=False))
        self.progress = Progress(*columns, console=console, transient=True, expand=True, refresh_per_second=4)
        self._task = self.progress.add_task("loading the model", total=None)

    def show(self, event: Event) -> None:
        self._tally.add(event)
        if isinstance(event, Started | Notice | FilmDone):
            _print(self.progress.console, _line(event))
        total = self._tally.plan.num_rounds if self._tally.plan else None
        status = self._tally.status() or "loading the model"
        self.progress.update(self._task, total=total, completed=self._tally.round, description=status)


def _line(event: Started | Notice | FilmDone) -> str:
    match event:
        case Notice():
            return f"note: {event.text}"
        case Started():
            seconds = event.num_frames / event.fps
            size = f"{event.width} x {event.height}"
            work = f"{event.num_chunks} chunks in {event.num_rounds} rounds"
            films = f"{event.num_films} films, " if event.num_films > 1 else ""
            length = f"{films}{seconds:.1f} s of film, {event.num_frames} frames"
            return f"rendering {length} of {size} at {event.fps:g} fps: {work}"
        case FilmDone():
            pace = f" ({event.num_frames / event.seconds:.1f} frames/s)" if event.seconds > 0 else ""
            return f"{event.path}: {event.num_frames} frames in {event.seconds:.1f} s{pace}"


def _print(console: Console, line: str) -> None:
    # Prompts and paths may hold what looks like rich's markup.
    console.print(Text(line), soft_wrap=True, highlight=False)


@contextmanager
def show_training(console: Console, kind: str, steps: int) -> Iterator[Callable[[dict[str, float | str]], None]]:
    """A callback for a training's log: a bar with the latest values on a terminal, and plain lines elsewhere."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[values]}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_interactive) as progress:
        task = progress.add_task(f"train {kind}", total=steps, values="")

        def show(log: dict[str, float | str]) -> None:
            values = [
                f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in log.items()
            ]
            if console.is_interactive:
                done = 0 if "stage" in log else float(log["step"])
                progress.update(task, completed=done, values=", ".join(values))
            else:
                _print(console, ", ".join(values))

        yield show
