"""Events of rounds, as the leader's units show them."""

from __future__ import annotations

from collections.abc import Callable

from longvid.events import Event, RoundDone
from longvid.parallel.actions import Step
from longvid.parallel.schedule import first_round, num_rounds, num_units
from longvid.plan import Plan
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
