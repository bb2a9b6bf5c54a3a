"""Somebody's diffusers pipeline with sparse attention, and without it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import longvid
from longvid.engine import Engine
from longvid.errors import InputError
from longvid.script import parse_script


@pytest.fixture
def pipe(euler_checkpoint: Path) -> Any:
    pipeline = diffusers.WanPipeline.from_pretrained(euler_checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run(pipe: Any, guidance: float = 3.0, steps: int = 5, noise: torch.Tensor | None = None) -> torch.Tensor:
    result = pipe(
        prompt="a red circle moving left",
        negative_prompt="blue",
        width=32,
        height=48,
        num_frames=37,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(4),
        latents=noise,
        output_type="latent",
    )
    latents: torch.Tensor = result.frames
    return latents


STORY = """
size: [32, 48]
negative: "blue"
scenes:
  - {prompt: "a red circle moving left", for: 37f}
"""


def run_from(pipe: Any, noise: torch.Tensor, guidance: float) -> torch.Tensor:
    """The film of STORY in 8 steps, [C, latents, h, w]."""
    return run(pipe, guidance, 8, noise)[0]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_policy_that_keeps_all_gives_the_stock_latents(pipe: Any, guidance: float) -> None:
    expected = run(pipe, guidance)
    longvid.accelerate(pipe, {"policy": "adaspa", "sparsity": 0.0, "tile": 16, "crossover": "always"})
    for _ in range(2):  # the second film begins anew
        assert (run(pipe, guidance) - expected).abs().max() <= 1e-4


def test_a_policy_changes_the_latents_and_restore_brings_the_stock_ones_back(pipe: Any) -> None:
    expected = run(pipe)
    accelerated = longvid.accelerate(pipe, {"policy": "adaspa", "sparsity": 0.9, "tile": 16, "crossover": "always"})
    assert accelerated is pipe
    sparse = run(pipe)
    assert not torch.equal(sparse, expected)
    assert torch.equal(run(pipe), sparse)
    longvid.accelerate(pipe, {"policy": "sta", "tile": [1, 2, 2], "window": [3, 2, 2], "crossover": "always"})
    assert not torch.equal(run(pipe), sparse)
    longvid.restore(pipe)
    assert torch.equal(run(pipe), expected)
    assert not pipe.transformer._forward_pre_hooks


def test_where_tiles_are_slower_it_stays_dense_and_warns_once(pipe: Any) -> None:
    expected = run(pipe)
    longvid.accelerate(pipe, "adaspa")
    with pytest.warns(UserWarning, match="faster dense") as caught:
        found = run(pipe)
    assert len([warning for warning in caught if "faster dense" in str(warning.message)]) == 1
    assert (found - expected).abs().max() <= 1e-4  # by our own dense attention


CACHES = {
    "every velocity": {"policy": "taylorseer", "interval": 3, "first_steps": 2},
    "what all layers add": {"policy": "taylorseer", "interval": 3, "first_steps": 2, "level": "last_layer"},
    "every module": {"policy": "taylorseer", "interval": 3, "first_steps": 2, "level": "module", "order": 2},
    "gated velocities": {"policy": "cg_taylor", "gate": 0.3, "max_skips": 2},
    "gated layers": {"policy": "first_block", "layers": 1, "threshold": 0.1, "first_steps": 2},
    "rear and front": {"policy": "delta_dit", "interval": 2, "share": 0.5},
}


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_in_the_stock_pipeline_gives_what_it_gives_in_the_engine(
    pipe: Any, euler_checkpoint: Path, cache: str, guidance: float
) -> None:
    """Two ways to leave work out, sharing the decisions alone: around stock layers, inside the engine's stage."""
    settings = CACHES[cache]
    overrides = [f"cache.{key}={value}" for key, value in settings.items()]
    engine = Engine.load(
        euler_checkpoint,
        overrides=["schedule=sequential", "sampler.steps=8", f"sampler.guidance={guidance}", *overrides],
    )
    plan = engine.plan(parse_script(STORY, "story.yaml"))
    [finished] = engine.denoise(plan)
    noise = engine._noise(plan)(plan.chunks[0])[None]
    expected = run_from(pipe, noise, guidance)
    longvid.accelerate(pipe, cache=settings)
    for _ in range(2):
        found = run_from(pipe, noise, guidance)
        assert (found - finished.latents).abs().max() <= 1e-4
    assert (found - expected).abs().max() > 1e-3, "nothing was left out"
    longvid.restore(pipe)
    assert torch.equal(run_from(pipe, noise, guidance), expected)


@pytest.mark.parametrize(
    "cache",
    [
        {"policy": "taylorseer", "interval": 1},
        {"policy": "taylorseer", "interval": 1, "level": "last_layer"},
        {"policy": "taylorseer", "interval": 1, "level": "module"},
        {"policy": "cg_taylor", "gate": 0.0},
        {"policy": "first_block", "layers": 1, "threshold": 0.0, "first_steps": 1},
        {"policy": "delta_dit", "interval": 1},
    ],
)
def test_a_cache_that_leaves_nothing_out_gives_the_stock_bits(pipe: Any, cache: dict[str, Any]) -> None:
    expected = run(pipe)
    longvid.accelerate(pipe, cache=cache)
    assert torch.equal(run(pipe), expected)


def test_what_it_does_not_know_is_refused(pipe: Any) -> None:
    with pytest.raises(InputError, match="unknown policy 'adspa': did you mean 'adaspa'"):
        longvid.accelerate(pipe, "adspa")
    with pytest.raises(InputError, match="is not a pipeline with a transformer and a scheduler"):
        longvid.accelerate(object())
    with pytest.raises(InputError, match="ras is the engine's"):
        longvid.accelerate(pipe, cache="ras")


@pytest.mark.parametrize("cache", ["gated layers", "what all layers add"])
def test_a_run_that_failed_at_its_first_step_leaves_nothing_to_the_next(pipe: Any, cache: str) -> None:
    longvid.accelerate(pipe, cache=CACHES[cache])
    expected = run(pipe, steps=8)
    hook = pipe.transformer.register_forward_hook(_fail)
    with pytest.raises(RuntimeError, match="no memory"):
        run(pipe, steps=8)
    hook.remove()
    assert torch.equal(run(pipe, steps=8), expected)


def _fail(*_: Any) -> None:
    raise RuntimeError("no memory")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache": {"policy": "first_block", "layers": 40}}, "layers: must be less than the model's"),
        ({"seq": 2, "ring": 0}, "seq and ring must be 1 or more"),
        ({"ring": -1}, "seq and ring must be 1 or more"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_run(pipe: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        longvid.accelerate(pipe, **options)
