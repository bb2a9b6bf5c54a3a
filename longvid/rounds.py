"""How far a film has come: events of rounds, as the leader's units show them, and the frames of so many chunks."""

from __future__ import annotations

from collections.abc import Callable

from longvid.events import Event, RoundDone
from longvid.geometry import LatentGrid
from longvid.parallel.actions import Step
from longvid.parallel.chunk_runs import owners_of
from longvid.parallel.rules import ChunkRules, rules_of
from longvid.parallel.schedule import first_round, num_rounds, num_units
from longvid.plan import FilmSpan, Plan
from longvid.settings import Settings


class RoundCounter:
    """Turns units of the leader's chunks into one event a round; those of other owners are as far, then.

    `num_last` are its units in the last round.
    """

    def __init__(
        self, plan: Plan, settings: Settings, on_event: Callable[[Event], None], done: int, num_last: int
    ) -> None:
        self._first, self._num_rounds = first_round(plan, settings), num_rounds(plan, settings)
        self._units_until = lambda n: num_units(plan, settings, n)
        self._on_event = on_event
        self._round, self._num_last = max(done + 1, self._first), num_last

    def on_unit(self, unit: Step) -> None:
        if unit.round != self._round:
            self._end_round()
            self._round = unit.round
        if unit.round + 1 == self._first + self._num_rounds:
            self._num_last -= 1
            if self._num_last == 0:
                self._end_round()

    def _end_round(self) -> None:
        last = self._first + self._num_rounds - 1
        before, done, all_units = map(self._units_until, (self._round - 1, self._round, last))
        self._on_event(RoundDone(self._round + 1 - self._first, self._num_rounds, done - before, done, all_units))


def units_of_last_round(plan: Plan, settings: Settings, size: int) -> int:
    """Those of them that the leader steps, on a `chunk` axis of that size."""
    rules, owners = rules_of(settings), owners_of(plan, settings, size)
    if isinstance(rules, ChunkRules):
        return sum(owners[i] == 0 for i in rules.groups(len(plan.chunks))[-1])
    last = first_round(plan, settings) + num_rounds(plan, settings) - 1
    return num_units(plan, settings, last) - num_units(plan, settings, last - 1)


def frames_until(plan: Plan, film: FilmSpan, num_chunks: int, grid: LatentGrid) -> int:
    """Frames of a film's first chunks."""
    if not num_chunks:
        return 0
    chunk = plan.chunks[film.chunks[num_chunks - 1]]
    shot = plan.shots[chunk.shot]
    return shot.first_frame + min(grid.num_frames(chunk.start + chunk.num_latents), shot.num_frames)
