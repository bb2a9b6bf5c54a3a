"""Prompts that change while a film streams: asked for in any thread, encoded on the leader, taken by all ranks at once.

A change takes effect after a round that the leader names: what it says is posted before that, and the notice travels in
the headers of messages, as that of checkpoints does (see `Boundary`).
"""

from __future__ import annotations

import base64
import pickle
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from longvid.checkpoint import Bulletin
from longvid.errors import RuntimeFailure
from longvid.events import Event, Notice, PromptChanged
from longvid.geometry import LatentGrid
from longvid.models.checkpoint import Prompt
from longvid.parallel.rules import QueueRules
from longvid.plan import Plan, change_prompt


@dataclass(frozen=True)
class Wish:
    """A prompt, and its negative; None: that of the scene that is on."""

    prompt: str
    negative: str | None = None


class Wishes:
    """What callers ask for, in order. Any thread may call any method."""

    def __init__(self) -> None:
        self._waiting: deque[Wish] = deque()
        self._lock = threading.Lock()

    def ask(self, wish: Wish) -> None:
        with self._lock:
            self._waiting.append(wish)

    def take(self) -> Wish | None:
        """The latest; what was asked for before it has been overtaken."""
        with self._lock:
            latest = self._waiting.pop() if self._waiting else None
            self._waiting.clear()
            return latest

    def __bool__(self) -> bool:
        return bool(self._waiting)


@dataclass
class LivePrompter:
    """The executor's `Prompter` on one rank of a film.

    Chunks that have taken at most `early` of `steps` steps take a new prompt. On the leader `encode` gives texts as the
    stage takes them; everywhere `add` gives the stage one more prompt and its negative. `name` is that of the film,
    the same on all ranks.
    """

    wishes: Wishes
    bulletin: Bulletin
    encode: Callable[[Sequence[str]], list[Prompt]]
    add: Callable[[Prompt, Prompt], None]
    rules: QueueRules
    grid: LatentGrid
    early: int
    name: str
    timeout_s: float
    on_event: Callable[[Event], None] | None = None
    """On the leader."""

    def is_due(self) -> bool:
        return bool(self.wishes)

    def announce(self, at: int, plan: Plan) -> None:
        """On the leader: encode the latest wish, and post it for the end of round `at`."""
        wish, first = self.wishes.take(), self._first_chunk(at, plan)
        assert wish is not None, "nobody asked"
        on = plan.chunks[min(first, len(plan.chunks) - 1)]
        negative = plan.negatives[on.prompts[on.num_left].b] if wish.negative is None else wish.negative
        texts = [wish.prompt, negative]
        encoded = [text.to("cpu") for text in self.encode(texts)]
        self.bulletin.post(self._key(at), base64.b64encode(pickle.dumps((texts, encoded))).decode())

    def change(self, at: int, plan: Plan) -> Plan:
        """On every rank, after round `at`: the plan of what is to come."""
        found = self.bulletin.wait([self._key(at)], self.timeout_s)
        if found is None:
            raise RuntimeFailure(f"the prompt for round {at + 1} did not come for {self.timeout_s:g} s")
        content: Any = pickle.loads(base64.b64decode(found[0]))  # noqa: S301 - it comes from this job's leader
        (prompt, negative), encoded = content
        first = self._first_chunk(at, plan)
        if first == len(plan.chunks):
            self._tell(Notice(f"too late for {prompt!r}: the last chunk of the film is under way"))
            return plan
        if (prompt, negative) not in zip(plan.prompts, plan.negatives, strict=True):
            self.add(*encoded)
        chunk = plan.chunks[first]
        frame = plan.shots[chunk.shot].first_frame + self.grid.num_frames(chunk.start)
        self._tell(PromptChanged(prompt, first + 1, frame))
        return change_prompt(plan, first, prompt, negative)

    def _first_chunk(self, at: int, plan: Plan) -> int:
        """The first chunk that has taken at most `early` steps by the end of round `at`."""
        first = -(-(at + 1 - self.early) // self.rules.gap)
        return min(max(first, plan.first_chunk), len(plan.chunks))

    def _tell(self, event: Event) -> None:
        if self.on_event:
            self.on_event(event)

    def _key(self, at: int) -> str:
        return f"prompt/{self.name}/{at}"
