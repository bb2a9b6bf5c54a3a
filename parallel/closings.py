"""What becomes of the chunks that finish in a round, where several ranks decode them: when a rank comes to each.

The leader decodes when its own units are done. Whoever hands on to it does so between its own units, as soon as a chunk
is likely there: so the leader has something to decode from its last unit on, and nobody waits for a chunk while there
are units to do, nor for room to hand one on.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from math import inf
from sys import maxsize

from longvid.parallel.chunk_runs import Run
from longvid.parallel.rank_actions import RankAction


@dataclass
class Closings:
    """Of one rank: the finished chunks that it has still to come to, in the order of the film.

    `free_rounds` are those since any rank needed something of a later run: each may be ahead of those behind it by as
    many units as its run has fewer chunks, times that number.
    """

    run: Run
    free_rounds: int = 0
    _waiting: deque[tuple[float, list[RankAction]]] = field(default_factory=deque)
    """With how many own units of the round are to be settled before; inf: at its end."""
    _num_settled: int = 0

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, chunk: int, actions: list[RankAction], *, at_end: bool) -> None:
        """What is to be done for a chunk: at the end of the round, or when it is likely there."""
        before = self._waiting[-1][0] if self._waiting else 0
        self._waiting.append((inf if at_end else max(before, self._units_until(chunk)), actions))

    def append(self, action: RankAction) -> bool:
        """Put an action behind all that waits, if anything does."""
        if self._waiting:
            self._waiting[-1][1].append(action)
        return bool(self._waiting)

    def before_step(self, chunk: int) -> list[RankAction]:
        """What is to be done before the step of an own chunk. Behind the last one nothing waits for units any more."""
        own = self.run.chunks_of(self.run.place)
        if chunk not in own:  # of a queue
            return []
        is_last = chunk == own[-1]
        self._num_settled = maxsize if is_last else own.index(chunk) + 1
        return self.due() if is_last else []

    def due(self) -> list[RankAction]:
        """What is to be done when so many units are settled."""
        return self._until(self._num_settled)

    def end_round(self) -> list[RankAction]:
        """All that is left."""
        self._num_settled = 0
        return self._until(inf)

    def _until(self, num_settled: float) -> list[RankAction]:
        found: list[RankAction] = []
        while self._waiting and self._waiting[0][0] <= num_settled:
            found += self._waiting.popleft()[1]
        return found

    def _units_until(self, chunk: int) -> int:
        """Own units that are likely settled when another rank's chunk is finished, and the leader has but two to do."""
        owner, place = self.run.owner(chunk), self.run.place
        if owner == place:
            return 0
        theirs, leaders, own = map(self.run.chunks_of, (owner, 0, place))
        lead = self.free_rounds * max(0, len(own) - len(leaders))
        return max(theirs.index(chunk) + 1, len(leaders) - 2) - lead
