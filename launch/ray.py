"""`longvid render --ray`: one film by a gang of ranks in a Ray cluster. The process that calls is the controller.

It renders nothing. It asks for seats, shows what the leader says of its progress, and begins again from the film's last
checkpoint when the gang is lost; so the film's folder must be on storage that the machines share.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from longvid.errors import InputError, Interrupted, Preempted, RuntimeFailure
from longvid.events import ChunkDone, Event, FilmDone, Notice, RoundDone, Started
from longvid.launch.cluster import (
    LOCAL,
    Figures,
    Need,
    has_gpus,
    joined,
    processors,
    require_gpus,
    share_of_processors,
    shortage,
)
from longvid.launch.gang import Gang, Outcome, log_entry
from longvid.launch.local import REPEAT_S
from longvid.launch.report import PREEMPT_SIGNALS, with_hint
from longvid.launch.seat import Order
from longvid.manifest import MANIFEST, Manifest, state_folder
from longvid.preemption import END_S
from longvid.settings import load_settings

MAX_LOSSES = 3
"""So many gangs in a row may be lost without a new checkpoint, beside one."""
TICK_S = 0.2
_PATIENCE_S = 3.0
"""A gang that has waited for its seats so long says so."""
_KINDS: dict[str, type[Any]] = {
    kind.__name__.lower(): kind for kind in (Started, RoundDone, ChunkDone, Notice, FilmDone)
}


@dataclass(frozen=True)
class Film:
    """What is to be rendered, in the words of the command line. Paths count from the current folder."""

    story: Path
    output: Path
    preset: str | None = None
    overrides: tuple[str, ...] = ()
    ranks: int = 1
    resume: bool = False
    trace: Path | None = None
    ledger: Path | None = None

    def arguments(self, threads: int, *, resume: bool) -> list[str]:
        """A rank's command line."""
        options = [("--preset", self.preset), ("--trace", self.trace), ("--ledger", self.ledger)]
        found = ["longvid", "render", str(self.story), "-o", str(self.output), "--log", "json"]
        found += [part for name, value in options if value is not None for part in (name, str(value))]
        found += [part for text in (*self.overrides, f"runtime.threads={threads}") for part in ("--set", text)]
        return found + ["--resume"] * resume


def render_film(address: str, film: Film, on_event: Callable[[Event], None], resume_hint: str = "") -> None:
    """Render a film in the Ray cluster at an address (`HOST:PORT`, `auto`), or in one of this machine (`local`).

    Each rank gets `runtime.threads` processors, or a share of the cluster's, and a GPU where `runtime.device` says cuda
    (or auto, and the cluster has some). The film is that of any other launcher. Raises InputError, Interrupted after
    Ctrl-C, Preempted after SIGTERM, and RuntimeFailure when gangs are lost without progress; `resume_hint` says in it
    how to go on. A cluster at an address is left as it is; a local one ends with the call.
    """
    runtime = load_settings(film.preset, film.overrides).runtime
    with joined(address, num_cpus=film.ranks * max(1, runtime.threads)) as ray:
        threads = runtime.threads or share_of_processors(processors(ray), film.ranks)
        need = Need(film.ranks, threads, has_gpus(ray, runtime.device))
        if address == LOCAL:
            require_gpus(ray, need)
        _Controller(ray, film, need, on_event, resume_hint).run()


class _Controller:
    """The state of one render."""

    def __init__(self, ray: Any, film: Film, need: Need, on_event: Callable[[Event], None], resume_hint: str) -> None:
        self._ray, self._film, self._need, self._hint = ray, film, need, resume_hint
        self._on_event, self._figures = on_event, Figures()
        self._number, self._frames = 0, 0
        self._signals: list[int] = []
        self._last_signal = -REPEAT_S
        self._stop_at: float | None = None

    def run(self) -> None:
        """Render, with as many gangs as that takes."""
        resume, losses, last_round = self._film.resume, 0, self._saved_round()
        with self._signals_noted():
            while True:
                gang = self._hire(resume)
                try:
                    self._attend(gang)
                finally:
                    gang.kill()
                assert gang.outcome
                reason = self._conclude(gang.outcome)
                if reason is None:
                    return
                self._figures.gang_lost(self._film.output.stem, self._number)
                saved = self._saved_round()
                losses, last_round = (losses + 1 if saved == last_round else 1), saved
                if losses > MAX_LOSSES:
                    self._tell_lines(gang.outcome)
                    raise RuntimeFailure(with_hint(reason, "" if self._hint in reason else self._hint))
                resume = saved is not None
                origin = f"from the checkpoint after round {saved + 1}" if saved is not None else "from the start"
                self._on_event(Notice(f"{reason}; another gang goes on {origin}"))
                self._pause(gang.fenced_at() - time.monotonic())

    def _hire(self, resume: bool) -> Gang:
        self._number += 1
        gang = Gang(self._ray, self._need, self._on_line)
        gang.begin(Order(self._film.arguments(self._need.threads, resume=resume), os.getcwd()))
        return gang

    def _attend(self, gang: Gang) -> None:
        """Be there until the gang has ended."""
        is_told, num_passed_on = False, 0
        while gang.outcome is None:
            ready, _ = self._ray.wait(gang.refs, num_returns=1, timeout=TICK_S) if gang.refs else ([], [])
            for ref in ready:
                gang.handle(ref)
            gang.tick()
            if len(self._signals) > num_passed_on:
                num_passed_on = len(self._signals)
                self._pass_on(gang)
            if self._stop_at and time.monotonic() > self._stop_at:
                return
            if not is_told and not gang.is_seated and time.monotonic() - gang.began > _PATIENCE_S:
                is_told = True
                self._on_event(Notice(shortage(self._ray, self._need)))

    def _pass_on(self, gang: Gang) -> None:
        """Ctrl-C and pre-emption are the leader's, where there is one; a second one means it."""
        if not gang.is_seated or len(self._signals) > 1:
            self._raise_wish("before a rank had begun" if not gang.is_seated else "at once")
        self._stop_at = time.monotonic() + END_S
        gang.send(signal.SIGTERM if self._signals[0] in PREEMPT_SIGNALS else signal.SIGINT)

    def _conclude(self, outcome: Outcome) -> str | None:
        """Raise what the end is, if it is one. Why the gang was lost; None: the film is complete."""
        if outcome.code == 0 and self._film.output.exists() and not outcome.reason:
            return None
        if outcome.code == InputError.exit_code:
            raise InputError(outcome.reason or "a rank found the input wrong")
        if self._signals:
            self._raise_wish("at once", outcome.reason if outcome.code in (0, Interrupted.exit_code) else "")
        match outcome.code:
            case Interrupted.exit_code:
                raise Interrupted(outcome.reason or "interrupted")
            case 0:
                return f"a rank was told to make room ({outcome.reason})"
            case _:
                return outcome.reason

    def _raise_wish(self, how: str, said: str = "") -> None:
        if self._signals[0] in PREEMPT_SIGNALS:
            raise Preempted(said or with_hint(f"stopped {how}", self._hint))
        raise Interrupted(said or with_hint(f"interrupted {how}", self._hint))

    def _saved_round(self) -> int | None:
        """The round of the film's checkpoint, if there is one."""
        if (state_folder(self._film.output) / MANIFEST).exists():
            with suppress(InputError):
                return Manifest.read(self._film.output).round
        return None

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self._signals:
                self._raise_wish("between two gangs")
            time.sleep(min(TICK_S, max(0.0, until - time.monotonic())))

    # ------------------------------------------------------------------------------------------------- what ranks say

    def _on_line(self, line: str) -> None:
        event = event_of(line)
        if event is None:
            return
        film = self._film.output.stem
        match event:
            case RoundDone():
                self._figures.progress(film, self._number, event.units_done / event.num_units)
            case ChunkDone():
                self._figures.frames(film, self._number, event.frames_done - self._frames)
                self._frames = max(self._frames, event.frames_done)
            case FilmDone():
                self._figures.film_done(film, self._number)
            case _:
                pass
        self._on_event(event)

    def _tell_lines(self, outcome: Outcome) -> None:
        """What a rank printed that is no line of a log: the trace of a bug."""
        for line in outcome.lines:
            if not log_entry(line) and not line.startswith("longvid: "):
                print(line, file=sys.stderr, flush=True)

    @contextmanager
    def _signals_noted(self) -> Iterator[None]:
        """Signals are dealt with where nothing else is going on; only a main thread gets them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame: FrameType | None) -> None:
            now, last = time.monotonic(), self._last_signal
            self._last_signal = now
            if now - last >= REPEAT_S:
                self._signals.append(number)

        numbers = {signal.SIGINT, *PREEMPT_SIGNALS}
        handlers = {number: signal.signal(number, note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def event_of(line: str) -> Event | None:
    """The event that a line of a JSON log tells; None for any other line."""
    entry = log_entry(line)
    kind = _KINDS.get(entry.pop("event").replace("_", "")) if entry else None
    if entry is None or kind is None:
        return None
    del entry["time"]
    if kind is FilmDone:
        entry["path"] = Path(entry["path"])
    event: Event = kind(**entry)
    return event
