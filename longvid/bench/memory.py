"""What a rank holds while it renders, by kind, beside what was planned."""

from __future__ import annotations

import resource
from collections.abc import Iterable
from typing import Any

from longvid.engine import Engine
from longvid.parallel.around import KvPart
from longvid.parallel.rank_actions import RankAction
from longvid.script import Script


class MemoryWatch:
    """Looks at an engine's state after every action, and keeps the most bytes of each kind at once."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._peaks = {"kv": 0, "latents": 0, "cache": 0}

    def run(self, story: Script) -> dict[str, float]:
        """Denoise a storyboard, and tell the peaks, weights and resident memory in 10^6 bytes."""
        plan = self._engine.plan(story)
        self._engine.watch_action = self._on_action
        for _ in self._engine.denoise(plan):
            pass
        self._engine.watch_action = None
        stage: Any = self._engine._stage
        weights = sum(parameter.nbytes for parameter in stage.dit.parameters())
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {f"{kind}_mb": size / 1e6 for kind, size in {"weights": weights, **self._peaks, "rss": rss}.items()}

    def _on_action(self, action: RankAction, start: int, end: int) -> None:
        executor, cache = self._engine._executor, self._engine.cache
        assert executor is not None
        live = executor.live
        # The cache's K/V are often those that live on anyway, and count once.
        now = {
            "kv": kv_bytes((*live.kv.values(), *live.kept.values())),
            "latents": sum(latents.nbytes for latents in live.latents.values()),
            "cache": cache.num_bytes if cache else 0,
        }
        self._peaks = {kind: max(self._peaks[kind], size) for kind, size in now.items()}


def kv_bytes(spans: Iterable[Any]) -> int:
    """Bytes of K/V of spans, as Wan's stages keep them; what is there twice counts once."""
    parts: list[KvPart] = [part for span in spans for layers in span for part in layers]
    tensors = {id(tensor): tensor.nbytes for part in parts for tensor in (part.key, part.value)}
    return sum(tensors.values())
