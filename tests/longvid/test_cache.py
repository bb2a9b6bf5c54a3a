"""Films with caches: the work that is left out, what stays the same, and that nothing is kept for ever."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from longvid.calibrate import Method, calibrate, write_preset
from longvid.engine import Engine
from longvid.errors import InputError
from longvid.overview import Overview
from longvid.parallel.actions import Forecast, Forward
from longvid.script import parse_script
from longvid.settings import load_settings

STORY = """
seed: 3
negative: "blue"
scenes:
  - {prompt: "a red circle moving left", for: 65f}
"""
QUEUE = ["sampler.steps=8", "queue.chunk_latents=4", "runtime.threads=1"]


def latents_of(model: Path, *overrides: str) -> torch.Tensor:
    engine = Engine.load(model, overrides=[*QUEUE, *overrides])
    latents = torch.cat([chunk.latents for chunk in engine.denoise(engine.plan(parse_script(STORY, "story.yaml")))], 1)
    assert engine.cache is None or engine.cache.num_bytes == 0, "memory goes with a chunk's last step"
    return latents


SEER = ["cache.policy=taylorseer", "cache.interval=3", "cache.first_steps=2"]
CACHES = {
    "velocities": SEER,
    "sums of layers": [*SEER, "cache.level=last_layer"],
    "modules": [*SEER, "cache.level=module"],
    "gated velocities": ["cache.policy=cg_taylor", "cache.gate=0.3", "cache.max_skips=2"],
    "gated layers": ["cache.policy=first_block", "cache.threshold=0.3", "cache.first_steps=2"],
    "rear and front": ["cache.policy=delta_dit"],
    "regions": ["cache.policy=ras", "cache.first_steps=2", "cache.reset_every=3"],
    "negatives": ["cache.negative_every=3"],
    "negatives and layers": [
        "cache.policy=first_block",
        "cache.threshold=0.3",
        "cache.first_steps=2",
        "cache.negative_every=2",
    ],
}


@pytest.mark.parametrize("queue", ["queue.left=recompute", "queue.left=cached", "queue.gap=2", "schedule=sequential"])
def test_caches_stay_near_the_whole_film(tiny_model: Path, queue: str) -> None:
    solver = "unipc" if queue == "queue.gap=2" else "euler"
    common = [queue, f"sampler.solver={solver}", "sampler.guidance=2"]
    whole = latents_of(tiny_model, *common)
    for name, cache in CACHES.items():
        found = latents_of(tiny_model, *common, *cache)
        assert not torch.equal(found, whole), name
        assert (found - whole).abs().mean() < 0.2 * whole.abs().mean(), name


@pytest.mark.parametrize(
    "cache",
    [
        ["cache.policy=static", "cache.computed=[1,2,3,4,5,6]"],
        ["cache.policy=taylorseer", "cache.interval=1"],
        ["cache.policy=taylorseer", "cache.interval=1", "cache.level=last_layer"],
        ["cache.policy=taylorseer", "cache.interval=1", "cache.level=module"],
        ["cache.policy=cg_taylor", "cache.gate=0"],
        ["cache.policy=first_block", "cache.threshold=0", "cache.first_steps=1"],
        ["cache.policy=delta_dit", "cache.interval=1"],
        ["cache.policy=ras", "cache.ratio=1"],
        ["cache.policy=ras", "cache.reset_every=1"],
        ["cache.policy=none", "cache.negative_every=1"],
    ],
    ids=" ".join,
)
def test_a_cache_that_leaves_nothing_out_changes_nothing(tiny_model: Path, cache: list[str]) -> None:
    common = ["queue.left=cached", "sampler.guidance=2"]
    assert torch.equal(latents_of(tiny_model, *common, *cache), latents_of(tiny_model, *common))


def test_forecasts_of_velocities_are_in_the_schedule(tiny_model: Path) -> None:
    engine = Engine.load(tiny_model, overrides=[*QUEUE, *SEER])
    finished = engine.denoise(engine.plan(parse_script(STORY, "story.yaml")))
    kinds: list[type] = []
    next(finished)
    assert engine._executor is not None
    engine._executor.on_action = lambda action, *_: kinds.append(type(action))
    assert len(list(finished)) > 1
    assert kinds.count(Forecast) > (kinds.count(Forecast) + kinds.count(Forward)) / 3


@pytest.mark.parametrize("cache", sorted(CACHES.keys() - {"velocities", "negatives", "negatives and layers"}))
def test_a_cache_remembers_as_much_as_is_planned(tiny_model: Path, cache: str) -> None:
    engine = Engine.load(tiny_model, overrides=[*QUEUE, *CACHES[cache]])
    plan = engine.plan(parse_script(STORY, "story.yaml"))
    assert engine.cache is not None
    most, runtime, end_step = 0, engine.cache, engine.cache.end_step

    def watch(chunk: int, step: int) -> None:
        nonlocal most
        most = max(most, runtime.num_bytes)
        end_step(chunk, step)

    runtime.end_step = watch  # type: ignore[method-assign]
    list(engine.denoise(plan))
    planned = Overview.of(plan, engine.settings, engine.facts).memory[0].cache_mb * 1e6
    assert 0.8 * planned <= most <= planned


@pytest.mark.parametrize("cache", ["velocities", "gated layers", "rear and front"])
def test_a_cache_and_sparse_attention_go_together(tiny_model: Path, cache: str) -> None:
    sparse = ["attention.policy=adaspa", "attention.crossover=always", "attention.tile=16", "queue.left=cached"]
    assert latents_of(tiny_model, *CACHES[cache], *sparse).isfinite().all()


def test_what_does_not_go_together_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    def refused(*overrides: str) -> str:
        with pytest.raises(InputError) as caught:
            Engine.load(tiny_model, overrides=[*QUEUE, *overrides])
        return str(caught.value)

    assert (
        refused("cache.policy=first_block", "cache.layers=2") == "cache: layers: must be less than the model's 2, not 2"
    )
    assert "unknown policy 'delta'" in refused("cache.policy=delta")
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"method": "bac", "model": "x", "layers": 3, "reused": [{}] * 8}))
    assert refused("cache.policy=static", f"cache.table={table}").endswith(
        "was made for 8 steps of 3 layers, and this is 8 steps of 2"
    )
    table.write_text("{}")
    assert "is not a table of `longvid train cache`" in refused("cache.policy=static", f"cache.table={table}")


@pytest.mark.parametrize("method", ["steps", "bac"])
def test_what_training_finds_is_rendered(tiny_model: Path, tmp_path: Path, method: Method) -> None:
    story, out = tmp_path / "story.yaml", tmp_path / "cache.yaml"
    story.write_text(STORY)
    settings = load_settings(overrides=[*QUEUE, f"model.path={tiny_model}"])
    done: list[tuple[int, int]] = []
    found = calibrate(story, settings, method=method, share=0.5, bubble=0.0, on_done=lambda *at: done.append(at))
    assert found.share == 0.5 and done[-1][0] == done[-1][1]
    write_preset(found, out, 8)
    engine = Engine.load(tiny_model, preset=str(out), overrides=QUEUE)
    latents = torch.cat([chunk.latents for chunk in engine.denoise(engine.plan(parse_script(STORY, "story.yaml")))], 1)
    whole = latents_of(tiny_model)
    assert 0 < (latents - whole).norm() < 0.3 * whole.norm()
