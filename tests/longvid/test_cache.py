"""Films with forecasts: the work that is left out, and the same latents on any number of chunks in flight."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from longvid.engine import Engine
from longvid.parallel.schedule import Forecast, Forward
from longvid.script import parse_script

STORY = """
seed: 3
negative: "blue"
scenes:
  - {prompt: "a red circle moving left", for: 65f}
"""
QUEUE = ["sampler.steps=8", "queue.chunk_latents=4", "runtime.threads=1"]


def latents_of(model: Path, *overrides: str) -> tuple[torch.Tensor, list[object]]:
    engine = Engine.load(model, overrides=[*QUEUE, *overrides])
    seen: list[object] = []
    plan = engine.plan(parse_script(STORY, "story.yaml"))
    finished = engine.denoise(plan)
    chunks = [next(finished).latents]
    executor = engine._executor
    assert executor is not None
    executor.on_action = lambda action, *_: seen.append(action)
    chunks += [chunk.latents for chunk in finished]
    return torch.cat(chunks, dim=1), seen


@pytest.mark.parametrize("solver", ["euler", "unipc"])
@pytest.mark.parametrize("queue", ["queue.left=recompute", "queue.left=cached", "queue.gap=2", "schedule=sequential"])
def test_forecasts_leave_out_forwards_and_stay_near_the_whole_film(tiny_model: Path, queue: str, solver: str) -> None:
    common = [queue, f"sampler.solver={solver}", "sampler.guidance=2"]
    whole, _ = latents_of(tiny_model, *common)
    cache = ["cache.policy=taylorseer", "cache.interval=3", "cache.first_steps=2"]
    found, seen = latents_of(tiny_model, *common, *cache)
    if "schedule=sequential" not in queue:
        kinds = [type(action) for action in seen if isinstance(action, Forward | Forecast)]
        assert kinds.count(Forecast) > len(kinds) / 3
    assert not torch.equal(found, whole)
    assert (found - whole).abs().mean() < 0.2 * whole.abs().mean()


def test_a_table_of_all_steps_changes_nothing(tiny_model: Path) -> None:
    whole, _ = latents_of(tiny_model)
    table = ["cache.policy=static", "cache.computed=[1,2,3,4,5,6]"]
    assert torch.equal(latents_of(tiny_model, *table)[0], whole)


def test_forecasts_and_sparse_attention_go_together(tiny_model: Path) -> None:
    cache = ["cache.policy=taylorseer", "cache.interval=3", "cache.first_steps=2"]
    sparse = ["attention.policy=adaspa", "attention.crossover=always", "attention.tile=16"]
    assert latents_of(tiny_model, *cache, *sparse)[0].isfinite().all()
