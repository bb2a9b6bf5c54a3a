"""What a check of a schedule finds: the error that says what is wrong with it, or a report of what it costs.

The words that all checks share: those of the queue (`verify_queue.py`), of chunks side by side (`verify_chunks.py`), of
decoding (`verify_decoding.py`) and of the ranks' programs (`rehearsal.py`).
"""

from __future__ import annotations

from dataclasses import dataclass


class ScheduleError(AssertionError):
    """The schedule is wrong: its message holds the action and what was expected."""


@dataclass(frozen=True)
class Report:
    """What a schedule costs: work done, and the most values that are live at once (counted in versions, not bytes)."""

    num_units: int
    num_forecasts: int
    num_rounds: int
    max_live_latents: int
    max_live_kv: int
    """But for those of scenes' ends."""
    max_live_scenes: int = 0


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ScheduleError(message)
