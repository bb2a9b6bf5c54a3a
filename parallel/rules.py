"""The rules of a schedule: what the settings say of who reads what, and what follows for rounds and units.

Pure numbers, for whoever counts a film before it runs (`schedule.py`, plans, memory, films side by side). Which actions
they lead to is in `queue_units.py` and `chunk_units.py`; `verify.py` derives anew what the actions must be.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from longvid.plan import sharing_steps
from longvid.settings import Settings

LeftLevel = Literal["same", "fresher"]


@dataclass(frozen=True, slots=True)
class QueueRules:
    """What the settings say of who reads what; `gap` is how many steps neighbours are apart.

    `forecast` are the steps that are not computed, `gated` those of which the first rank decides; never the first or
    the last. With `tokens`, units read global tokens, for which a shot's finished chunks are kept as far back as
    `memory` says (`snapshot.is_remembered`). In the steps of `sharing`, chunks read the K/V of how the scene before
    ended, where the plan says so.
    """

    left: Literal["recompute", "cached"] = "recompute"
    left_level: LeftLevel = "fresher"
    gap: int = 1
    forecast: frozenset[int] = frozenset()
    gated: frozenset[int] = frozenset()
    tokens: bool = False
    memory: int = 0
    sharing: frozenset[int] = frozenset()

    @classmethod
    def of(cls, settings: Settings) -> QueueRules:
        """The rules that the settings ask for; `sequential` is a queue whose chunks never meet."""
        steps = settings.sampler.steps
        forecast, gated = settings.cache.forecast_steps(steps), settings.cache.gated_steps(steps)
        if settings.schedule == "sequential":
            return cls(gap=steps, forecast=forecast, gated=gated)
        queue, vin = settings.queue, settings.vin
        has_tokens, sharing = vin.policy == "on", frozenset(sharing_steps(steps)) - forecast
        return cls(queue.left, queue.left_level, queue.gap, forecast, gated, has_tokens, vin.memory, sharing)

    def computed(self, step: int) -> int:
        """The last step up to this one that is computed."""
        while step in self.forecast:
            step -= 1
        return step

    def num_rounds(self, num_chunks: int, steps: int) -> int:
        return (num_chunks - 1) * self.gap + steps

    def num_units(self, num_chunks: int, steps: int, rounds: int) -> int:
        """Units of the first so many rounds."""
        full = self.num_finished(num_chunks, steps, rounds)
        entered = min(num_chunks, -(-rounds // self.gap))
        begun = range(rounds - self.gap * full, rounds - self.gap * entered, -self.gap)
        return steps * full + len(begun) * (begun[0] + begun[-1]) // 2 if begun else steps * full

    def num_finished(self, num_chunks: int, steps: int, rounds: int) -> int:
        """Chunks that are finished after so many rounds."""
        return min(max((rounds - steps) // self.gap + 1, 0), num_chunks)

    def in_flight(self, steps: int) -> int:
        """Chunks that are denoised at once, at most."""
        return -(-steps // self.gap)


@dataclass(frozen=True, slots=True)
class ChunkRules:
    """What the settings say of the chunk schedule: chunks of a group at most, and the steps whose overlaps are fused.

    `forecast` and `gated` are as in QueueRules. With `tokens`, each step reads global tokens of the shot's chunks in
    the group, as they stand before it, and of those finished ones that `memory` says. Of pure noise none are made.
    """

    group: int = 64
    fused_steps: int = 0
    forecast: frozenset[int] = frozenset()
    gated: frozenset[int] = frozenset()
    tokens: bool = False
    memory: int = 0

    @classmethod
    def of(cls, settings: Settings) -> ChunkRules:
        steps, chosen, vin = settings.sampler.steps, settings.chunks, settings.vin
        forecast, gated = settings.cache.forecast_steps(steps), settings.cache.gated_steps(steps)
        return cls(chosen.group, round(chosen.fuse * steps), forecast, gated, vin.policy == "on", vin.memory)

    def groups(self, num_chunks: int) -> tuple[range, ...]:
        """As few groups as there can be, as even as they can be: ranks share each of them."""
        count = -(-num_chunks // self.group)
        edges = [-(-num_chunks * g // count) for g in range(count + 1)]
        return tuple(range(*pair) for pair in pairwise(edges))

    def num_rounds(self, num_chunks: int, steps: int) -> int:
        return len(self.groups(num_chunks)) * steps

    def num_units(self, num_chunks: int, steps: int, rounds: int) -> int:
        """Units of the first so many rounds."""
        groups = self.groups(num_chunks)
        return sum(len(group) * min(max(rounds - steps * g, 0), steps) for g, group in enumerate(groups))

    def num_finished(self, num_chunks: int, steps: int, rounds: int) -> int:
        """Chunks that are finished after so many rounds."""
        return sum(map(len, self.groups(num_chunks)[: rounds // steps]))

    def in_flight(self, steps: int) -> int:
        """Chunks that are denoised at once, at most."""
        return self.group


Rules = QueueRules | ChunkRules


def rules_of(settings: Settings) -> Rules:
    """The rules that the settings ask for."""
    return ChunkRules.of(settings) if settings.schedule == "chunks" else QueueRules.of(settings)
