"""A gang: ranks in seats of a Ray cluster, which begin, and end, together. It is its controller's, and never waits.

A placement group gives it its seats, all or none. It may wait for that: for other work to end, or for machines that an
autoscaler starts.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from longvid.errors import InputError, Interrupted
from longvid.launch.cluster import Need
from longvid.launch.report import LEADER, describe_exit
from longvid.launch.seat import FENCE_S, Asked, Ended, Message, Order, Place, Said, Seat

LISTEN_S = 2.0
"""A call to a seat that has nothing to say returns after so long."""
END_S = 10.0
"""Once a rank has ended, the others have so long to do so by themselves."""
_TOLD_CODES = (0, InputError.exit_code, Interrupted.exit_code)
_ERROR = "longvid: error: "


@dataclass(frozen=True)
class Outcome:
    """How a gang ended: an exit code as of the command line, why in one line, and what was printed last."""

    code: int
    reason: str
    lines: tuple[str, ...] = ()


@dataclass
class _Sitter:
    """A seat, and what is known of it."""

    actor: Any
    place: Place | None = None
    heard: float = 0.0
    end: Ended | None = None
    loss: str | None = None
    """Why Ray says that the seat itself is gone."""
    is_dead: bool = False
    """Its process is known to have ended, and was not only out of reach."""

    @property
    def has_ended(self) -> bool:
        return self.end is not None or self.loss is not None


class Gang:
    """The seats of one gang, and the ranks in them.

    `refs` are what the controller shall wait for with `ray.wait`, and hand to `handle`; `tick` is to be called now and
    then. `on_say` is given what the leader prints, `answer` what a rank asks.
    """

    def __init__(
        self,
        ray: Any,
        need: Need,
        on_say: Callable[[str], None],
        answer: Callable[[str, tuple[Any, ...]], Any] | None = None,
    ) -> None:
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self.need = need
        self.outcome: Outcome | None = None
        self.began = time.monotonic()
        self._ray, self._on_say, self._answer = ray, on_say, answer
        self._order: Order | None = None
        self._refs: dict[Any, tuple[_Sitter, Callable[[Any], None]]] = {}
        self._ending_since: float | None = None
        self._group = placement_group([need.bundle] * need.ranks, strategy="PACK")
        kind = ray.remote(Seat)
        self._sitters = []
        for index in range(need.ranks):
            strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)
            options = {"num_cpus": need.threads, "num_gpus": float(need.gpu), "max_concurrency": 4}
            self._sitters.append(_Sitter(kind.options(scheduling_strategy=strategy, **options).remote()))

    @property
    def refs(self) -> list[Any]:
        """What is under way."""
        return list(self._refs)

    @property
    def is_seated(self) -> bool:
        """Whether all seats are there."""
        return all(sitter.place for sitter in self._sitters)

    def begin(self, order: Order) -> None:
        """Have all ranks run this, as soon as there are seats; again, when they have ended."""
        self._order, self.outcome, self._ending_since = order, None, None
        for sitter in self._sitters:
            sitter.place = sitter.end = None
            self._call(sitter, self._on_place, sitter.actor.place.remote())

    def handle(self, ref: Any) -> None:
        """Deal with one of `refs` that is ready."""
        sitter, act = self._refs.pop(ref)
        try:
            value = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            sitter.is_dead = isinstance(error, self._ray.exceptions.ActorDiedError)
            if sitter.loss is None:
                sitter.loss = _first_line(error)
        else:
            act(value)

    def tick(self) -> None:
        """See whether the ranks have ended, and end those that do not while others have."""
        if self.outcome or not any(sitter.has_ended for sitter in self._sitters):
            return
        now = time.monotonic()
        self._ending_since = self._ending_since or now
        if all(sitter.has_ended for sitter in self._sitters) or now - self._ending_since > END_S:
            self.outcome = self._judge()
            if self.outcome.code:
                self.kill()

    def send(self, number: int) -> None:
        """Send the leader a signal."""
        self._sitters[LEADER].actor.send.remote(number)

    def kill(self) -> None:
        """Give all seats back, and end what runs in them."""
        from ray.util.placement_group import remove_placement_group

        self._refs.clear()
        for sitter in self._sitters:
            self._ray.kill(sitter.actor)
        remove_placement_group(self._group)
        self.outcome = self.outcome or Outcome(1, "was ended")

    def fenced_at(self) -> float:
        """When no rank of a gang that was killed can run any more (time.monotonic), though its machine may be cut off.

        On a machine that answers, the kernel has ended a rank with its seat.
        """
        alive = {node["NodeID"] for node in self._ray.nodes() if node["Alive"]}
        cut_off = [
            sitter.heard
            for sitter in self._sitters
            if sitter.place and not sitter.end and not (sitter.is_dead and sitter.place.node in alive)
        ]
        # The seat may have heard one call more than its answers tell.
        return max(cut_off) + 2 * LISTEN_S + FENCE_S if cut_off else 0.0

    def _call(self, sitter: _Sitter, act: Callable[[_Sitter, Any], None], ref: Any) -> None:
        self._refs[ref] = (sitter, partial(act, sitter))

    def _on_place(self, sitter: _Sitter, place: Place) -> None:
        sitter.place, sitter.heard = place, time.monotonic()
        if not self.is_seated or self._order is None:
            return
        places = [sitter.place for sitter in self._sitters if sitter.place]
        for each, variables in zip(self._sitters, variables_of(places), strict=True):
            order = replace(self._order, variables={**self._order.variables, **variables})
            self._call(each, self._on_start, each.actor.start.remote(order))

    def _on_start(self, sitter: _Sitter, nothing: None) -> None:
        self._listen(sitter)

    def _listen(self, sitter: _Sitter) -> None:
        self._call(sitter, self._on_messages, sitter.actor.listen.remote(LISTEN_S))

    def _on_messages(self, sitter: _Sitter, messages: Sequence[Message]) -> None:
        sitter.heard = time.monotonic()
        for message in messages:
            match message:
                case Said(line) if sitter is self._sitters[LEADER]:
                    self._on_say(line)
                case Asked(name, arguments):
                    assert self._answer, "no rank asks that has no wire"
                    sitter.actor.answer.remote(self._answer(name, arguments))
                case Ended():
                    sitter.end = message
                case _:
                    pass
        if sitter.end is None:
            self._listen(sitter)

    def _judge(self) -> Outcome:
        """The leader's word, where it has one; else a seat that was lost, a rank that was killed, or what one said."""
        leader = self._sitters[LEADER].end
        if leader and leader.code in _TOLD_CODES:
            return Outcome(leader.code, last_word(leader.lines), leader.lines)
        for rank, sitter in enumerate(self._sitters):
            if sitter.loss is not None:
                place = f" at {sitter.place.address}" if sitter.place else ""
                return Outcome(3, f"rank {rank}'s seat{place} was lost ({sitter.loss})")
        ends = [(rank, sitter.end) for rank, sitter in enumerate(self._sitters) if sitter.end and sitter.end.code]
        # One that was killed comes first, for others follow from it; then whoever says the most.
        ends.sort(key=lambda entry: (entry[1].code >= 0, not last_word(entry[1].lines), entry[0]))
        if not ends:
            return Outcome(3, "a rank does not end")
        rank, end = ends[0]
        if end.code >= 0 and (said := last_word(end.lines)):
            return Outcome(end.code if end.code in _TOLD_CODES else 3, said, end.lines)
        return Outcome(3, f"rank {rank} {describe_exit(end.code)}", end.lines)


def variables_of(places: Sequence[Place]) -> list[dict[str, str]]:
    """What says to each rank which it is, as torchrun's variables: they meet at the first one's machine."""
    sizes = Counter(place.address for place in places)
    seen: Counter[str] = Counter()
    found = []
    for rank, place in enumerate(places):
        found.append(
            {
                "RANK": str(rank),
                "WORLD_SIZE": str(len(places)),
                "LOCAL_RANK": str(seen[place.address]),
                "LOCAL_WORLD_SIZE": str(sizes[place.address]),
                "MASTER_ADDR": places[LEADER].address,
                "MASTER_PORT": str(places[LEADER].port),
                # Of a launcher in which Ray itself may have been started.
                "TORCHELASTIC_USE_AGENT_STORE": "False",
                "TORCHELASTIC_RESTART_COUNT": "0",
            }
        )
        seen[place.address] += 1
    return found


def last_word(lines: Sequence[str]) -> str:
    """What a rank said of its end, in its log or on stderr."""
    for line in reversed(lines):
        if line.startswith(_ERROR):
            return line.removeprefix(_ERROR)
        entry = log_entry(line)
        if entry and entry["event"] == "ended":
            return str(entry["message"])
    return ""


def log_entry(line: str) -> dict[str, Any] | None:
    """A line of a log of JSON; None for any other line."""
    if not line.startswith('{"time":'):
        return None
    try:
        entry: dict[str, Any] = json.loads(line)
    except ValueError:  # it is cut short
        return None
    return entry


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines()]
    told = [line for line in lines if line.startswith("The actor ") or "died" in line]
    return next(iter([*reversed(told), *lines]), type(error).__name__)
