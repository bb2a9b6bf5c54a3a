"""Somebody's diffusers pipeline with sparse attention, and without it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import longvid
from longvid.errors import InputError


@pytest.fixture
def pipe(euler_checkpoint: Path) -> Any:
    pipeline = diffusers.WanPipeline.from_pretrained(euler_checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run(pipe: Any, guidance: float = 3.0) -> torch.Tensor:
    result = pipe(
        prompt="a red circle moving left",
        negative_prompt="blue",
        width=32,
        height=48,
        num_frames=37,
        num_inference_steps=5,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(4),
        output_type="latent",
    )
    latents: torch.Tensor = result.frames
    return latents


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
    assert torch.equal(found, expected)


def test_what_it_does_not_know_is_refused(pipe: Any) -> None:
    with pytest.raises(InputError, match="unknown policy 'adspa': did you mean 'adaspa'"):
        longvid.accelerate(pipe, "adspa")
    with pytest.raises(InputError, match="is not a pipeline with a transformer and a scheduler"):
        longvid.accelerate(object())
