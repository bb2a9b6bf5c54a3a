"""How a batch stands: a live table on a terminal, plain lines elsewhere, JSON for programs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table as RichTable
from rich.text import Text

from longvid.batch.folder import BatchFolder
from longvid.batch.table import Row
from longvid.progress import clock_time

_SHOWN_ROWS = 24
_STYLES = {"waiting": "dim", "running": "cyan", "done": "green", "failed": "red"}
_ORDER = ("running", "failed", "waiting", "done")


def as_json(rows: Sequence[Row], folder: Path) -> dict[str, Any]:
    """All of it as plain data."""
    places = BatchFolder(folder)
    return {
        "folder": str(folder),
        "jobs": len(rows),
        **counts_of(rows),
        "lost_workers": sum(row.lost for row in rows),
        "films": [
            {
                "name": row.name,
                "state": row.state,
                "place": row.place,
                "film": str(places.film(row.name)) if row.state == "done" else None,
                "progress": row.progress,
                "attempts": row.attempt,
                "lost_workers": row.lost,
                "reason": row.reason,
                "cause": row.cause,
                "seconds": row.result.get("seconds"),
                "frames": row.result.get("frames"),
                "resumed": row.result.get("resumed"),
                "notices": row.result.get("notices", []),
            }
            for row in rows
        ],
    }


def counts_of(rows: Sequence[Row]) -> dict[str, int]:
    """Films by their state."""
    return {state: sum(row.state == state for row in rows) for state in ("waiting", "running", "done", "failed")}


def headline(rows: Sequence[Row]) -> str:
    """One line: `12 of 40 films done, 2 running, 25 waiting, 1 failed; about 3:20 left`."""
    counts = counts_of(rows)
    parts = [f"{counts['done']} of {len(rows)} films done"]
    parts += [f"{counts[state]} {state}" for state in ("running", "waiting", "failed") if counts[state]]
    left = left_s(rows)
    return ", ".join(parts) + (f"; about {clock_time(left)} left" if left else "")


def left_s(rows: Sequence[Row]) -> float | None:
    """Seconds of work that are left, by what the films took that are done; None where that says nothing."""
    took: list[float] = [row.result["seconds"] for row in rows if row.state == "done" and row.result.get("seconds")]
    running = [row for row in rows if row.state == "running"]
    if not took or not running:
        return None
    films_left = sum(row.state == "waiting" for row in rows) + sum(1 - row.progress for row in running)
    return films_left * sum(took) / len(took) / len(running)


def line_of(row: Row) -> str:
    """A film in one line."""
    match row.state:
        case "done":
            seconds = row.result.get("seconds")
            what = f"done in {seconds:.1f} s" if seconds else "done"
        case "running":
            what = f"{row.progress:.0%}" + (f", after: {row.reason}" if row.lost else "")
        case "failed":
            what = row.reason or "failed"
        case _:
            what = "waiting" + (f" again, after: {row.reason}" if row.lost else "")
    tries = f" (worker {row.attempt})" if row.attempt > 1 else ""
    return f"{row.name}: {what}{tries}"


def as_lines(rows: Sequence[Row]) -> list[str]:
    """The whole batch as plain lines."""
    return [*(line_of(row) for row in rows), headline(rows)]


def picture(rows: Sequence[Row], height: int = _SHOWN_ROWS) -> Group:
    """The batch as a table: what runs and what failed first, as many rows as fit."""
    table = RichTable(box=None, pad_edge=False, expand=True)
    for name, ratio in (("film", 2), ("state", None), ("", 5)):
        table.add_column(name, ratio=ratio, no_wrap=True, overflow="ellipsis")
    ordered = sorted(rows, key=lambda row: (_ORDER.index(row.state), -(row.ended or 0)))
    for row in ordered[:height]:
        detail = line_of(row).removeprefix(f"{row.name}: ")
        table.add_row(Text(row.name), Text(row.state, _STYLES[row.state]), Text(detail))
    more = [Text(f"and {len(rows) - height} more", "dim")] if len(rows) > height else []
    return Group(table, *more, Text(headline(rows), "bold"))


@contextmanager
def show_batch(console: Console) -> Iterator[Callable[[list[Row]], None]]:
    """A callback that shows rows as they change: a live table on a terminal, a line a change elsewhere."""
    if console.is_interactive:
        with Live(console=console, transient=True, auto_refresh=False) as live:
            yield lambda rows: live.update(picture(rows, max(3, console.height - 6)), refresh=True)
        return
    told: dict[str, str] = {}

    def show(rows: list[Row]) -> None:
        for row in rows:
            # A worker's death is told once, whatever the next one does meanwhile.
            news = row.state if row.state in ("done", "failed") else f"lost {row.lost}" if row.lost else ""
            if news and told.get(row.name) != news:
                told[row.name] = news
                console.print(Text(line_of(row)), soft_wrap=True, highlight=False)

    yield show
