"""What a render reports to machines: a line of JSON an event, and a file of figures for Prometheus.

Nothing but events, and how the render ended, is ever written: no environment, no command line.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, ClassVar, Literal, Protocol

from rich.console import Console

from longvid.errors import Interrupted, LongvidError, Preempted
from longvid.events import Event, Notice
from longvid.hls import write_whole
from longvid.progress import Lines, Tally, show_progress

EVERY_S = 1.0
"""The file of figures is not written more often, but for the first and the last time."""
State = Literal["running", "done", "failed", "interrupted", "preempted"]
_STATES: tuple[State, ...] = ("running", "done", "failed", "interrupted", "preempted")


@dataclass(frozen=True)
class Journals:
    """Where a render reports to, beside stderr: a log, and a file of figures. `film` is its name in there."""

    film: Path
    log: Literal["text", "json"] = "text"
    log_file: Path | None = None
    metrics: Path | None = None

    @property
    def is_stderr_json(self) -> bool:
        return self.log == "json" and self.log_file is None


class Journal(Protocol):
    """One of them. `end` is told what ended the render; None: nothing, it is done."""

    name: ClassVar[str]

    def show(self, event: Event) -> None: ...

    def end(self, error: LongvidError | None) -> None: ...


@contextmanager
def report(journals: Journals, stderr: Console) -> Iterator[Callable[[Event], None]]:
    """A callback that shows a render's events everywhere, and at the end how it ended.

    A journal that cannot be written (the disk is full) is told once on stderr, and left out from then on.
    """
    with ExitStack() as stack:
        listeners: list[Journal] = []
        if journals.log_file:
            file = journals.log_file.open("a")
            stack.callback(_close, file)
            listeners.append(JsonLines(file) if journals.log == "json" else TextLines(file))
        elif journals.is_stderr_json:
            listeners.append(JsonLines(stderr.file))
        if journals.metrics:
            listeners.append(Metrics(journals.metrics, str(journals.film)))
        shows = [] if journals.is_stderr_json else [stack.enter_context(show_progress(stderr))]
        guarded = [_Guarded(listener, shows) for listener in listeners]

        def on_event(event: Event) -> None:
            for show in shows:
                show(event)
            for listener in guarded:
                listener.show(event)

        error: LongvidError | None = None
        try:
            yield on_event
        except Exception as reason:
            error = reason if isinstance(reason, LongvidError) else LongvidError(f"{type(reason).__name__}: {reason}")
            raise
        finally:
            for listener in guarded:
                listener.end(error)


def _close(file: IO[str]) -> None:
    with suppress(OSError):  # of a line that was told already to be lost
        file.close()


def sayer(journals: Journals) -> Callable[[str], None]:
    """For lines of a launcher, which has no events: on stderr, and in a log of JSON."""

    def say(line: str) -> None:
        if not journals.is_stderr_json:
            print(line, file=sys.stderr, flush=True)
        if journals.log == "json":
            with journals.log_file.open("a") if journals.log_file else nullcontext(sys.stderr) as file:
                JsonLines(file).say(line)

    return say


@dataclass
class _Guarded:
    """A journal that must not end the render."""

    journal: Journal
    shows: list[Callable[[Event], None]]
    is_broken: bool = False

    def show(self, event: Event) -> None:
        self._try(lambda: self.journal.show(event))

    def end(self, error: LongvidError | None) -> None:
        self._try(lambda: self.journal.end(error))

    def _try(self, write: Callable[[], None]) -> None:
        if self.is_broken:
            return
        try:
            write()
        except OSError as error:
            self.is_broken = True
            for show in self.shows:
                show(Notice(f"{self.journal.name} cannot be written ({error.strerror}); the render goes on without"))


class JsonLines:
    """A line of JSON an event: `time` (UTC), `event`, and what the event holds."""

    name: ClassVar[str] = "the log"

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def show(self, event: Event) -> None:
        self._write(_snake(type(event).__name__), asdict(event))

    def end(self, error: LongvidError | None) -> None:
        if error:
            self._write("ended", {"state": _state(error), "exit_code": error.exit_code, "message": str(error)})

    def say(self, line: str) -> None:
        """A line that stands for itself."""
        self._write("message", {"text": line})

    def _write(self, name: str, values: dict[str, object]) -> None:
        entry = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": name, **values}
        self._file.write(json.dumps(entry, default=str) + "\n")
        self._file.flush()


class TextLines:
    """The plain lines of stderr, each with its time."""

    name: ClassVar[str] = "the log"

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._lines = Lines(self._write, Tally())

    def show(self, event: Event) -> None:
        self._lines.show(event)

    def end(self, error: LongvidError | None) -> None:
        if error:
            self._write(f"{_state(error)}: {error}")

    def _write(self, line: str) -> None:
        self._file.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} {line}\n")
        self._file.flush()


@dataclass
class Metrics:
    """Progress and pace in Prometheus' text format, in a file that is replaced whole. `film` labels every figure."""

    name: ClassVar[str] = "the file of figures"
    path: Path
    film: str
    tally: Tally = field(default_factory=Tally)
    state: State = "running"
    _last_write: float = -EVERY_S

    def show(self, event: Event) -> None:
        self.tally.add(event)
        if self.tally.is_done:
            self.state = "done"
        if self.state == "done" or self.tally.clock() - self._last_write >= EVERY_S:
            self._write()

    def end(self, error: LongvidError | None) -> None:
        if error:
            self.state = _state(error)
            self._write()

    def _write(self) -> None:
        self._last_write = self.tally.clock()
        write_whole(self.path, self.text().encode())

    def text(self) -> str:
        """The file's content."""
        tally, plan = self.tally, self.tally.plan
        frames, chunks, rounds = (plan.num_frames, plan.num_chunks, plan.num_rounds) if plan else (None, None, None)
        figures: list[tuple[str, str, float | None]] = [
            ("updated_timestamp_seconds", "When this file was written.", time.time()),
            ("frames", "Frames of the whole film.", frames),
            ("frames_done", "Frames that are decoded.", tally.frames_done),
            ("chunks", "Chunks of the whole film.", chunks),
            ("chunks_done", "Chunks that are decoded.", tally.chunk),
            ("rounds", "Rounds of the whole schedule.", rounds),
            ("rounds_done", "Rounds that are carried out.", tally.round),
            ("frames_per_second", "Frames of film a second of work since the start.", tally.frames_per_s()),
            ("left_seconds", "Time to the end by the pace of the latest rounds.", tally.left_s()),
        ]
        label = "".join({"\\": "\\\\", '"': '\\"', "\n": "\\n"}.get(c, c) for c in self.film)
        lines = [
            "# HELP longvid_state What the render is doing: 1 for one of the states.",
            "# TYPE longvid_state gauge",
        ]
        lines += [f'longvid_state{{film="{label}",state="{state}"}} {int(state == self.state)}' for state in _STATES]
        for name, text, value in figures:
            if value is not None:
                lines += [f"# HELP longvid_{name} {text}", f"# TYPE longvid_{name} gauge"]
                lines.append(f'longvid_{name}{{film="{label}"}} {value:.17g}')
        return "\n".join(lines) + "\n"


def _state(error: LongvidError) -> State:
    return (
        "preempted" if isinstance(error, Preempted) else "interrupted" if isinstance(error, Interrupted) else "failed"
    )


def _snake(name: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() and i else c.lower() for i, c in enumerate(name))
