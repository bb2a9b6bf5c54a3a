"""Pipelines of other families than Wan, accelerated: what the engine gives with the same policy, and stock again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import longvid
from longvid.engine import Engine
from longvid.errors import InputError
from longvid.models.cogvideox import unpack
from longvid.models.cogvideox_solvers import noise_seed_of, pack
from longvid.plan import Plan
from longvid.script import parse_script

CheckpointOf = Callable[[str], Path]
STEPS, FRAMES = 6, 33
STORY = f"""
size: [64, 96]
fps: 10
negative: "blue cat"
scenes:
  - {{prompt: "a red circle moving left", for: {FRAMES}f}}
"""
ADASPA = {"policy": "adaspa", "sparsity": 0.6, "tile": 16, "search_at": [0.2], "crossover": "always"}
STA = {"policy": "sta", "tile": [1, 2, 2], "window": [3, 1, 1], "crossover": "always"}
ASA = {"policy": "asa", "tile": 16, "sample": 4, "mass": 0.3, "min_keep": 0.0, "crossover": "always"}
RADIAL = {"policy": "radial", "tile": 16, "dense_steps": 0.0, "dense_layers": 0.0, "decay": 0.1, "crossover": "always"}
ALL_KEPT = {"policy": "adaspa", "sparsity": 0.0, "tile": 16, "crossover": "always"}
FIRST_BLOCK = {"policy": "first_block", "threshold": 5.0, "first_steps": 1, "max_skips": 2}
LAST_LAYER = {"policy": "taylorseer", "level": "last_layer", "interval": 2, "first_steps": 1}
OUTPUT = {"policy": "taylorseer", "interval": 2, "first_steps": 1}
DELTA = {"policy": "delta_dit", "interval": 2, "share": 0.5}
MODULES = {"policy": "taylorseer", "level": "module", "interval": 2, "first_steps": 1}
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ltx": (ADASPA, MODULES),
    "cogvideox 2b": (RADIAL, LAST_LAYER),
    "cogvideox 5b": (STA, DELTA),
    "cogvideox 1.5": (ASA, OUTPUT),
    "hunyuan": (ADASPA, FIRST_BLOCK),
}


class Stock:
    """A stock pipeline, and the film of STORY that it makes from the engine's noise, in the engine's layout."""

    def __init__(self, kind: str, root: Path, plan: Plan, noise: torch.Tensor, guidance: float) -> None:
        self.pipe: Any = diffusers.DiffusionPipeline.from_pretrained(root)
        self.pipe.set_progress_bar_config(disable=True)
        self._kind, self._plan, self._noise, self._guidance = kind, plan, noise, guidance

    def __call__(self) -> torch.Tensor:
        size = {"width": self._plan.width, "height": self._plan.height, "num_frames": FRAMES}
        if "cogvideox" in self._kind:
            together = 2 if "1.5" in self._kind else 1
            seed = torch.Generator().manual_seed(noise_seed_of(self._noise))
            latents = unpack(self._noise, together)[None]
            options = {"guidance_scale": self._guidance, "max_sequence_length": 16, "generator": seed}
            return pack(self._run(latents, **size, **options)[0], together)
        if self._kind == "ltx":
            latents = self.pipe._pack_latents(self._noise[None])
            packed = self._run(latents, **size, frame_rate=10, guidance_scale=self._guidance)
            found: torch.Tensor = self.pipe._unpack_latents(packed, *self._noise.shape[1:])[0]
            return found
        return self._run(self._noise[None], **size, true_cfg_scale=self._guidance)[0]

    def _run(self, latents: torch.Tensor, **options: Any) -> torch.Tensor:
        texts = {"prompt": self._plan.prompts[0], "negative_prompt": self._plan.negatives[0]}
        options |= {"num_inference_steps": STEPS, "latents": latents, "output_type": "latent"}
        frames: torch.Tensor = self.pipe(**texts, **options).frames
        return frames


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_stock_pipeline_gives_what_the_engine_gives_and_stock_again(checkpoint_of: CheckpointOf, kind: str) -> None:
    """With guidance in calls of their own, as HunyuanVideo has it; the others are given one pass a step."""
    attention, cache = FAMILIES[kind]
    guidance = 3.0 if kind == "hunyuan" else 1.0
    sections = (("attention", attention), ("cache", cache))
    overrides = [f"{section}.{key}={value}" for section, values in sections for key, value in values.items()]
    settings = ["schedule=sequential", f"sampler.steps={STEPS}", f"sampler.guidance={guidance}", *overrides]
    engine = Engine.load(checkpoint_of(kind), overrides=settings)
    plan = engine.plan(parse_script(STORY, "story.yaml"))
    [finished] = engine.denoise(plan)
    film = Stock(kind, checkpoint_of(kind), plan, engine._noise(plan)(plan.chunks[0]), guidance)
    stock = film()

    longvid.accelerate(film.pipe, attention, cache)
    both = film()
    assert (both - finished.latents).abs().max() <= 1e-4
    assert torch.equal(film(), both), "the second film begins anew"
    longvid.accelerate(film.pipe, attention)
    sparse = film()
    longvid.accelerate(film.pipe, cache=cache)
    cached = film()
    assert (
        min((a - b).abs().max() for a, b in ((sparse, stock), (cached, stock), (both, sparse), (both, cached))) > 1e-4
    )
    longvid.accelerate(film.pipe, ALL_KEPT)
    assert (film() - stock).abs().max() <= 1e-5 * max(1.0, float(stock.abs().max()))
    longvid.accelerate(film.pipe)
    assert torch.equal(film(), stock)
    longvid.accelerate(film.pipe, attention, cache)
    longvid.restore(film.pipe)
    assert torch.equal(film(), stock)
    assert not film.pipe.transformer._forward_pre_hooks and "forward" not in vars(film.pipe.transformer)


def test_two_experts_are_accelerated_each_with_a_memory_of_its_own(checkpoint_of: CheckpointOf) -> None:
    pipe: Any = diffusers.WanPipeline.from_pretrained(checkpoint_of("a14b"))
    pipe.set_progress_bar_config(disable=True)
    size = {"width": 32, "height": 48, "num_frames": 21, "num_inference_steps": STEPS, "output_type": "latent"}

    def film() -> torch.Tensor:
        latents: torch.Tensor = pipe("a red cat", generator=torch.Generator().manual_seed(1), **size).frames
        return latents

    stock = film()
    longvid.accelerate(pipe, ADASPA, LAST_LAYER)
    changed = film()
    assert torch.equal(film(), changed) and (changed - stock).abs().max() > 1e-4
    longvid.accelerate(pipe, ALL_KEPT)
    assert (film() - stock).abs().max() <= 1e-5
    assert torch.equal((longvid.restore(pipe), film())[1], stock)


@pytest.mark.parametrize("kind", ["cogvideox 5b", "hunyuan"])
def test_what_cannot_be_is_refused_and_leaves_the_pipeline_as_it_was(checkpoint_of: CheckpointOf, kind: str) -> None:
    pipe = diffusers.DiffusionPipeline.from_pretrained(checkpoint_of(kind))
    with pytest.raises(InputError, match="take text and video together, so they are left out whole"):
        longvid.accelerate(pipe, ADASPA, MODULES)
    with pytest.raises(InputError, match=r"cache.negative_every must be 1"):
        longvid.accelerate(pipe, ADASPA, {**OUTPUT, "negative_every": 2})
    assert not pipe.transformer._forward_pre_hooks


def test_prompts_of_different_lengths_in_one_call_are_refused(checkpoint_of: CheckpointOf) -> None:
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(checkpoint_of("hunyuan"))
    longvid.accelerate(pipe, ADASPA)
    size = {"width": 32, "height": 32, "num_frames": 5, "num_inference_steps": 1, "output_type": "latent"}
    with pytest.raises(InputError, match=r"the prompts of one call have .* tokens, but must have as many each"):
        pipe(prompt=["a cat", "a red circle moving left"], **size)
    assert pipe(prompt=["a red cat", "a blue cat"], **size).frames.shape[0] == 2


def test_a_transformer_that_is_not_known_is_named() -> None:
    class Other:
        transformer = torch.nn.Linear(1, 1)
        scheduler = None

    with pytest.raises(InputError, match=r"Linear is not supported; these are: Wan.*, LTX.*, CogVideoX.*, Hunyuan"):
        longvid.accelerate(Other())
